"""Encoders: what turns a text into one vector for a router to compare."""

from tokenlora_jax.mixing.encoders.hidden import HiddenEncoder
from tokenlora_jax.mixing.encoders.minilm import MiniLM, MiniLMConfig
from tokenlora_jax.mixing.encoders.text import TextEncoder

__all__ = ["HiddenEncoder", "MiniLM", "MiniLMConfig", "TextEncoder"]
