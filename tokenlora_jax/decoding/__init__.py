"""Decoding: text from a base and a mixture of adapters."""

from tokenlora_jax.decoding.batches import filled_batches, make_batches
from tokenlora_jax.decoding.decoder import Decoder, generate
from tokenlora_jax.decoding.generation import (
  Generation,
  MadeText,
  joined_pace,
)
from tokenlora_jax.decoding.prompts import encode_checked
from tokenlora_jax.decoding.sampling import Sampler

__all__ = [
  "Decoder",
  "Generation",
  "MadeText",
  "Sampler",
  "encode_checked",
  "filled_batches",
  "generate",
  "joined_pace",
  "make_batches",
]
