"""The KV cache of a batch of left-padded sequences.

All rows share their slots: each row writes its next token into the same slot,
so a step is one in-place write. A prompt of n tokens in a bucket of P slots
starts at slot P - n. It leaves `pad` = P - n slots unused, and its token in
slot s has position s - pad.

  P = 4, n = 3:  slots . a b c   pad 1   positions of a b c: 0 1 2

Each step attends to the old cache plus the new token's key and value (see
`attention.joint_attention`), and writes those two into the cache last. Writing
first would make XLA copy the whole cache.

Axis letters: B batch, T query length, S slots, K kv heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
  """Keys and values of one layer.

  Attributes:
    k: [B, K, S, H].
    v: [B, K, S, H]; the base's values alone if there is a `z`.
    z: [B, 1, S, E*R], the adapters' rank activations x A^T of the values, to
      which later gates can be applied; or None.
  """

  k: Float[Array, "B K S H"]
  v: Float[Array, "B K S H"]
  z: Float[Array, "B 1 S ER"] | None = None

  @property
  def values(self) -> list[Float[Array, "B _ S _"]]:
    """The arrays that attention sums with its weights."""
    return [self.v] if self.z is None else [self.v, self.z]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The KV cache of all layers, and the next slot to write.

  Attributes:
    layers: one `KV` per layer.
    slot: int32 scalar, the slot that is written next.
    pad: int32[B], unused slots in front of each row.
    split: whether the heads are sharded over several devices.

  Example:
    >>> kv = KV(jnp.ones((1, 1, 4, 8)), jnp.ones((1, 1, 4, 8)))
    >>> cache = Cache.of_prompt([kv], jnp.array([1]), slots=6)
    >>> cache.positions(1).tolist()  # of the token after a, b, c
    [[3]]
  """

  layers: tuple[KV, ...]
  slot: Int[Array, ""]
  pad: Int[Array, " B"]
  split: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def of_prompt(
    cls,
    layers: Sequence[KV],
    pad: Int[Array, " B"],
    slots: int,
    split: bool = False,
  ) -> Cache:
    """Returns a cache of `slots` slots; a prompt fills the first P.

    Args:
      layers: keys and values of the prompt's P tokens, one `KV` per layer.
      pad: int32[B].
      slots: S, at least P.
      split: whether the heads are sharded over several devices.
    """
    length = layers[0].k.shape[2]
    room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    grown = jax.tree.map(lambda x: jnp.pad(x, room), tuple(layers))
    return cls(grown, jnp.int32(length), pad, split)

  def append(self, layers: Sequence[KV], after: Float[Array, "..."]) -> Cache:
    """Returns the cache with T more tokens, written in place inside a jit.

    Args:
      layers: keys and values of the tokens, one `KV` per layer.
      after: a value that depends on every read of this cache. XLA writes in
        place only if it can tell that all reads come first.
    """
    # Always 0, but only once `after` is known.
    zero = jnp.clip(after.ravel()[0].astype(jnp.int32), 0, 0)
    place = (0, 0, self.slot + zero, 0)

    def write(old, new):
      written = jax.lax.dynamic_update_slice(old, new, place)
      if self.split:
        # A layout constraint would make XLA gather a sharded array.
        return written
      # Otherwise XLA for TPUs puts the slots in front, and copies the whole
      # cache before and after each chunk.
      return with_layout_constraint(written, Layout((0, 1, 2, 3)))

    written = jax.tree.map(write, self.layers, tuple(layers))
    slot = self.slot + layers[0].k.shape[2]
    return dataclasses.replace(self, layers=written, slot=slot)

  def positions(self, length: int) -> Int[Array, "B {length}"]:
    """Returns int32[B, T], the positions of the next `length` tokens.

    A pad slot's position would be negative; it gets 0, and is masked.

    Args:
      length: T.
    """
    slots = self.slot + jnp.arange(length)
    return jnp.maximum(slots[None] - self.pad[:, None], 0)

  def mask(self, length: int) -> Bool[Array, "B {length} _"]:
    """Returns the attention mask bool[B, T, S + T] of the next `length` tokens.

    Row b, with pad 2, in a cache of 6 slots of which 3 are written: the next
    token (slot 3) sees slot 2 and itself:  . . x . . . | x

    Args:
      length: T.
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
