"""Text encoders, which embed a text as one vector for routers to compare."""

from tokenlora_jax.encoders.hidden import HiddenEncoder
from tokenlora_jax.encoders.minilm import MiniLM, MiniLMConfig
from tokenlora_jax.encoders.text import TextEncoder

__all__ = ["HiddenEncoder", "MiniLM", "MiniLMConfig", "TextEncoder"]
