"""Grouped-query attention with a hand-written backward pass, and its masks.

Inside, arrays are [B, K, rows, ..]: the G*T queries of one kv head are the rows
of one matrix, so nothing is transposed between the products.

Axis letters: B batch, T query length, S key/value length, N query heads, K kv
heads, G = N/K, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

# The arrays that attention sums with its weights.
Values = Sequence[Float[Array, "..."]]

# A remat policy may save the forward pass's output and sums under this name;
# then the backward pass does not run the forward pass again.
ATTENTION = "attention"

# Axes that a product of [B, K, rows, x] and [B, K, columns, y] sums over.
_HEADS = ((0, 1), (0, 1))
_X_AND_Y = (((3,), (3,)), _HEADS)
_X_AND_COLUMNS = (((3,), (2,)), _HEADS)
_ROWS_AND_COLUMNS = (((2,), (2,)), _HEADS)


@jax.custom_vjp
def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B K S H"],
  v: Float[Array, "B K S H"],
  mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
  """Grouped-query attention (Ainslie et al., 2023), softmax in float32.

  softmax(q k^T / sqrt(H)) v, where G = N/K query heads share a kv head. As in
  FlashAttention (Dao et al., 2022, algorithms 1 and 4) the product with v comes
  before the division by the weights' sum. The backward pass recomputes the
  weights from q, k and that sum, so no [T, S] array is saved for it.

  Args:
    q: [B, T, N, H].
    k: [B, K, S, H].
    v: [B, K, S, H].
    mask: bool[B, T, S], true where a query may look. A row that may look
      nowhere (padding) gets the mean of v, not NaN.

  Returns:
    [B, T, N, H].

  Example:
    >>> q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 1, 2, 4))
    >>> attention(q, k, 3 * k, causal_mask(jnp.ones((1, 2), int)))[0, 1, 0, 0]
    Array(3., dtype=float32)
  """
  return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
  length = q.shape[1]
  q = _by_kv_head(q, k.shape[1])
  (mixed,), highest, total = _attend(q, ((k, (v,), mask),))
  sums = mixed, highest, total
  mixed, highest, total = checkpoint_name(sums, ATTENTION)
  return _by_token(mixed, length), (q, k, v, mask, mixed, highest, total)


def _backward(saved, gradient):
  q, k, v, mask, mixed, highest, total = saved
  length = gradient.shape[1]
  gradient = _by_kv_head(gradient, k.shape[1])
  weights = jnp.exp(_scores(q, k, mask) - highest) / total
  # The softmax's own sum, sum_s weight_s (gradient . v_s) = gradient . mixed.
  own = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
  of_scores = weights * (_dot(gradient, v, _X_AND_Y) - own)
  of_scores = _where(mask, of_scores / math.sqrt(q.shape[-1]), 0.0)
  of_scores = of_scores.astype(q.dtype)
  of_q = _dot(of_scores, k, _X_AND_COLUMNS)
  of_k = _dot(of_scores, q, _ROWS_AND_COLUMNS)
  of_v = _dot(weights.astype(v.dtype), gradient, _ROWS_AND_COLUMNS)
  return (
    _by_token(of_q, length).astype(q.dtype),
    of_k.astype(k.dtype),
    of_v.astype(v.dtype),
    None,
  )


attention.defvjp(_forward, _backward)


def joint_attention(
  q: Float[Array, "B T N H"],
  parts: Sequence[tuple[Float[Array, "B K _ H"], Values, Bool[Array, "B T _"]]],
) -> list[Float[Array, "B T N _"]]:
  """Attention over several sets of keys as if they were one.

  Equals `attention` over a cache and the new keys and values in one array,
  without building that array. More arrays than the values may be summed with
  the attention weights.

  Args:
    q: [B, T, N, H].
    parts: per set (k [B, K, S, H]; a list of the arrays to sum, each
      [B, K, S, ..], or [B, 1, S, ..] if all heads share it; mask bool[B, T, S]).

  Returns:
    One [B, T, N, ..] for each array to sum.

  Example:
    >>> x, cached = jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 3, 4))
    >>> see = jnp.array([[[True, False, False]]])
    >>> parts = (cached, [2 * cached], see), (x, [4 * x], see[..., :1])
    >>> joint_attention(x, parts)[0][0, 0, 0, 0]
    Array(3., dtype=float32)
  """
  length, kv_heads = q.shape[1], parts[0][0].shape[1]
  mixed = _attend(_by_kv_head(q, kv_heads), parts)[0]
  return [_by_token(x, length) for x in mixed]


def _attend(q, parts):
  """Attends over several (k, values, mask) as if they were one.

  Returns (a list of [B, K, G*T, ..] as the values; highest score and sum of
  weights, float32[B, K, G*T, 1]).
  """
  scores = [_scores(q, k, mask) for k, _, mask in parts]
  highest = functools.reduce(
    jnp.maximum, [x.max(axis=-1, keepdims=True) for x in scores]
  )
  weights = [jnp.exp(x - highest) for x in scores]
  total = sum(x.sum(axis=-1, keepdims=True) for x in weights)
  mixed = [
    sum(map(_weighted, weights, values))
    for values in zip(*(values for _, values, _ in parts), strict=True)
  ]
  return [(x / total).astype(q.dtype) for x in mixed], highest, total


def _weighted(weights, values):
  """Returns [B, K, rows, S] times [B, K or 1, S, x], as [B, K, rows, x]."""
  shape = weights.shape[:3]
  if values.shape[1] != shape[1]:
    weights = weights.reshape(shape[0], 1, -1, weights.shape[-1])
  mixed = _dot(weights.astype(values.dtype), values, _X_AND_COLUMNS)
  return mixed.reshape(*shape, -1)


def _dot(x, y, axes):
  return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _scores(q, k, mask):
  """Returns float32[B, K, G*T, S], -1e30 where a query may not look."""
  return _where(mask, _dot(q, k, _X_AND_Y) / math.sqrt(q.shape[-1]), -1e30)


def _where(mask, scores, other):
  by_query = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
  kept = jnp.where(mask[:, None, None], by_query, other)
  return kept.reshape(scores.shape)


def _by_kv_head(x, kv_heads):
  """Returns [B, T, N, H] as [B, K, G*T, H]."""
  batch, length, heads, width = x.shape
  x = x.reshape(batch, length, kv_heads, heads // kv_heads, width)
  return x.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)


def _by_token(x, length):
  """Returns [B, K, G*T, H] as [B, T, N, H]."""
  batch, kv_heads, _, width = x.shape
  x = x.reshape(batch, kv_heads, -1, length, width)
  return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, width)


def causal_mask(
  segment_ids: Int[Array | np.ndarray, "B T"],
) -> Bool[Array, "B T T"]:
  """Returns the mask bool[B, T, T]: each token sees its segment up to itself.

  Args:
    segment_ids: int32[B, T]; 0 is padding, equal ids belong together.

  Example:
    >>> causal_mask(jnp.array([[1, 1, 2]]))[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
  """
  length = segment_ids.shape[1]
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return same & jnp.tril(jnp.ones((length, length), bool))


def windowed_mask(
  mask: Bool[Array, "B T S"],
  window: int | None,
  first: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
  """Narrows an attention mask to a sliding window (Mistral).

  The last T columns are the queries' own keys: query t and key t lie in slot
  first + t. The columns before them are the cache's slots 0, 1, ...

  Args:
    mask: bool[B, T, S], true where a query may look.
    window: the most keys a query sees, its own included; None or S and more
      leave the mask unchanged.
    first: int32 scalar, the slot of the first query in the cache.

  Returns:
    bool[B, T, S].

  Example:
    >>> whole = causal_mask(jnp.ones((1, 4), int))
    >>> windowed_mask(whole, 2)[0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
  """
  length, columns = mask.shape[1:]
  if window is None or columns <= window:
    return mask
  own = first + jnp.arange(length)
  slots = jnp.concatenate([jnp.arange(columns - length), own])
  return mask & (own[:, None] - slots < window)
