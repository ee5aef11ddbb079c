"""The base itself as an encoder: the mean of its last hidden states.

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
  # A text of no tokens has no direction: it stays 0.
  norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
  return mean / jnp.where(norm > 0, norm, 1)


@dataclasses.dataclass(frozen=True)
class HiddenEncoder:
  """embed(text) = h / |h|, h the mean over tokens of the last hidden state.

  The last hidden state is that after the final norm, with no adapter. This is
  the encoder to fit centroids with; while decoding, the decoder itself keeps
  the running mean.

  Attributes:
    base: the frozen Llama.
    tokenizer: its tokenizer.
    length: longer texts are cut to this many tokens.
  """

  base: Llama
  tokenizer: Tokenizer
  length: int

  def embed(self, texts: Sequence[str], batch: int = 16) -> np.ndarray:
    """Returns float32[N, D], each of length 1.

    Args:
      texts: N texts.
      batch: how many run at once.
    """
    tokens = [
      encode_prompt(text, self.tokenizer, letters=True)[: self.length]
      for text in texts
    ]
    # By length, so that little is padding.
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
      # The base, and so the result, may lie across processes.
      vectors = multihost_utils.process_allgather(
        _embed(self.base, padded, lengths), tiled=True
      )
      out[places] = vectors[: len(places)]
    return out
