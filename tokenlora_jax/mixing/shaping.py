"""Shapes the gates of any router: top-k, temperature, threshold, smoothing.

  gates .5 .3 .2  ->  top-k 2  ->  .625 .375 0

Axis letters: B batch, T length, E experts, R rank.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokenlora_jax.config import InputError, check
from tokenlora_jax.mixing.router import Router

# The settings that `make_router` takes for any router.
SHAPING = ("top_k", "temperature", "threshold", "smoothing")


def keep_top(
  gates: Float[Array | np.ndarray, "*B E"], k: int | Int[Array, ""]
) -> Float[Array, "*B E"]:
  """Keeps the k largest gates, scaled to the sum of all; the others are 0.

  Args:
    gates: float32[.., E], at least 0.
    k: int32[], the number of gates to keep; of equal ones the first. It is
      traced, so another k does not compile again.

  Example:
    >>> keep_top(jnp.array([0.5, 0.25, 0.25]), 2).round(3).tolist()
    [0.667, 0.333, 0.0]
  """
  total = gates.sum(axis=-1, keepdims=True)
  # A gate's rank is the number of gates before it: larger ones, and equal ones
  # of smaller index.
  this, other = gates[..., :, None], gates[..., None, :]
  in_front = jnp.tri(gates.shape[-1], k=-1, dtype=bool)
  ranks = ((other > this) | ((other == this) & in_front)).sum(axis=-1)
  kept = jnp.where(ranks < k, gates, 0.0)
  left = kept.sum(axis=-1, keepdims=True)
  fewer = (left > 0) & (k < gates.shape[-1])
  return jnp.where(fewer, kept * total / left, kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shaping:
  """The settings that shape a router's gates.

  They apply in this order; a setting that is None does nothing:

  1. gates^(1 / temperature), scaled to the sum before. For a softmax this
     divides its logits by the temperature.
  2. The `top_k` largest, scaled to the sum before; the others become 0.
  3. If no gate reaches `threshold`, all become 0: the base alone.
  4. At a refresh, smoothing * old gates + (1 - smoothing) * new gates.

  Attributes:
    temperature: float32[], or None.
    threshold: float32[], or None.
    smoothing: float32[], or None.
    top_k: int32[], the number of gates to keep; or None.

  Example:
    >>> found = Shaping(temperature=jnp.float32(0.5))
    >>> found.shape(jnp.array([0.75, 0.25])).round(3).tolist()
    [0.9, 0.1]
  """

  temperature: Float[Array, ""] | None = None
  threshold: Float[Array, ""] | None = None
  smoothing: Float[Array, ""] | None = None
  top_k: Int[Array, ""] | None = None

  def shape(
    self, gates: Float[Array | np.ndarray, "*B E"]
  ) -> Float[Array | np.ndarray, "*B E"]:
    """Applies steps 1 to 3 to gates float32[.., E]."""
    total = gates.sum(axis=-1, keepdims=True)
    if self.temperature is not None:
      # The largest logit is 0, so no quotient overflows; a row of zeros has no
      # logits, and stays as it is.
      highest = gates.max(axis=-1, keepdims=True)
      logits = jnp.log(gates / jnp.where(highest > 0, highest, 1))
      sharp = jax.nn.softmax(logits / self.temperature, axis=-1)
      gates = jnp.where(total > 0, total * sharp, gates)
    if self.top_k is not None:
      gates = keep_top(gates, self.top_k)
    if self.threshold is not None:
      highest = gates.max(axis=-1, keepdims=True)
      gates = jnp.where(highest >= self.threshold, gates, 0.0)
    return gates

  def smooth(
    self,
    before: Float[Array | np.ndarray, "*B E"],
    gates: Float[Array | np.ndarray, "*B E"],
  ) -> Float[Array | np.ndarray, "*B E"]:
    """Applies step 4: old gates `before` and new `gates`, float32[.., E]."""
    if self.smoothing is None:
      return gates
    return self.smoothing * before + (1 - self.smoothing) * gates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShapedRouter(Router):
  """A router with shaped gates.

  Shapes sequence gates; for in-layer routers, per-position gates. Everything
  else is the inner router's.

  Attributes:
    router: computes the gates.
    shaping: shapes them.
  """

  router: Router
  shaping: Shaping

  @property
  def may_be_zero(self):
    return self.shaping.threshold is not None or self.router.may_be_zero

  def bind(self, names):
    if self.shaping.top_k is not None:
      top_k = int(self.shaping.top_k)
      check(
        top_k <= len(names),
        "router.top-k", top_k, f"at most the {len(names)} experts",
      )  # fmt: skip
    return dataclasses.replace(self, router=self.router.bind(names))

  def look(self, hidden):
    return dataclasses.replace(self, router=self.router.look(hidden))

  def gates(self, batch, observation, seen):
    gates = self.router.gates(batch, observation, seen)
    return gates if _by_position(self.router) else self.shaping.shape(gates)

  def position_gates(self, prototype, lora, x, low):
    gates = self.router.position_gates(prototype, lora, x, low)
    return self.shaping.shape(gates) if _by_position(self.router) else gates

  def smooth(self, before, gates):
    return self.shaping.smooth(before, self.router.smooth(before, gates))


def _own(name: str) -> property:
  return property(lambda shaped: getattr(shaped.router, name))


# Forwards every member of `Router` that is not overridden above, and any that
# is added later.
for _name in vars(Router).keys() - vars(ShapedRouter).keys():
  if not _name.startswith("_"):
    setattr(ShapedRouter, _name, _own(_name))
abc.update_abstractmethods(ShapedRouter)


def _by_position(router: Router) -> bool:
  """Returns whether only the layers choose among the experts."""
  return bool(router.prototypes) and router.needs == "nothing"


def shape_gates(
  router: Router,
  top_k: int = 0,
  temperature: float = 1.0,
  threshold: float = 0.0,
  smoothing: float = 0.0,
) -> Router:
  """Returns a router with its gates shaped; see `Shaping`.

  Args:
    router: any router.
    top_k: the number of gates to keep; 0 keeps all.
    temperature: below 1 is sharper, above 1 flatter.
    threshold: if no gate reaches it, all become 0; 0 is off.
    smoothing: weight of the old gates at a refresh; 0 is off.

  Raises:
    InputError: a value is not allowed; or the router is in-layer and smoothing
      is asked for; or its gates may be negative, and top-k or temperature is.

  Example:
    >>> from tokenlora_jax.mixing.routers import make_router
    >>> router = make_router("fixed", gates=[0.5, 0.3, 0.2])
    >>> gates = shape_gates(router, top_k=2).gates(1, (), None)
    >>> gates.round(3).tolist()
    [[0.625, 0.375, 0.0]]
  """
  check(top_k >= 0, "router.top-k", top_k, "0 (all) or more")
  check(
    0 < temperature < float("inf"),
    "router.temperature", temperature, "a finite number more than 0",
  )  # fmt: skip
  check(0 <= threshold <= 1, "router.threshold", threshold, "0 (off) to 1")
  check(0 <= smoothing < 1, "router.smoothing", smoothing, "0 <= s < 1")
  if smoothing and _by_position(router):
    raise InputError(
      f"router.smoothing: {smoothing} is not allowed; want 0, since this router"
      " decides for each position by itself"
    )
  if router.may_be_negative:
    allowed = ", since a gate of this router may be negative"
    check(top_k == 0, "router.top-k", top_k, "0 (all)" + allowed)
    check(temperature == 1, "router.temperature", temperature, "1" + allowed)
  if (top_k, temperature, threshold, smoothing) == (0, 1, 0, 0):
    return router

  def array(value, off):
    return None if value == off else jnp.float32(value)

  if temperature != 1:
    # Beyond these bounds float32 cannot hold it or its inverse.
    least = float(np.finfo(np.float32).tiny)
    temperature = min(max(temperature, least), 0.5 / least)
  shaping = Shaping(
    array(temperature, 1), array(threshold, 0), array(smoothing, 0),
    jnp.int32(top_k) if top_k else None,
  )  # fmt: skip
  return ShapedRouter(router, shaping)
