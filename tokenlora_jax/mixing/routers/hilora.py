"""HiLoRA: a gaussian per expert, and the most active ranks of each adapter.

Han et al., "HiLoRA: Adaptive Hierarchical LoRA Routing for Training-Free Domain
Generalization" (2025, arXiv 2510.12266).

Axis letters: B batch, T length, E experts, R rank, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.config import InputError, check
from tokenlora_jax.mixing.routers.embedding import (
  EmbeddingRouter,
  Encoder,
  check_embeddings,
  check_encoder,
  check_table,
)
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import Adapters, Lora

# The least variance, in case all texts have one vector. The numbers of a vector
# of length 1 have a mean square of 1 / D_enc.
_LEAST = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiloraRouter(EmbeddingRouter):
  """gates = softmax(mean over d of log N(x_d; mean_ed, variance_ed)).

  x is the running text's vector. An adapter is a sum of rank-one components
  b_j a_j. At each position of a projection with input h, the components with
  the largest |a_j . h| have a gate of 1, and the others have 0.

  Attributes:
    table: float32[E, D_enc], the means.
    variances: float32[E, D_enc].
    kept: per layer {projection: int32[E]}, the number of rank-one components of
      each adapter that are used.
  """

  variances: Float[Array, "E D_enc"]
  kept: tuple[Mapping[str, Int[Array, " E"]], ...]

  @property
  def prototypes(self):
    return self.kept

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("hilora_router"):
      away = self.vector(observation, seen)[:, None] - self.table
      spread = self.variances
      logs = -0.5 * (away**2 / spread + jnp.log(2 * math.pi * spread))
      return jax.nn.softmax(logs.mean(axis=-1), axis=-1)

  def position_gates(self, prototype, lora, x, low):
    del lora, x
    size = jnp.abs(low)
    # One sort finds the smallest activation that is kept. Of several components
    # with exactly that activation, the first are kept.
    last = jnp.maximum(prototype, 1)[:, None] - 1
    least = jnp.take_along_axis(
      -jnp.sort(-size, axis=-1),
      jnp.broadcast_to(last, (*size.shape[:3], 1)),
      -1,
    )
    more, equal = size > least, size == least
    left = prototype[:, None] - more.sum(axis=-1, keepdims=True)
    stays = more | (equal & (jnp.cumsum(equal, axis=-1) <= left))
    return stays.astype(jnp.float32)


def own_ranks(lora: Lora) -> Int[np.ndarray, " E"]:
  """Returns the adapters' ranks before they were padded to one R.

  Args:
    lora: the adapters of one projection.

  Returns:
    int[E], the number of rows up to the last that is not 0 in A or B.

  Example:
    >>> a = np.array([[[1.0], [2.0]], [[3.0], [0.0]]])
    >>> own_ranks(Lora(a, np.zeros_like(a), np.ones(2))).tolist()
    [2, 1]
  """
  parts = np.any(np.asarray(lora.a) != 0, axis=-1)
  parts |= np.any(np.asarray(lora.b) != 0, axis=-1)
  return (parts * np.arange(1, parts.shape[1] + 1)).max(axis=1)


@register_router("hilora", top_k=3, temperature=0.1)
def hilora(
  means: ArrayLike,
  variances: ArrayLike,
  encoder: Encoder,
  adapters: Adapters,
  rank_share: float = 0.4,
) -> HiloraRouter:
  """Makes HiLoRA's router (Han et al., 2025).

  From the paper: the gaussian likelihood of the sequence's vector picks 3
  adapters, and each token uses only the rank-one components that respond most.
  We know the paper from its abstract and reviews, so these choices are ours:

  - a diagonal covariance;
  - the mean over dimensions, at a temperature of .1. The paper's sum is that
    mean at a temperature of 1 / D_enc, whose softmax would be one-hot;
  - gates that follow the likelihood;
  - one share of components for all adapters, where the paper draws each
    adapter's number of components.

  Args:
    means: float32[E, D_enc]; see `fit_hilora`.
    variances: float32[E, D_enc].
    encoder: a text encoder for the running text, or `hidden` for the base's
      own mean last hidden state.
    adapters: the experts.
    rank_share: share of an adapter's rank-one components that a token uses.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> router = hilora(
    ...   np.eye(2), np.full((2, 2), 0.25), "hidden", Adapters(("a", "b"), ())
    ... )
    >>> print(np.asarray(router.gates(1, (), jnp.array([[1.0, 0.0]]))).round(3))
    [[0.881 0.119]]
  """
  table, spread = (
    check_table("means", means),
    check_table("variances", variances),
  )
  if spread.shape != table.shape or not (spread > 0).all():
    raise InputError(
      f"router.variances: an array of shape {list(spread.shape)} is not allowed;"
      f" want numbers more than 0 of the means' shape {list(table.shape)}"
    )
  check(0 < rank_share <= 1, "router.rank-share", rank_share, "0 < share <= 1")
  return HiloraRouter(
    jnp.asarray(table),
    check_encoder(encoder, "means", table),
    jnp.asarray(spread),
    tuple(
      {
        name: jnp.asarray(np.ceil(rank_share * own_ranks(lora)), jnp.int32)
        for name, lora in layer.items()
      }
      for layer in adapters.layers
    ),
  )


def fit_hilora(
  embeddings_by_expert: Sequence[Float[np.ndarray, "_ D_enc"]],
  shrinkage: float = 0.5,
) -> dict[str, Float[np.ndarray, "E D_enc"]]:
  """Fits the gaussians of `hilora`, one per expert.

  variance_ed = (1 - a) v_ed + a v

  v_ed is the variance among the expert's texts and v the mean of all v_ed,
  since a few texts cannot determine D_enc variances.

  Args:
    embeddings_by_expert: E arrays float32[N_e, D_enc], of training texts; the
      paper takes 20 of each.
    shrinkage: a, from 0 to 1.

  Returns:
    {"means": float32[E, D_enc], "variances": float32[E, D_enc]}.

  Raises:
    InputError: an expert has no texts.

  Example:
    >>> fit = fit_hilora([np.array([[0.0], [2.0]]), np.array([[3.0]])])
    >>> fit["means"].tolist(), fit["variances"].tolist()
    ([[1.0], [3.0]], [[0.75], [0.25]])
  """
  vectors = check_embeddings("hilora", embeddings_by_expert)
  own = np.stack([e.var(axis=0) for e in vectors])
  variances = (1 - shrinkage) * own + shrinkage * own.mean()
  return {
    "means": np.stack([e.mean(axis=0) for e in vectors]).astype(np.float32),
    "variances": np.maximum(variances, _LEAST).astype(np.float32),
  }
