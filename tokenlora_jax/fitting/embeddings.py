"""Fits of routers that compare texts: all they need is the texts' vectors.

Axis letters: n texts of an expert, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenlora_jax.fitting.registry import Fit, Work, register_fit
from tokenlora_jax.mixing import routers


def fit_embeddings(
  fit: Callable[[Sequence[np.ndarray]], dict[str, np.ndarray]],
) -> Fit:
  """Returns the fit that gives a function the vectors of each expert's texts.

  Args:
    fit: turns a list of float32[n, D_enc], one an expert, into arrays.
  """

  def run(work: Work):
    encoder, kind = work.encoder(), work.config.router.encoder
    count = sum(map(len, work.texts))
    with work.console.status(f"{kind} vectors of {count} texts"):
      vectors = [encoder.embed(texts) for texts in work.texts]
    return {"encoder": kind}, fit(vectors)

  return run


# Routers whose fit is a function of vectors, where there is such a function.
for _router, _function in {
  "centroid": "fit_centroids",
  "ariadne": "fit_ariadne",
  "lorauter": "fit_lorauter",
  "hilora": "fit_hilora",
}.items():
  if hasattr(routers, _function):
    register_fit(_router)(fit_embeddings(getattr(routers, _function)))
