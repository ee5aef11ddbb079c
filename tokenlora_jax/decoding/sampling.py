"""Samples the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Samples the next token.

  With temperature t = 0, or one too small for float32, it is argmax z.
  Otherwise it is drawn from softmax(z / t), restricted to the `top_k` most
  likely tokens and to the most likely tokens whose probabilities reach `top_p`
  (nucleus sampling, Holtzman et al., 2020, eq. 2-3).

  Args:
    logits: float32[B, V].
    key: a PRNG key.

  Returns:
    int32[B].

  Example:
    >>> Sampler()(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0)).tolist()
    [1]
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __call__(
    self, logits: Float[Array, "B V"], key: Key[Array, ""]
  ) -> Int[Array, " B"]:
    # float32 rounds this to 0, by which nothing can be divided.
    if self.temperature < np.finfo(np.float32).tiny:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest logit is 0, so that none overflows.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / self.temperature
    if 0 < self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    if self.top_p < 1:
      ordered = jnp.sort(logits, axis=-1, descending=True)
      shares = jax.nn.softmax(ordered, axis=-1)
      # Keeps a token if the more likely ones do not reach top_p yet.
      stays = jnp.cumsum(shares, axis=-1) - shares < self.top_p
      least = jnp.min(
        jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True
      )
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
