"""Decoding: text from a base and a mixture of adapters."""

from tokenlora_jax.decoding.batches import make_batches
from tokenlora_jax.decoding.decoder import Decoder, Generation, generate
from tokenlora_jax.decoding.prompts import encode_checked
from tokenlora_jax.decoding.sampling import Sampler

__all__ = [
  "Decoder",
  "Generation",
  "Sampler",
  "encode_checked",
  "generate",
  "make_batches",
]
