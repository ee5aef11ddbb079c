"""c-BTM's router: weighs experts by the distance from text to centroid.

Gururangan et al., "Scaling Expert Language Models with Unsupervised Domain
Discovery" (2023, arXiv 2303.14177).

Axis letters: B batch, E experts, C centroids an expert, D_enc width of an
embedding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from tokenlora_jax.mixing.routers.embedding import (
  EmbeddingRouter,
  Encoder,
  check_encoder,
  check_table,
)
from tokenlora_jax.mixing.routers.registry import register_router


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CbtmRouter(EmbeddingRouter):
  """gates = softmax(-d), d_e = min over c of |x - c_ec|^2.

  x is the running text's vector, of length 1. The paper divides d by a
  temperature, then keeps the k largest gates, scaled to sum to 1. `Shaping`
  does both, for any router.
  """

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("cbtm_router"):
      x = self.vector(observation, seen)
      table = self.table.reshape(self.experts, -1, x.shape[-1])
      squares = jnp.sum((x[:, None, None] - table) ** 2, axis=-1)
      return jax.nn.softmax(-squares.min(axis=-1), axis=-1)


@register_router("cbtm", temperature=0.1)
def cbtm(centroids: ArrayLike, encoder: Encoder) -> CbtmRouter:
  """Makes c-BTM's router: softmax(-|x - c_e|^2 / T), T = .1.

  In the paper (Gururangan et al., 2023) x is a tf-idf vector, experts are whole
  models, and the softmax mixes their predictions, as the rule `probabilities`
  does. Ours are: an encoder's vectors of length 1, adapters as experts, and
  several centroids per expert, of which the nearest counts.

  Args:
    centroids: float32[E, D_enc] or [E, C, D_enc], from the same encoder; see
      `fit_centroids`.
    encoder: a text encoder for the running text, or `hidden` for the base's
      own mean last hidden state.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> import numpy as np
    >>> from tokenlora_jax.mixing.routers import make_router
    >>> router = make_router("cbtm", centroids=0.5 * np.eye(2), encoder="hidden")
    >>> print(np.asarray(router.gates(1, (), jnp.array([[3.0, 3.3]]))).round(3))
    [[0.338 0.662]]
  """
  table = check_table("centroids", centroids, several=True)
  return CbtmRouter(
    jnp.asarray(table), check_encoder(encoder, "centroids", table)
  )
