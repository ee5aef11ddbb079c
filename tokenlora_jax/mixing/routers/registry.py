"""Routers by name."""

from __future__ import annotations

from collections.abc import Callable
import inspect
from typing import Any, TypeVar

from tokenlora_jax.config import InputError, check_choice, nearest
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.shaping import SHAPING, shape_gates

MakeRouter = TypeVar("MakeRouter", bound=Callable[..., Router])

# The maker of each router, and how its paper shapes the gates.
_MAKERS: dict[str, tuple[Callable[..., Router], dict[str, float]]] = {}


def register_router(
  name: str, **shaping: float
) -> Callable[[MakeRouter], MakeRouter]:
  """Makes a function (or a class) that builds a router known by name.

  Its parameters become the router's settings. The latest to take a name wins,
  so a notebook cell may run twice.

  Args:
    name: for `make_router`.
    **shaping: how its gates are shaped where `make_router` is not told
      otherwise: `top_k` (all, where there are no more experts),
      `temperature`, `threshold`, `smoothing`.

  Example:
    >>> import jax
    >>> from tokenlora_jax.mixing.routers import ConstantRouter
    >>> @register_router("first-of-two")
    ... def first_of_two():
    ...   return ConstantRouter(jax.numpy.array([1.0, 0.0]))
    >>> make_router("first-of-two").experts
    2
  """

  def register(make: MakeRouter) -> MakeRouter:
    _MAKERS[name] = make, shaping
    return make

  return register


def router_settings(name: str) -> tuple[str, ...]:
  """Returns the names of a router's own settings, without the shaping.

  Raises:
    InputError: there is no such router.

  Example:
    >>> router_settings("fixed")
    ('gates',)
  """
  check_choice("router", name, sorted(_MAKERS))
  return tuple(inspect.signature(_MAKERS[name][0]).parameters)


def router_defaults(name: str) -> dict[str, Any]:
  """Returns the defaults of a router's settings.

  Args:
    name: the router's.

  Returns:
    By setting; those without a default are not in it.

  Raises:
    InputError: there is no such router.

  Example:
    >>> router_defaults("posterior")
    {'prior': 'uniform', 'evidence': 'answer', 'share': 0.0}
  """
  check_choice("router", name, sorted(_MAKERS))
  parameters = inspect.signature(_MAKERS[name][0]).parameters.values()
  return {p.name: p.default for p in parameters if p.default is not p.empty}


def make_router(name: str, **settings: Any) -> Router:
  """Makes a router by name.

  Args:
    name: such as `uniform` or `centroid`; `RouterConfig` lists all of ours.
    **settings: what that router takes, and what shapes the gates of any:
      `top_k`, `temperature`, `threshold` and `smoothing` (see `shape_gates`);
      left out or None, they are the router's own. Where a router takes one
      of these names itself, it means what it means there.

  Returns:
    The router.

  Raises:
    InputError: no such router or setting, a setting left out, or a bad value.

  Example:
    >>> make_router("fixed", gates=[0.75, 0.25]).gates(1, (), None).tolist()
    [[0.75, 0.25]]
  """
  allowed = router_settings(name)
  every = [*allowed, *SHAPING]
  for setting in settings:
    if setting not in every:
      raise InputError(
        f"router {name}: {setting!r} is not a setting; it has "
        f"{', '.join(every)}{nearest(setting, every)}"
      )
  make, shaping = _MAKERS[name]
  # A router's own setting may have the name of one that shapes gates.
  shapes = [k for k in SHAPING if k not in allowed]
  told = {k: settings.pop(k) for k in shapes if k in settings}
  shaping = shaping | {k: v for k, v in told.items() if v is not None}
  missing = [
    parameter.name
    for parameter in inspect.signature(make).parameters.values()
    if parameter.default is parameter.empty and parameter.name not in settings
  ]
  if missing:
    raise InputError(f"router {name}: needs {', '.join(missing)}")
  router = make(**settings)
  if told.get("top_k") is None and "top_k" in shaping:
    # A paper's k is for as many experts as it had, or more.
    shaping = shaping | {"top_k": min(shaping["top_k"], router.experts)}
  return shape_gates(router, **shaping)
