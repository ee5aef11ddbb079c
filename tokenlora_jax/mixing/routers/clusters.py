"""Several centroids per expert: k-means over the vectors of its texts.

Axis letters: E experts, C centroids an expert, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import warnings

from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import InputError, check
from tokenlora_jax.mixing.routers.embedding import check_embeddings


def kmeans(
  embeddings: Array | np.ndarray, clusters: int, seed: int = 0
) -> Float[np.ndarray, "{clusters} D_enc"]:
  """Clusters vectors by k-means, and returns the clusters' means.

  Lloyd's iterations (1982) from k-means++ starts (Arthur and Vassilvitskii,
  2007) find a local minimum of sum_i min_c |x_i - m_c|^2. Equal inputs give
  equal means. Means are not normalised; with one cluster it is the mean of all.

  Args:
    embeddings: float[N, D_enc].
    clusters: C. If at most C vectors differ, they are the means, repeated as
      often as needed.
    seed: seeds the starts.

  Returns:
    float32[C, D_enc].

  Raises:
    InputError: there are no vectors, or no clusters.

  Example:
    >>> means = kmeans(np.array([[0.0], [1.0], [8.0], [9.0]]), 2)
    >>> sorted(means[:, 0].tolist())
    [0.5, 8.5]
  """
  # Imported here: it takes a third of a second, and only fitting needs it.
  from scipy.cluster.vq import kmeans2

  check(clusters >= 1, "router.clusters", clusters, "at least 1")
  vectors = np.asarray(embeddings, np.float64)
  if vectors.ndim != 2 or vectors.size == 0 or not np.isfinite(vectors).all():
    raise InputError(
      f"kmeans: an array of shape {list(vectors.shape)} is not allowed; want"
      " finite numbers [texts, width]"
    )
  if clusters == 1:
    return vectors.mean(axis=0, keepdims=True).astype(np.float32)
  distinct = np.unique(vectors, axis=0)
  if len(distinct) <= clusters:
    places = np.arange(clusters) % len(distinct)
    return distinct[places].astype(np.float32)
  with warnings.catch_warnings():
    # A cluster that loses all its vectors keeps its last mean.
    warnings.filterwarnings("ignore", "One of the clusters is empty")
    means, _ = kmeans2(
      vectors, clusters, iter=50, minit="++", rng=np.random.default_rng(seed)
    )
  return means.astype(np.float32)


def fit_centroids(
  embeddings_by_expert: Sequence[Float[np.ndarray, "_ D_enc"]],
  clusters: int = 1,
  seed: int = 0,
) -> Float[np.ndarray, "E {clusters} D_enc"]:
  """Computes several centroids per expert, for routers that use the nearest.

  Args:
    embeddings_by_expert: E arrays float32[N_e, D_enc], of its training texts.
    clusters: C; 1 is the mean, as in the paper's router.
    seed: seeds the k-means.

  Returns:
    float32[E, C, D_enc].

  Raises:
    InputError: an expert has no texts, or there are no clusters.

  Example:
    >>> fit_centroids([np.eye(4), np.ones((1, 4))], clusters=2).shape
    (2, 2, 4)
  """
  vectors = check_embeddings("centroids", embeddings_by_expert)
  return np.stack([kmeans(e, clusters, seed) for e in vectors])
