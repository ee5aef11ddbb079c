"""The trained top-k gate of sparse mixtures of experts, over frozen adapters.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
Mixture-of-Experts Layer" (2017); Fedus et al., "Switch Transformers" (2022).

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
class SwitchRouter(PositionRouter):
  """gates = top-k of softmax(W h) (Shazeer et al., 2017, eq. 3).

  h is a projection's input. The k gates are scaled to sum to 1, as in Shazeer
  et al., so with k = 1 an adapter acts as strongly as in training. Fedus et al.
  (2022, eq. 2) keep the gate of the whole softmax instead.

  Prototypes are {weights: float32[E, in]}.
  """

  def position_gates(self, prototype, lora, x, low):
    return jax.nn.softmax(linear(x, prototype["weights"]), axis=-1)


@register_router("switch", top_k=1)
def switch(
  adapters: Adapters, arrays: Mapping[str, np.ndarray]
) -> SwitchRouter:
  """Makes a trained linear gate (Shazeer et al., 2017; Fedus et al., 2022).

  Args:
    adapters: the experts.
    arrays: the fitted arrays, `layers.I.PROJECTION.weights`, float32[E, in].

  Raises:
    InputError: the arrays do not fit the experts.

  Example:
    >>> from tokenlora_jax.model.lora import Lora
    >>> lora = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
    >>> arrays = {"layers.0.q.weights": np.array([[0.0] * 4, [1.0] * 4])}
    >>> router = switch(Adapters(("a", "b"), ({"q": lora},)), arrays)
    >>> x = np.ones((1, 1, 4))
    >>> router.position_gates(router.prototypes[0]["q"], lora, x, None).tolist()
    [[[0.018, 0.982]]]
  """

  def shapes(lora):
    return {"weights": (len(adapters.names), lora.a.shape[-1])}

  return SwitchRouter(read_table("switch", adapters, arrays, shapes))
