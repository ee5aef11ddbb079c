"""ARIADNE: picks the expert whose centroid is nearest to the prompt.

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
  """gates = top-1 of softmax(s), s_e = max over c of cos(x, c_ec).

  x is the prompt's vector and c_ec the C centroids of expert e.
  """

  at_prompt_only = True

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("ariadne_router"):
      return jax.nn.softmax(self.cosines(observation, seen), axis=-1)


@register_router("ariadne", top_k=1)
def ariadne(centroids: ArrayLike, encoder: Encoder) -> AriadneRouter:
  """Makes ARIADNE's router (Cassano et al., 2026): top-1 cosine at the prompt.

  The paper embeds each adapter's training texts, computes centroids, and picks
  the adapter of the nearest one. We know it from its abstract and summaries.
  The k-means is ours, and so is the softmax, which matters if `top_k` is not 1.

  Args:
    centroids: float32[E, C, D_enc] (see `fit_ariadne`), or [E, D_enc].
    encoder: a text encoder for the prompt, or `hidden` for the base's own
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
    seed: seeds the k-means.

  Returns:
    {"centroids": float32[E, C, D_enc]}.

  Raises:
    InputError: an expert has no texts, or there are no clusters.

  Example:
    >>> fit_ariadne([np.eye(3), np.eye(3)], 2)["centroids"].shape
    (2, 2, 3)
  """
  return {"centroids": fit_centroids(embeddings_by_expert, clusters, seed)}
