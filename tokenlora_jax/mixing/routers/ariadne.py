"""ARIADNE: routes to the one expert whose centroid is nearest to the prompt.

Cassano et al., "ARIADNE: Agnostic Routing for Inference-time Adapter DyNamic
sElection" (2026, arXiv 2606.19079).

Axis letters: E experts, C centroids an expert, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.mixing.routers.clusters import fit_centroids
from tokenlora_jax.mixing.routers.embedding import (
  EmbeddingRouter,
  Encoder,
  check_encoder,
  check_table,
)
from tokenlora_jax.mixing.routers.registry import register_router


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AriadneRouter(EmbeddingRouter):
  """gates = softmax(s), s_e = max over c of cos(x, c_ec), of which one stays.

  x is the prompt's vector.
  """

  at_prompt_only = True

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("ariadne_router"):
      return jax.nn.softmax(self.cosines(observation, seen), axis=-1)


@register_router("ariadne", top_k=1)
def ariadne(centroids: ArrayLike, encoder: Encoder) -> AriadneRouter:
  """ARIADNE (Cassano et al., 2026): top-1 cosine, decided at the prompt.

  We know the paper from its abstract and summaries: a set of centroids of the
  embeddings of each adapter's training texts, and the adapter of the nearest.
  That they are found by k-means is ours, and so is the softmax, which matters
  where `top_k` is not 1.

  Args:
    centroids: float32[E, C, D_enc] (see `fit_ariadne`), or [E, D_enc].
    encoder: an encoder of the prompt, or `hidden` for the base's own
      mean last hidden state.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> from tokenlora_jax.mixing.routers import make_router
    >>> router = make_router(
    ...   "ariadne", centroids=np.eye(4).reshape(2, 2, 4), encoder="hidden"
    ... )
    >>> router.gates(1, (), jnp.array([[0.3, 0.0, 0.0, 0.4]])).tolist()
    [[0.0, 1.0]]
  """
  table = check_table("centroids", centroids, several=True)
  return AriadneRouter(
    jnp.asarray(table), check_encoder(encoder, "centroids", table)
  )


def fit_ariadne(
  embeddings_by_expert: Sequence[Float[np.ndarray, "_ D_enc"]],
  clusters: int = 1,
  seed: int = 0,
) -> dict[str, Float[np.ndarray, "E C D_enc"]]:
  """Fits the centroids of `ariadne`.

  Args:
    embeddings_by_expert: E arrays float32[N_e, D_enc], of training texts.
    clusters: C.
    seed: of the k-means.

  Returns:
    {"centroids": float32[E, C, D_enc]}.

  Raises:
    InputError: an expert has no texts, or there are no clusters.

  Example:
    >>> fit_ariadne([np.eye(3), np.eye(3)], 2)["centroids"].shape
    (2, 2, 3)
  """
  return {"centroids": fit_centroids(embeddings_by_expert, clusters, seed)}
