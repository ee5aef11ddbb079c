"""X-LoRA: a first pass of the base alone computes the gates of all layers.

Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts" (2024).

Axis letters: B batch, T length, D width of the base, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.routers.position import (
  PositionRouter,
  linear,
  read_table,
)
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import Adapters


def classify(
  prototype: Mapping[str, Float[Array, "..."]],
  hidden: Float[Array | np.ndarray, "B T D"],
) -> Float[Array, "B T E"]:
  """Computes the gates of one projection: softmax(W h + b), in float32.

  Args:
    prototype: {weights: float32[E, D], bias: float32[E]}.
    hidden: h, [B, T, D].

  Returns:
    float32[B, T, E].

  Example:
    >>> from jax import numpy as jnp
    >>> bias = jnp.log(jnp.array([0.25, 0.75]))
    >>> prototype = {"weights": jnp.zeros((2, 3)), "bias": bias}
    >>> classify(prototype, np.ones((1, 1, 3))).round(3).tolist()
    [[[0.25, 0.75]]]
  """
  logits = linear(hidden, prototype["weights"]) + prototype["bias"]
  return jax.nn.softmax(logits, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class XLoraGates(PositionRouter):
  """Gates known before the layers run; prototypes are the gates [B, T, E]."""

  @property
  def experts(self):
    return jax.tree.leaves(self.table)[0].shape[-1]

  def position_gates(self, prototype, lora, x, low):
    return prototype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class XLoraRouter(PositionRouter):
  """gates = softmax(W h + b), h the base's last hidden state (Buehler, 2024).

  The base reads every token twice, the first time without adapters to compute
  h: twice the work, and a second cache. Each adapted projection has its own W
  and b.

  Prototypes are {weights: float32[E, D], bias: float32[E]}.
  """

  looks_first = True

  def look(self, hidden):
    for layer in self.table:
      for known in layer.values():
        if known["weights"].shape[-1] != hidden.shape[-1]:
          raise InputError(
            f"router x-lora: weights of width {known['weights'].shape[-1]}, but"
            f" the base's hidden states have {hidden.shape[-1]}"
          )
    return XLoraGates(
      tuple(
        {name: classify(known, hidden) for name, known in layer.items()}
        for layer in self.table
      )
    )


@register_router("x-lora")
def x_lora(adapters: Adapters, arrays: Mapping[str, np.ndarray]) -> XLoraRouter:
  """Makes X-LoRA's router (Buehler and Buehler, 2024).

  Args:
    adapters: the experts.
    arrays: the fitted arrays, `layers.I.PROJECTION.weights`, float32[E, D], and
      `layers.I.PROJECTION.bias`, float32[E].

  Raises:
    InputError: the arrays do not fit the experts.

  Example:
    >>> from tokenlora_jax.model.lora import Lora
    >>> lora = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
    >>> arrays = {
    ...   "layers.0.q.weights": np.zeros((2, 3)),
    ...   "layers.0.q.bias": np.log([0.25, 0.75]),
    ... }
    >>> router = x_lora(Adapters(("a", "b"), ({"q": lora},)), arrays)
    >>> router.look(np.ones((1, 1, 3))).prototypes[0]["q"].tolist()
    [[[0.25, 0.75]]]
  """

  def shapes(lora):
    experts = len(adapters.names)
    return {"weights": (experts, None), "bias": (experts,)}

  return XLoraRouter(read_table("x-lora", adapters, arrays, shapes))
