"""Token-level mixing of LoRA adapters at decode time, in JAX."""
