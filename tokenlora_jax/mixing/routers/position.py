"""Shared parts of in-layer routers, which compute gates per position.

Such a router keeps one prototype per adapted projection, {field: array}. Banks
store it under flat names:

  {"q": {"weights": array}} in layer 3  ->  layers.3.q.weights

Axis letters: B batch, T length, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.model.lora import Adapters, Lora

# The shape of each field of a prototype; None is any size.
Shapes = Mapping[str, tuple[int | None, ...]]


@dataclasses.dataclass(frozen=True)
class PositionRouter(Router):
  """A router that keeps a prototype for each adapted projection.

  Attributes:
    table: per layer {projection: prototype}, a pytree of arrays with a leading
      E.
  """

  table: tuple[Mapping[str, Any], ...]

  @property
  def experts(self) -> int:
    return jax.tree.leaves(self.table)[0].shape[0]

  @property
  def prototypes(self):
    return self.table


def linear(
  x: Float[Array | np.ndarray, "B T I"], weights: Float[Array, "E I"]
) -> Float[Array, "B T E"]:
  """Multiplies each position with one vector per expert, in float32.

  Args:
    x: [B, T, in].
    weights: float32[E, in].

  Returns:
    float32[B, T, E].

  Example:
    >>> linear(jnp.array([[[1.0, 2.0]]]), jnp.array([[3.0, 4.0]])).tolist()
    [[[11.0]]]
  """
  return jnp.einsum(
    "bti,ei->bte", x.astype(jnp.float32), weights, precision="highest"
  )


def make_table(
  adapters: Adapters, prototype: Callable[[Lora], Any]
) -> tuple[dict[str, Any], ...]:
  """Computes the prototype of each adapted projection from its adapters.

  Args:
    adapters: the experts.
    prototype: computes one from a projection's adapters, on the host.

  Returns:
    Per layer {projection: prototype}, with JAX arrays.

  Example:
    >>> lora = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
    >>> adapters = Adapters(("a", "b"), ({"q": lora},))
    >>> make_table(adapters, lambda lora: lora.scaling)[0]["q"].tolist()
    [1.0, 1.0]
  """
  return tuple(
    {
      name: jax.tree.map(jnp.asarray, prototype(jax.tree.map(np.asarray, lora)))
      for name, lora in layer.items()
    }
    for layer in adapters.layers
  )


def read_table(
  router: str,
  adapters: Adapters,
  arrays: Mapping[str, np.ndarray],
  shapes: Callable[[Lora], Shapes],
) -> tuple[dict[str, dict[str, Float[Array, "..."]]], ...]:
  """Returns the prototype of each adapted projection, from fitted arrays.

  Args:
    router: the router's name, for errors.
    adapters: the experts.
    arrays: the fitted arrays by flat name; inverts `flat_table`.
    shapes: returns the fields' shapes of a projection's prototype.

  Returns:
    Per layer {projection: {field: float32 array}}.

  Raises:
    InputError: an array is missing, has another shape, is not finite, or
      belongs to a projection that no expert adapts.

  Example:
    >>> lora = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
    >>> adapters = Adapters(("a", "b"), ({"q": lora},))
    >>> arrays = {"layers.0.q.bias": np.zeros(2)}
    >>> table = read_table("mine", adapters, arrays, lambda _: {"bias": (2,)})
    >>> table[0]["q"]["bias"].tolist()
    [0.0, 0.0]
  """
  left = dict(arrays)

  def take(name, shape):
    array = np.asarray(left.pop(name, np.empty(0)))
    fits = array.ndim == len(shape) and all(
      want in (None, size)
      for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind != "f" or not np.isfinite(array).all():
      raise InputError(
        f"router {router}: {name} has the shape {list(array.shape)}; want finite"
        f" numbers {['any' if size is None else size for size in shape]}; was it"
        " fitted for these experts?"
      )
    return jnp.asarray(array, jnp.float32)

  table = tuple(
    {
      name: {
        field: take(f"layers.{i}.{name}.{field}", shape)
        for field, shape in shapes(lora).items()
      }
      for name, lora in layer.items()
    }
    for i, layer in enumerate(adapters.layers)
  )
  if left:
    raise InputError(
      f"router {router}: {next(iter(left))} is for a map that no expert adapts;"
      " was it fitted for these experts?"
    )
  return table


def flat_table(
  table: Sequence[Mapping[str, Mapping[str, Any]]],
) -> dict[str, np.ndarray]:
  """Returns prototypes under flat names, which `read_table` inverts.

  Args:
    table: per layer {projection: {field: array}}.

  Example:
    >>> flat_table([{"q": {"bias": np.zeros(2)}}])
    {'layers.0.q.bias': array([0., 0.])}
  """

  def flat() -> Iterator[tuple[str, np.ndarray]]:
    for i, layer in enumerate(table):
      for name, prototype in layer.items():
        for field, array in prototype.items():
          yield f"layers.{i}.{name}.{field}", np.asarray(array)

  return dict(flat())
