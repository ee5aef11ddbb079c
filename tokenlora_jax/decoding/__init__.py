"""Decoding: text from a base and a mixture of adapters."""

from tokenlora_jax.decoding.decoder import Decoder, Generation, generate
from tokenlora_jax.decoding.sampling import Sampler

__all__ = ["Decoder", "Generation", "Sampler", "generate"]
