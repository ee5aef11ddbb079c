"""Routers with constant gates, the same for every text.

  base 0 0   sum 1 1   uniform .5 .5   one-hot 0 1   fixed .25 .75

`one-hot` on the expert of the prompt's own task is the oracle. What the paper's
code calls uniform is `sum`; `uniform` here is the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import InputError, check_choice
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers.registry import register_router

_UNBOUND = (
  "router: how many experts? give experts= or names=, or bind it to a bank"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstantRouter(Router):
  """The same gates for every sequence.

  Attributes:
    values: float32[E], the gates.

  Example:
    >>> ConstantRouter(jnp.array([1.0, 0.0])).gates(2, (), None).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
  """

  values: Float[Array, " E"]

  @property
  def experts(self) -> int:
    return self.values.shape[0]

  @property
  def may_be_zero(self) -> bool:
    return not np.any(self.values)

  @property
  def may_be_negative(self) -> bool:
    return bool(np.any(np.asarray(self.values) < 0))

  def gates(self, batch, observation, seen):
    return jnp.broadcast_to(self.values, (batch, self.experts))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class UnboundRouter(Router):
  """A constant router that is not bound to a bank yet.

  Attributes:
    values_for: maps the experts' names to their gates, float32[E].
  """

  values_for: Callable[[Sequence[str]], Float[np.ndarray, " E"]]

  @property
  def experts(self) -> int:
    raise InputError(_UNBOUND)

  def bind(self, names):
    return ConstantRouter(jnp.asarray(self.values_for(names), jnp.float32))

  def gates(self, batch, observation, seen):
    raise InputError(_UNBOUND)


def _constant(
  values_for: Callable[[Sequence[str]], Float[np.ndarray, " E"]],
  experts: object,
  names: Sequence[str],
) -> Router:
  router = UnboundRouter(values_for)
  if experts is None:
    return router.bind(tuple(names)) if names else router
  if not isinstance(experts, int) or experts < 1:
    raise InputError(
      f"router.experts: {experts!r} is not allowed; want a number of at least 1"
    )
  bound = router.bind(tuple(names) or tuple(map(str, range(experts))))
  if bound.experts != experts:
    raise InputError(
      f"router.experts: {experts} experts, but {len(names)} names"
    )
  return bound


@register_router("base")
def base(experts: int | None = None, names: Sequence[str] = ()) -> Router:
  """Gates of 0: the base model alone.

  Args:
    experts: E; if left out, a bank's `bind` sets it.
    names: the experts' names, instead of `experts`.

  Example:
    >>> base(experts=2).gates(1, (), None).tolist()
    [[0.0, 0.0]]
  """
  return _constant(lambda names: np.zeros(len(names)), experts, names)


@register_router("sum")
def all_summed(experts: int | None = None, names: Sequence[str] = ()) -> Router:
  """Gates of 1: every adapter at full strength.

  Args:
    experts: E; if left out, a bank's `bind` sets it.
    names: the experts' names, instead of `experts`.

  Example:
    >>> all_summed(experts=2).gates(1, (), None).tolist()
    [[1.0, 1.0]]
  """
  return _constant(lambda names: np.ones(len(names)), experts, names)


@register_router("uniform")
def uniform(experts: object = None, names: Sequence[str] = ()) -> Router:
  """Gates of 1/E: the mean of the adapters.

  Args:
    experts: E; if left out, a bank's `bind` sets it.
    names: the experts' names, instead of `experts`.

  Example:
    >>> uniform(experts=2).gates(1, (), None).tolist()
    [[0.5, 0.5]]
  """
  return _constant(
    lambda names: np.full(len(names), 1 / len(names)), experts, names
  )


@register_router("one-hot")
def one_hot(
  expert: str | int, experts: int | None = None, names: Sequence[str] = ()
) -> Router:
  """A gate of 1 for one expert: that adapter alone.

  Args:
    expert: its name, or its index in the bank, from 0.
    experts: E; if left out, a bank's `bind` sets it.
    names: the experts' names, instead of `experts`.

  Raises:
    InputError: there is no such expert.

  Example:
    >>> one_hot("b", names=["a", "b"]).gates(1, (), None).tolist()
    [[0.0, 1.0]]
  """

  def values_for(names: Sequence[str]) -> Float[np.ndarray, " E"]:
    if isinstance(expert, str):
      check_choice("router.expert", expert, names)
      return np.eye(len(names))[list(names).index(expert)]
    if not isinstance(expert, int) or not 0 <= expert < len(names):
      raise InputError(
        f"router.expert: {expert!r} is not allowed; want 0 to {len(names) - 1}"
        f" or one of {', '.join(names)}"
      )
    return np.eye(len(names))[expert]

  return _constant(values_for, experts, names)


@register_router("fixed")
def fixed(gates: object) -> Router:
  """The given gates, which need not sum to 1.

  Args:
    gates: one number per expert.

  Raises:
    InputError: `gates` is not a list of finite numbers.

  Example:
    >>> fixed([0.25, 0.75]).gates(1, (), None).tolist()
    [[0.25, 0.75]]
  """
  try:
    values = np.asarray(gates, np.float32)
  except (TypeError, ValueError):
    values = np.empty(0)
  if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
    raise InputError(
      f"router.gates: {gates!r} is not allowed; want one finite number an "
      "expert"
    )
  return ConstantRouter(jnp.asarray(values))
