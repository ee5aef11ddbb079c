"""Fits routers that compare texts, from the texts' embeddings alone.

Axis letters: n texts of an expert, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
import numpy as np

from tokenlora_jax.config import Config
from tokenlora_jax.data.rows import Row
from tokenlora_jax.mixing.routers import (
  fit_ariadne,
  fit_centroids,
  fit_classifier,
  fit_hilora,
  fit_lorauter,
)
from tokenlora_jax.training.routers.registry import Fit, Work, register_fit

Vectors = Sequence[Float[np.ndarray, "_ D_enc"]]
Arrays = dict[str, Float[np.ndarray, "E ..."]]


def fit_embeddings(
  fit: Callable[[Vectors, Config], Arrays],
  texts: Callable[[Row], Sequence[str]] = lambda row: [row.text],
) -> Fit:
  """Returns a fit that embeds each expert's texts and passes them to `fit`.

  Args:
    fit: from float32[n, D_enc] of each expert to the router's arrays.
    texts: from a row to the texts that are embedded.

  Example:
    >>> means = fit_embeddings(lambda vectors, config: {
    ...   "centroids": np.stack([v.mean(axis=0) for v in vectors])})
  """

  def run(work: Work):
    encoder, kind = work.encoder(), work.config.router.encoder
    every = [
      [text for row in rows for text in texts(row)] for rows in work.rows
    ]
    count = sum(map(len, every))
    with work.console.status(f"{kind} vectors of {count} texts"):
      vectors = [encoder.embed(own) for own in every]
    return {"encoder": kind}, fit(vectors, work.config)

  return run


def _centroids(vectors: Vectors, config: Config) -> Arrays:
  table = fit_centroids(vectors, config.router.clusters, config.seed)
  return {"centroids": table}


def _ariadne(vectors: Vectors, config: Config) -> Arrays:
  return fit_ariadne(vectors, config.router.clusters, config.seed)


for _name, _fit in {
  "centroid": _centroids,
  "cbtm": _centroids,
  "ariadne": _ariadne,
  "lorauter": lambda vectors, config: fit_lorauter(vectors),
  "hilora": lambda vectors, config: fit_hilora(vectors),
}.items():
  register_fit(_name)(fit_embeddings(_fit))

# The classifier sees prompts first and growing texts later: train it on both.
register_fit("classifier")(
  fit_embeddings(
    lambda vectors, config: fit_classifier(vectors),
    lambda row: [row.prompt, row.text],
  )
)
