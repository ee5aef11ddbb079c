"""What a router is, and the registry that makes one by name.

Axis letters: B batch, D width of the base, E experts.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
import inspect
from typing import Any, Literal, TypeVar

import jax

from tokenlora_jax.config import InputError, check_choice, nearest

MakeRouter = TypeVar("MakeRouter", bound=Callable[..., "Router"])


class Router(abc.ABC):
  """Decides the gates of a batch of sequences, anew at each refresh.

  A router is a frozen dataclass registered as a JAX pytree. Its arrays are
  leaves and what is not an array is static, so two routers of one shape share
  one trace. The decoder calls `observe` on the host and `gates` in the graph.
  """

  # What it looks at: nothing, the mean of the base's last hidden states over
  # the running text, or the text itself.
  needs: Literal["nothing", "hidden", "text"] = "nothing"

  @property
  @abc.abstractmethod
  def experts(self) -> int:
    """E."""

  def bind(self, names: Sequence[str]) -> Router:
    """Returns this router for a bank of these experts.

    Args:
      names: the experts' names, in the bank's order.

    Raises:
      InputError: the router is for another number of experts.
    """
    if len(names) != self.experts:
      raise InputError(
        f"router: made for {self.experts} experts, but the bank has "
        f"{len(names)} ({', '.join(names)})"
      )
    return self

  def observe(self, texts: Sequence[str]) -> Any:
    """Turns texts into arrays for `gates`, on the host.

    Args:
      texts: the B running texts, prompts included.

    Returns:
      A pytree of numpy arrays with a leading B; () unless `needs` is `text`.
    """
    del texts
    return ()

  @abc.abstractmethod
  def gates(
    self, batch: int, observation: Any, hidden: jax.Array | None
  ) -> jax.Array:
    """Decides the gates; pure, for use under `jax.jit`.

    Args:
      batch: B.
      observation: what `observe` gave.
      hidden: float32[B, D], the mean over the running text of the base's last
        hidden states (after the final norm); None unless `needs` is `hidden`.

    Returns:
      float32[B, E].
    """


_MAKERS: dict[str, Callable[..., Router]] = {}


def register_router(name: str) -> Callable[[MakeRouter], MakeRouter]:
  """Makes a function (or a class) that builds a router known by name.

  Its parameters become the router's settings. The latest to take a name wins,
  so a notebook cell may run twice.

  Args:
    name: what `make_router` calls it.

  Example:
    >>> from tokenlora_jax.mixing.routers import ConstantRouter
    >>> @register_router("first-of-two")
    ... def first_of_two():
    ...   return ConstantRouter(jax.numpy.array([1.0, 0.0]))
    >>> make_router("first-of-two").experts
    2
  """

  def register(make: MakeRouter) -> MakeRouter:
    _MAKERS[name] = make
    return make

  return register


def make_router(name: str, **settings: Any) -> Router:
  """Makes a router by name.

  Args:
    name: `base`, `one-hot`, `uniform`, `sum`, `fixed`, `centroid`, or one that
      `register_router` added.
    **settings: what that router takes.

  Returns:
    The router.

  Raises:
    InputError: no such router or setting, a setting left out, or a bad value.

  Example:
    >>> make_router("fixed", gates=[0.75, 0.25]).gates(1, (), None).tolist()
    [[0.75, 0.25]]
  """
  check_choice("router", name, sorted(_MAKERS))
  make = _MAKERS[name]
  allowed = inspect.signature(make).parameters
  for setting in settings:
    if setting not in allowed:
      raise InputError(
        f"router {name}: {setting!r} is not a setting; it has "
        f"{', '.join(allowed) or 'none'}{nearest(setting, allowed)}"
      )
  missing = [
    setting
    for setting, parameter in allowed.items()
    if parameter.default is parameter.empty and setting not in settings
  ]
  if missing:
    raise InputError(f"router {name}: needs {', '.join(missing)}")
  return make(**settings)
