"""Fits by the name of the router that they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh
import numpy as np
from rich.console import Console

from tokenlora_jax.config import Config, check_choice
from tokenlora_jax.data.rows import Row
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters


@runtime_checkable
class Embeds(Protocol):
  """What turns texts into vectors."""

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Returns float32[N, D_enc] of N texts."""


@dataclasses.dataclass(frozen=True)
class Work:
  """What a fit is given.

  Attributes:
    config: optimizer, rows a step, length and seed; its `data.tasks` are the
      experts, in their order.
    base: with stacked layers, on the mesh.
    adapters: the experts.
    mesh: the devices.
    batches: endless, as `batches.batches` gives them.
    rows: training rows of each expert, for vectors of their texts.
    encoder: makes what embeds texts, of the kind `config.router.encoder`.
    console: where progress is shown.
  """

  config: Config
  base: Llama
  adapters: Adapters
  mesh: Mesh
  batches: Iterable[Mapping[str, Any]]
  rows: Sequence[Sequence[Row]]
  encoder: Callable[[], Embeds]
  console: Console


# Returns the router's settings that were fitted with, and the fitted arrays.
Fit = Callable[[Work], tuple[dict[str, Any], dict[str, np.ndarray]]]

_FITS: dict[str, Fit] = {}


def register_fit(name: str) -> Callable[[Fit], Fit]:
  """Makes a function the fit of a router. The latest to take a name wins.

  It returns (settings, arrays): the settings of the router that the arrays go
  with, as JSON values, and the arrays, by name.

  Args:
    name: of the router.

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

  Raises:
    InputError: there is no such router, or it has nothing to fit.
  """
  check_choice("--fit-router", name, sorted(_FITS))
  return _FITS[name]
