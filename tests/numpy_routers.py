"""The routers' formulas, as the papers have them, one number at a time."""

import math

import numpy as np
from slow import cosine, shaped, softmax

from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.lora import Adapters


def nearest(x, centroids):
  return [max(cosine(x, c) for c in own) for own in centroids]


def centroid_gates(x, centroids):
  s = nearest(x, centroids)
  s[s.index(max(s))] *= 4
  return softmax(s)


def cbtm_gates(x, centroids, temperature=0.1, top_k=None):
  x = x / math.sqrt(x @ x)
  p = softmax(
    [
      -min(float(sum((x - c) ** 2)) for c in own) / temperature
      for own in centroids
    ]
  )
  best = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
  return np.array([p[e] if e in best else 0 for e in range(len(p))]) / sum(
    p[e] for e in best
  )


def ariadne_gates(x, centroids):
  s = nearest(x, centroids)
  return np.eye(len(s))[s.index(max(s))]


def classifier_gates(x, weights, bias):
  x = x / math.sqrt(x @ x)
  return softmax([w @ x + b for w, b in zip(weights, bias, strict=True)])


def lorauter_gates(x, tasks):
  s = np.array([max(cosine(x, t), 1e-6) for t in tasks])
  return shaped(s / sum(s), top_k=3)


def hilora_gates(x, means, variances):
  x = x / math.sqrt(x @ x)
  logs = [
    sum(
      -((a - m) ** 2) / (2 * v) - math.log(math.sqrt(2 * math.pi * v))
      for a, m, v in zip(x, mean, spread, strict=True)
    )
    / len(x)
    for mean, spread in zip(means, variances, strict=True)
  ]
  return shaped(softmax(logs), top_k=3, temperature=0.1)


def make(name, width, encoder, experts, adapters=None):
  """A router of random tables, and the same in numpy: x [D_enc] -> gates."""
  rng = np.random.default_rng(0)
  # Near each other, so that no expert gets all.
  several = 0.3 * rng.normal(size=(experts, 3, width)) / math.sqrt(width)
  several = several.astype(np.float32)
  one = several[:, 0]
  spread = rng.uniform(0.5, 2, (experts, width)) / width
  spread = spread.astype(np.float32)
  if name == "hilora":
    tables = {"means": one, "variances": spread, "adapters": adapters}
    numpy_gates = lambda x: hilora_gates(x, one, spread)  # noqa: E731
  elif name == "lorauter":
    tables, numpy_gates = {"tasks": one}, lambda x: lorauter_gates(x, one)
  elif name == "classifier":
    weights, bias = 20 * one, rng.normal(size=experts).astype(np.float32)
    tables = {"weights": weights, "bias": bias}
    numpy_gates = lambda x: classifier_gates(x, weights, bias)  # noqa: E731
  else:
    tables = {"centroids": several}
    formula = {
      "centroid": centroid_gates, "cbtm": cbtm_gates, "ariadne": ariadne_gates
    }[name]  # fmt: skip
    numpy_gates = lambda x: formula(x, several)  # noqa: E731
  return make_router(name, encoder=encoder, **tables), numpy_gates


# Those that compare vectors.
NAMES = ("centroid", "cbtm", "classifier", "ariadne", "lorauter", "hilora")
NO_ADAPTERS = Adapters(("a", "b", "c", "d", "e"), ())
