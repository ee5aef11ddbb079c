"""The key and value cache of a batch of left-padded sequences.

Slots are shared: every row of the batch writes its next token at the same slot,
so that a step is one in-place write. A row of length n in a bucket of P slots
starts at slot P - n: it has `pad` = P - n unused slots, and the token in slot s
stands at position s - pad.

Axis letters: B batch, T query length, S slots, K kv heads, H head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tokenlora_jax.model.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
  """Keys and values of one layer, [B, S, K, H] each."""

  k: jax.Array
  v: jax.Array

  def write(self, k: jax.Array, v: jax.Array, slot: jax.Array) -> KV:
    """Returns the cache with k and v [B, T, K, H] in slots slot, slot+1, ..."""
    place = (0, slot, 0, 0)
    return KV(
      jax.lax.dynamic_update_slice(self.k, k, place),
      jax.lax.dynamic_update_slice(self.v, v, place),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The cache of all layers, and where the batch stands in it.

  Attributes:
    layers: a `KV` a layer.
    slot: int32 scalar, the slot that is written next.
    pad: int32[B], unused slots in front of each row.
  """

  layers: tuple[KV, ...]
  slot: jax.Array
  pad: jax.Array

  @classmethod
  def empty(cls, config: LlamaConfig, pad: jax.Array, slots: int, dtype):
    """Returns a cache of `slots` slots with nothing written."""
    shape = (pad.shape[0], slots, config.kv_heads, config.head_width)
    layers = tuple(
      KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
      for _ in range(config.layers)
    )
    return cls(layers, jnp.int32(0), pad)

  def positions(self, length: int) -> jax.Array:
    """Returns int32[B, T], the positions of the next `length` tokens.

    A pad slot's position would be negative; it is given 0 and masked.
    """
    slots = self.slot + jnp.arange(length)
    return jnp.maximum(slots[None] - self.pad[:, None], 0)

  def mask(self, length: int) -> jax.Array:
    """Returns bool[B, T, S]: which slots the next `length` tokens may see.

    Row b, with pad 2, in a cache of 6 slots of which 3 are written, the next
    token (slot 3) sees slots 2 and 3:  . . x x . .
    """
    slots = jnp.arange(self.layers[0].k.shape[1])
    written = slots[None] <= (self.slot + jnp.arange(length))[:, None]
    real = slots[None] >= self.pad[:, None]
    return written[None] & real[:, None]
