"""Attention: against torch forwards, against plain autodiff backwards."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal
import torch

from tokenlora_jax.model.attention import attention, joint_attention


def some(kv_heads):
  """Queries, keys, values and a mask: B 2, T 5, S 7, N 4, H 6."""
  q = normal(2, 5, 4, 6)
  k = normal(2, kv_heads, 7, 6, seed=1)
  v = normal(2, kv_heads, 7, 6, seed=2)
  mask = np.random.default_rng(3).random((2, 5, 7)) < 0.5
  mask[:, :, 0] = True
  return q, k, v, mask


def slow(q, k, v, mask):
  """Softmax attention with every kv head repeated, for autodiff."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
  scores = jnp.einsum("btnh,bnsh->bnts", q, k) / math.sqrt(q.shape[-1])
  scores = jnp.where(mask[:, None], scores, -1e30)
  return jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_is_torchs(kv_heads):
  q, k, v, mask = some(kv_heads)
  heads_first = (
    torch.tensor(q).transpose(1, 2),
    torch.tensor(k),
    torch.tensor(v),
  )
  want = torch.nn.functional.scaled_dot_product_attention(
    *heads_first, torch.tensor(mask)[:, None], enable_gqa=True
  ).transpose(1, 2)
  got = attention(*map(jnp.asarray, (q, k, v, mask)))
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_are_those_of_plain_autodiff(kv_heads):
  *qkv, mask = map(jnp.asarray, some(kv_heads))
  # One query sees nothing.
  mask = mask.at[1, 2].set(False)
  weights = jnp.asarray(normal(2, 5, 4, 6, seed=4))

  def gradients(function):
    return jax.grad(
      lambda *qkv: jnp.sum(weights * function(*qkv, mask)), argnums=(0, 1, 2)
    )(*qkv)

  for got, want in zip(gradients(attention), gradients(slow), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_cache_and_new_tokens_are_one_sequence():
  q, k, v, _ = map(jnp.asarray, some(2))
  mask = jnp.asarray(np.random.default_rng(5).random((2, 5, 7)) < 0.5)
  mask = mask.at[0, 1].set(False)
  q, mask = q[:, :3], mask[:, :3]
  # Something that all heads share is summed with the same weights.
  z = jnp.asarray(normal(2, 1, 7, 3, seed=6))
  cut = slice(None, 4), slice(4, None)
  parts = [(k[:, :, c], [v[:, :, c], z[:, :, c]], mask[..., c]) for c in cut]
  got, shared = joint_attention(q, parts)
  np.testing.assert_allclose(got, attention(q, k, v, mask), atol=1e-6)
  wide = jnp.pad(jnp.repeat(z, 2, axis=1), [(0, 0)] * 3 + [(0, 3)])
  want = attention(q, k, wide, mask)[..., :3]
  np.testing.assert_allclose(shared, want, atol=1e-6)


def test_gradients_keep_the_dtype():
  q, k, v, mask = map(jnp.asarray, some(2))
  q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
  out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask), q, k, v)
  assert out.dtype == jnp.bfloat16
  assert all(x.dtype == jnp.bfloat16 for x in pull(out))
  np.testing.assert_allclose(
    out.astype(jnp.float32),
    slow(*(x.astype(jnp.float32) for x in (q, k, v)), mask),
    atol=0.03,
  )


def test_a_query_that_sees_nothing_gets_numbers():
  q, kv = jnp.asarray(normal(1, 1, 2, 4)), jnp.asarray(normal(1, 1, 3, 4))
  got = attention(q, kv, kv, jnp.zeros((1, 1, 3), bool))
  want = np.broadcast_to(kv.mean(axis=2, keepdims=True), q.shape)
  np.testing.assert_allclose(got, want, atol=1e-6)
