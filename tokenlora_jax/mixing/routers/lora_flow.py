"""LoRA-Flow: linear gates in the layers, trained with frozen adapters.

Wang et al., "LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in
Generative Tasks" (2024).

Axis letters: B batch, T length, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax
import numpy as np

from tokenlora_jax.mixing.routers.position import (
  PositionRouter,
  linear,
  read_table,
)
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import Adapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFlowRouter(PositionRouter):
  """gates = softmax(W h) + b (Wang et al., 2024, eq. 4).

  h is the input of a projection. Each adapted projection has its own W and b;
  the paper has one pair per layer, which reads the layer's input. Because of b
  a gate may be negative, and gates need not sum to 1.

  Prototypes are {weights: float32[E, in], bias: float32[E]}.
  """

  may_be_negative = True

  def position_gates(self, prototype, lora, x, low):
    logits = linear(x, prototype["weights"])
    return jax.nn.softmax(logits, axis=-1) + prototype["bias"]


@register_router("lora-flow")
def lora_flow(
  adapters: Adapters, arrays: Mapping[str, np.ndarray]
) -> LoraFlowRouter:
  """Makes LoRA-Flow's router (Wang et al., 2024).

  Args:
    adapters: the experts.
    arrays: the fitted arrays, `layers.I.PROJECTION.weights`, float32[E, in],
      and `layers.I.PROJECTION.bias`, float32[E].

  Raises:
    InputError: the arrays do not fit the experts.

  Example:
    >>> from tokenlora_jax.model.lora import Lora
    >>> lora = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
    >>> arrays = {
    ...   "layers.0.q.weights": np.zeros((2, 4)),
    ...   "layers.0.q.bias": np.array([0.25, -0.75]),
    ... }
    >>> router = lora_flow(Adapters(("a", "b"), ({"q": lora},)), arrays)
    >>> x = np.ones((1, 1, 4))
    >>> router.position_gates(router.prototypes[0]["q"], lora, x, None).tolist()
    [[[0.75, -0.25]]]
  """

  def shapes(lora):
    experts = len(adapters.names)
    return {"weights": (experts, lora.a.shape[-1]), "bias": (experts,)}

  return LoraFlowRouter(read_table("lora-flow", adapters, arrays, shapes))
