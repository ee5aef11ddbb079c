"""Encoders: what turns a text into one vector for a router to compare."""

from tokenlora_jax.encoders.hidden import HiddenEncoder
from tokenlora_jax.encoders.minilm import MiniLM, MiniLMConfig
from tokenlora_jax.encoders.text import TextEncoder

__all__ = ["HiddenEncoder", "MiniLM", "MiniLMConfig", "TextEncoder"]
