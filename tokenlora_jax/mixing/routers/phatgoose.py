"""PHATGOOSE: compares gate vectors, each trained with its expert alone.

Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot
Generalization" (2024).

Axis letters: B batch, T length, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.mixing.routers.position import (
  PositionRouter,
  linear,
  read_table,
)
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import Adapters


def standardize(x: Float[Array | np.ndarray, "*B I"]) -> Float[Array, "*B I"]:
  """Standardises vectors to mean 0 and variance 1, in float32; 0 stays 0.

  Args:
    x: [.., in].

  Example:
    >>> standardize(jnp.array([1.0, 3.0])).tolist()
    [-1.0, 1.0]
  """
  x = x.astype(jnp.float32)
  x = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.mean(x * x, axis=-1, keepdims=True)
  # The added constant is tiny, since a gate vector may be small after training.
  return x * jax.lax.rsqrt(variance + 1e-12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhatgooseRouter(PositionRouter):
  """gates = softmax(norm(h) . norm(v_e) / sqrt(in)) (Muqeeth et al., 2024).

  h is a projection's input, v_e the expert's trained vector, norm
  `standardize`. Prototypes are {vectors: float32[E, in]}, the v_e.
  """

  def position_gates(self, prototype, lora, x, low):
    scores = linear(standardize(x), standardize(prototype["vectors"]))
    return jax.nn.softmax(scores / math.sqrt(x.shape[-1]), axis=-1)


@register_router("phatgoose", top_k=2)
def phatgoose(
  adapters: Adapters, arrays: Mapping[str, np.ndarray]
) -> PhatgooseRouter:
  """Makes PHATGOOSE's router (Muqeeth et al., 2024).

  Args:
    adapters: the experts.
    arrays: the fitted arrays, `layers.I.PROJECTION.vectors`, float32[E, in].

  Raises:
    InputError: the arrays do not fit the experts.

  Example:
    >>> from tokenlora_jax.model.lora import Lora
    >>> lora = Lora(np.ones((2, 1, 4)), np.ones((2, 1, 4)), np.ones(2))
    >>> vectors = np.array([[1.0, -1, 0, 0], [0, 0, 1, -1]])
    >>> router = phatgoose(
    ...   Adapters(("a", "b"), ({"q": lora},)), {"layers.0.q.vectors": vectors}
    ... )
    >>> x = jnp.array([[[3.0, -3, 0, 0]]])
    >>> router.position_gates(router.prototypes[0]["q"], lora, x, None).tolist()
    [[[0.881, 0.119]]]
  """

  def shapes(lora):
    return {"vectors": (len(adapters.names), lora.a.shape[-1])}

  return PhatgooseRouter(read_table("phatgoose", adapters, arrays, shapes))
