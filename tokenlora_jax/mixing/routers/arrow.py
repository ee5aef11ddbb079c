"""Arrow: weighs adapters by how strongly each one's main direction responds.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of
LoRAs" (2024).

Axis letters: B batch, T length, E experts, R rank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from tokenlora_jax.mixing.routers.position import (
  PositionRouter,
  linear,
  make_table,
)
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import Adapters, Lora


def arrow_vectors(lora: Lora) -> Float[np.ndarray, "E I"]:
  """Computes the unit input that each adapter amplifies most.

  v_e is the first right singular vector of B_e A_e (Ostapenko et al., 2024,
  section 4.1), up to its sign. With the QR factors A_e' = Q_a T_a and
  B_e = Q_b T_b it is Q_a times the first right singular vector of T_b T_a'
  [R, R], so no [out, in] array is built. If an adapter is 0, v_e is 0.

  Args:
    lora: the adapters of one projection, numpy arrays.

  Returns:
    float32[E, in].

  Example:
    >>> one = Lora(np.array([[[0.0, 2.0]]]), np.array([[[3.0]]]), np.ones(1))
    >>> abs(arrow_vectors(one)).tolist()
    [[0.0, 1.0]]
  """
  q, from_input = np.linalg.qr(np.swapaxes(lora.a, 1, 2))
  _, to_output = np.linalg.qr(np.swapaxes(lora.b, 1, 2))
  _, stretch, right = np.linalg.svd(
    to_output @ np.swapaxes(from_input, 1, 2), full_matrices=False
  )
  vectors = np.einsum("eis,es->ei", q, right[:, 0])
  return np.where(stretch[:, :1] > 0, vectors, 0).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrowRouter(PositionRouter):
  """gates = softmax(|v_e . h|), with h a projection's input.

  Prototypes are float32[E, in], the v_e of `arrow_vectors`.
  """

  def position_gates(self, prototype, lora, x, low):
    return jax.nn.softmax(jnp.abs(linear(x, prototype)), axis=-1)


@register_router("arrow", top_k=3)
def arrow(adapters: Adapters) -> ArrowRouter:
  """Makes Arrow's router (Ostapenko et al., 2024), which needs no training.

  Args:
    adapters: the experts.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> arrow(adapters).prototypes[0]["q"].shape
    (2, 64)
  """
  return ArrowRouter(make_table(adapters, arrow_vectors))
