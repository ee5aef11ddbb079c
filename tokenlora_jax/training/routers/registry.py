"""The registry of fits, by the name of their router."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Shaped
import numpy as np
from rich.console import Console

from tokenlora_jax.config import Config, check_choice
from tokenlora_jax.data.rows import Row
from tokenlora_jax.mixing.routers import Embeds
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters


@dataclasses.dataclass(frozen=True)
class Work:
  """The inputs of a fit.

  Attributes:
    config: optimizer, rows a step, length and seed; its `data.tasks` are the
      experts, in their order.
    base: with stacked layers, on the mesh.
    adapters: the experts.
    mesh: the devices.
    batches: endless, arrays [E, B, T], as `batches.batches` gives them.
    rows: training rows of each expert, whose texts are embedded.
    encoder: makes the encoder of the kind `config.router.encoder`.
    console: shows progress.
  """

  config: Config
  base: Llama
  adapters: Adapters
  mesh: Mesh
  batches: Iterable[Mapping[str, Any]]
  rows: Sequence[Sequence[Row]]
  encoder: Callable[[], Embeds]
  console: Console


# Returns the router settings that the arrays need, and the fitted arrays.
Fit = Callable[
  [Work], tuple[dict[str, Any], dict[str, Shaped[np.ndarray, "..."]]]
]

_FITS: dict[str, Fit] = {}


def register_fit(name: str) -> Callable[[Fit], Fit]:
  """Registers a function as the fit of a router.

  The function returns (settings, arrays): the router settings that the arrays
  need, as JSON values, and the arrays by name.

  Args:
    name: of the router; a second function of one name replaces the first.

  Example:
    >>> @register_fit("nothing")
    ... def nothing(work):
    ...   return {}, {}
    >>> get_fit("nothing") is nothing
    True
  """

  def register(fit: Fit) -> Fit:
    _FITS[name] = fit
    return fit

  return register


def get_fit(name: str) -> Fit:
  """Returns the fit of a router.

  Args:
    name: of the router.

  Raises:
    InputError: there is no such router, or it has nothing to fit.
  """
  check_choice("--fit-router", name, sorted(_FITS))
  return _FITS[name]
