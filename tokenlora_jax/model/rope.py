"""Rotary position embeddings.

Axis letters: B batch, T length, N heads, H head width.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenlora_jax.model.config import RopeScaling


def rope_frequencies(
  width: int, theta: float, scaling: RopeScaling
) -> Float[Array, " half"]:
  """Rotary frequencies theta^(-2i/H) (Su et al., 2021, eq. 15), scaled.

  `llama3` divides the frequencies of long wavelengths by `factor`, keeps those
  of short ones, and ramps linearly (in original_length / wavelength) between.

  Args:
    width: H, even.
    theta: the base of the frequencies.
    scaling: their scaling for long texts.

  Returns:
    float32[H/2], radians per position.

  Example:
    >>> rope_frequencies(4, 10_000.0, RopeScaling()).tolist()
    [1.0, 0.009999999776482582]
  """
  exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  frequencies = 1.0 / theta**exponent
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  if scaling.kind == "llama3":
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_length * frequencies / (2 * math.pi)
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
  return frequencies


def rotate(
  x: Float[Array, "B T N H"],
  cos: Float[Array, "#B T 1 half"],
  sin: Float[Array, "#B T 1 half"],
) -> Float[Array, "B T N H"]:
  """Rotary position embedding (Su et al., 2021, eq. 34), halves paired.

  Args:
    x: [B, T, heads, H]; dimension i is paired with i + H/2.
    cos: float32[B, T, 1, H/2], cosines of position times frequency.
    sin: float32[B, T, 1, H/2], their sines.

  Returns:
    x rotated, in x's dtype; the rotation itself is float32.

  Example:
    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> quarter = jnp.full((1, 1, 1, 1), jnp.pi / 2)  # radians
    >>> rotate(x, jnp.cos(quarter), jnp.sin(quarter)).ravel().round(3).tolist()
    [-0.0, 1.0]
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
