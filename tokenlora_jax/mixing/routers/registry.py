"""The registry of routers, by name."""

from __future__ import annotations

from collections.abc import Callable
import inspect
from typing import Any, TypeVar

from tokenlora_jax.config import InputError, check_choice, nearest
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.shaping import SHAPING, shape_gates

MakeRouter = TypeVar("MakeRouter", bound=Callable[..., Router])

# The function that makes each router, and its paper's shaping of the gates.
_MAKERS: dict[str, tuple[Callable[..., Router], dict[str, float]]] = {}


def register_router(
  name: str, **shaping: float
) -> Callable[[MakeRouter], MakeRouter]:
  """Registers a function (or a class) that makes a router under a name.

  Its parameters become the router's settings. A second registration of a name
  replaces the first, so a notebook cell may run twice.

  Args:
    name: the name for `make_router`.
    **shaping: the router's own defaults of `top_k` (capped at the number of
      experts), `temperature`, `threshold` and `smoothing`.

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
  """Returns the names of a router's own settings, without shaping.

  Args:
    name: the router's name.

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
    name: the router's name.

  Returns:
    {setting: default}, without the settings that have no default.

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
    **settings: the router's own settings, and those that shape any router's
      gates: `top_k`, `temperature`, `threshold` and `smoothing` (see
      `shape_gates`). One that is left out or None has the router's default. If
      a router has a setting of one of these names, that one is set.

  Returns:
    The router.

  Raises:
    InputError: there is no such router or setting, a required setting is left
      out, or a value is not allowed.

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
  # A router's own setting may share its name with one that shapes gates.
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
    # A paper's k was chosen for its number of experts, which may be larger.
    shaping = shaping | {"top_k": min(shaping["top_k"], router.experts)}
  return shape_gates(router, **shaping)
