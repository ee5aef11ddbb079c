"""The frozen Llama, its LoRA adapters, attention and the KV cache."""
