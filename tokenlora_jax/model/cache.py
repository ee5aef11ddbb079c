"""The key and value cache of a batch of left-padded sequences.

Slots are shared: every row of the batch writes its next token at the same slot,
so that a step is one in-place write. A row of length n in a bucket of P slots
starts at slot P - n: it has `pad` = P - n unused slots, and the token in slot s
stands at position s - pad.

A step reads the cache as it was and adds its own token beside it (see
`attention.joint_attention`); what it read is written back at its end. A cache
that were written first and read then would be copied in every step.

Axis letters: B batch, T query length, S slots, K kv heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
  """Keys and values of one layer.

  Attributes:
    k: [B, K, S, H].
    v: [B, K, S, H]; without the adapters' part where there is a `z`.
    z: [B, 1, S, E*R], the adapters' rank activations of the values, so that
      they can be read under other gates than those of their time; or None.
  """

  k: jax.Array
  v: jax.Array
  z: jax.Array | None = None

  @property
  def values(self) -> list[jax.Array]:
    """What attention sums."""
    return [self.v] if self.z is None else [self.v, self.z]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The cache of all layers, and where the batch stands in it.

  Attributes:
    layers: a `KV` a layer.
    slot: int32 scalar, the slot that is written next.
    pad: int32[B], unused slots in front of each row.
    split: whether its heads are on several devices.
  """

  layers: tuple[KV, ...]
  slot: jax.Array
  pad: jax.Array
  split: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def of_prompt(
    cls,
    layers: Sequence[KV],
    pad: jax.Array,
    slots: int,
    split: bool = False,
  ) -> Cache:
    """Returns a cache of `slots` slots of which a prompt fills the first ones.

    Args:
      layers: keys and values of the prompt's P tokens, a `KV` a layer.
      pad: int32[B].
      slots: S, at least P.
      split: whether the heads are on several devices.
    """
    length = layers[0].k.shape[2]
    room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    grown = jax.tree.map(lambda x: jnp.pad(x, room), tuple(layers))
    return cls(grown, jnp.int32(length), pad, split)

  def append(self, layers: Sequence[KV], after: jax.Array) -> Cache:
    """Returns the cache with T more tokens, written in place inside a jit.

    Args:
      layers: keys and values of the tokens, a `KV` a layer.
      after: any value computed from all that was read of this cache. XLA
        writes in place only where it can tell that all reads come first.
    """
    # Always 0, but not before `after` is known.
    zero = jnp.clip(after.ravel()[0].astype(jnp.int32), 0, 0)
    place = (0, 0, self.slot + zero, 0)

    def write(old, new):
      written = jax.lax.dynamic_update_slice(old, new, place)
      if self.split:
        # XLA would gather what is to have a layout.
        return written
      # Else XLA for TPUs would have slots in front, and copy the whole cache
      # before and after each chunk.
      return with_layout_constraint(written, Layout((0, 1, 2, 3)))

    written = jax.tree.map(write, self.layers, tuple(layers))
    slot = self.slot + layers[0].k.shape[2]
    return dataclasses.replace(self, layers=written, slot=slot)

  def positions(self, length: int) -> jax.Array:
    """Returns int32[B, T], the positions of the next `length` tokens.

    A pad slot's position would be negative; it is given 0 and masked.
    """
    slots = self.slot + jnp.arange(length)
    return jnp.maximum(slots[None] - self.pad[:, None], 0)

  def mask(self, length: int) -> jax.Array:
    """Returns bool[B, T, S + T]: what the next `length` tokens may see.

    Row b, with pad 2, in a cache of 6 slots of which 3 are written: the next
    token (slot 3) sees slot 2 and itself:  . . x . . . | x
    """
    slots = jnp.arange(self.layers[0].k.shape[2])
    written = (slots < self.slot) & (slots >= self.pad[:, None])
    cached = jnp.broadcast_to(
      written[:, None], (len(self.pad), length, len(slots))
    )
    new = jnp.broadcast_to(
      jnp.tril(jnp.ones((length, length), bool)),
      (len(self.pad), length, length),
    )
    return jnp.concatenate([cached, new], axis=-1)
