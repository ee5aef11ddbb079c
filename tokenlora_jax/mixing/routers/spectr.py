"""SpectR: weighs adapters by the length of their output for each input.

Fleshman and Van Durme, "SpectR: Dynamically Composing LM Experts with Spectral
Routing" (2025).

Axis letters: B batch, T length, E experts, R rank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from tokenlora_jax.mixing.routers.position import PositionRouter, make_table
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import Adapters, Lora


def output_factors(lora: Lora) -> Float[np.ndarray, "E M R"]:
  """Computes T_e with |B_e z| = |T_e z| for all z [R].

  B_e = Q_e T_e by QR, and Q_e preserves lengths. The Gram matrix B_e' B_e would
  give the same lengths, but would lose digits to squaring.

  Args:
    lora: the adapters of one projection, numpy arrays.

  Returns:
    float32[E, min(R, out), R].

  Example:
    >>> b = np.array([[[3.0, 4.0]]])
    >>> abs(output_factors(Lora(np.ones((1, 1, 2)), b, np.ones(1)))).tolist()
    [[[5.0]]]
  """
  return np.linalg.qr(np.swapaxes(lora.b, 1, 2))[1].astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectrRouter(PositionRouter):
  """gates = softmax(|S_e V_e' h|), U_e S_e V_e' = B_e A_e.

  U_e preserves lengths, so the score is |B_e A_e h|, the length of the
  adapter's output before scaling. A_e h is computed anyway. Prototypes are
  `output_factors`.
  """

  def position_gates(self, prototype, lora, x, low):
    out = jnp.einsum("bter,esr->btes", low, prototype, precision="highest")
    return jax.nn.softmax(jnp.linalg.norm(out, axis=-1), axis=-1)


@register_router("spectr", top_k=4)
def spectr(adapters: Adapters) -> SpectrRouter:
  """Makes SpectR's router (Fleshman, Van Durme, 2025), which needs no training.

  Args:
    adapters: the experts.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> spectr(adapters).prototypes[0]["q"].shape
    (2, 4, 4)
  """
  return SpectrRouter(make_table(adapters, output_factors))
