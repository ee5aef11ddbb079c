"""Embeds texts with the base itself: the mean of its last hidden states.

Axis letters: B batch, T length, D width, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from tokenlora_jax.data.tokens import Tokenizer, encode_prompt
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama

# Texts are padded to a multiple of this, so that few shapes compile.
_LENGTH_STEP = 64


@jax.jit
def _embed(base, tokens, lengths):
  batch, length = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
  real = positions < lengths[:, None]
  hidden, _ = base(tokens, positions, causal_mask(real.astype(jnp.int32)))
  mean = jnp.sum(hidden * real[..., None], axis=1, dtype=jnp.float32)
  # A text without tokens has no direction, so its vector stays 0.
  norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
  return mean / jnp.where(norm > 0, norm, 1)


@dataclasses.dataclass(frozen=True)
class HiddenEncoder:
  """The base as an encoder: the normalised mean of its last hidden states.

  embed(text) = h / |h|, with h the mean over tokens of the last hidden state:
  that after the final norm, without adapters. This class fits centroids; while
  decoding, the decoder itself keeps the running mean.

  Attributes:
    base: the frozen Llama.
    tokenizer: its tokenizer.
    length: longer texts are cut to this many tokens.

  Example:
    >>> from tokenlora_jax import load_base, load_tokenizer
    >>> base = load_base("random:tiny")
    >>> tokenizer = load_tokenizer("random:tiny")
    >>> HiddenEncoder(base, tokenizer, length=64).embed(["a text"]).shape
    (1, 64)
  """

  base: Llama
  tokenizer: Tokenizer
  length: int

  def embed(self, texts: Sequence[str], batch: int = 16) -> np.ndarray:
    """Returns the texts' vectors, float32[N, D], each of length 1.

    Args:
      texts: N texts.
      batch: number of texts per forward pass.
    """
    tokens = [
      encode_prompt(text, self.tokenizer, letters=True)[: self.length]
      for text in texts
    ]
    # Sorted by length, so that there is little padding.
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    out = np.zeros((len(texts), self.base.config.width), np.float32)
    for start in range(0, len(order), batch):
      places = order[start : start + batch]
      lengths = np.ones(batch, np.int32)
      lengths[: len(places)] = [len(tokens[i]) for i in places]
      size = -(-int(lengths.max()) // _LENGTH_STEP) * _LENGTH_STEP
      padded = np.zeros((batch, size), np.int32)
      for row, i in enumerate(places):
        padded[row, : len(tokens[i])] = tokens[i]
      # The base, and so the result, may be sharded across processes.
      vectors = multihost_utils.process_allgather(
        _embed(self.base, padded, lengths), tiled=True
      )
      out[places] = vectors[: len(places)]
    return out
