"""Routers for whole sequences, and what they are fitted with, against numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy_routers import NAMES, NO_ADAPTERS, cbtm_gates, make, nearest
import pytest
from slow import make_base, make_encoder, shaped, softmax

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.routers import (
  fit_ariadne,
  fit_centroids,
  fit_classifier,
  fit_hilora,
  fit_lorauter,
  kmeans,
  make_router,
)
from tokenlora_jax.model.lora import Adapters, random_adapters


@pytest.mark.parametrize("name", NAMES)
def test_gates_match_numpy(name):
  rng = np.random.default_rng(0)
  router, numpy_gates = make(name, 16, "hidden", 5, NO_ADAPTERS)
  hidden = 9 * rng.normal(size=(7, 16)).astype(np.float32)
  gates = jax.jit(lambda r, x: r.gates(7, (), x))(router, hidden)
  expected = [numpy_gates(x.astype(np.float64)) for x in hidden]
  np.testing.assert_allclose(gates, expected, atol=1e-5)
  assert (router.needs, router.experts, gates.dtype) == (
    "hidden", 5, jnp.float32
  )  # fmt: skip
  assert router.at_prompt_only == (name in ("ariadne", "lorauter"))
  # The experts do not all win the same texts, or this would show little.
  assert len(set(np.argmax(expected, axis=1))) > 2


def test_several_settings_of_shape():
  rng = np.random.default_rng(1)
  several = rng.normal(size=(5, 2, 16)).astype(np.float32) / 4
  hidden = rng.normal(size=(4, 16)).astype(np.float32)
  tables = {"centroids": several, "encoder": "hidden"}
  router = make_router("cbtm", **tables, temperature=0.3, top_k=2)
  expected = [cbtm_gates(x, several, 0.3, 2) for x in hidden]
  np.testing.assert_allclose(router.gates(4, (), hidden), expected, atol=1e-5)
  # ARIADNE's top-1 is a default, not a rule.
  router = make_router("ariadne", **tables, top_k=2, temperature=0.5)
  expected = [shaped(softmax(nearest(x, several)), 2, 0.5) for x in hidden]
  np.testing.assert_allclose(router.gates(4, (), hidden), expected, atol=1e-5)
  # Fewer experts than a paper's k are all taken.
  router = make_router("lorauter", tasks=several[:2, 0], encoder="hidden")
  assert router.bind(("a", "b")).gates(4, (), hidden).min() > 0


def test_one_centroid_an_expert_is_the_papers_router():
  table = np.random.default_rng(2).normal(size=(4, 16))
  hidden = np.random.default_rng(3).normal(size=(6, 16)).astype(np.float32)
  one, same = (
    make_router("centroid", centroids=c, encoder="hidden")
    for c in (table, table[:, None])
  )
  np.testing.assert_array_equal(
    one.gates(6, (), hidden), same.gates(6, (), hidden)
  )


def test_lorauter_takes_all_alike_where_nothing_is_similar():
  router = make_router("lorauter", tasks=-np.ones((3, 4)), encoder="hidden")
  gates = router.gates(1, (), jnp.ones((1, 4)))
  np.testing.assert_allclose(gates, [[1 / 3] * 3], atol=1e-6)


# -----------------------------------------------------------------------------
# Fitting.


def test_kmeans_finds_clusters_and_is_deterministic():
  rng = np.random.default_rng(0)
  centers = np.array([[5.0, 0, 0], [0, 5, 0], [0, 0, 5]])
  texts = (centers[:, None] + rng.normal(0, 0.1, (3, 20, 3))).reshape(-1, 3)
  means = kmeans(texts, 3, seed=1)
  assert means.dtype == np.float32
  order = means.argmax(axis=1)
  expected = texts.reshape(3, 20, 3).mean(axis=1)[order]
  np.testing.assert_allclose(means, expected, atol=1e-5)
  np.testing.assert_array_equal(means, kmeans(texts, 3, seed=1))
  np.testing.assert_array_equal(
    kmeans(texts, 1), texts.mean(axis=0, keepdims=True).astype(np.float32)
  )


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_ends_where_no_vector_is_nearer_to_another_mean(seed):
  texts = np.random.default_rng(seed).normal(size=(60, 4))
  means = kmeans(texts, 5, seed)
  distances = ((texts[:, None] - means) ** 2).sum(axis=-1)
  nearest_mean = distances.argmin(axis=1)
  for c in range(5):
    own = texts[nearest_mean == c].mean(axis=0)
    np.testing.assert_allclose(means[c], own, atol=1e-5)


def test_kmeans_repeats_where_texts_are_few():
  texts = np.array([[2.0, 0], [0, 1], [2, 0], [2, 0]])
  means = kmeans(texts, 3)
  assert means.tolist() == [[0, 1], [2, 0], [0, 1]]


def test_fits_match_numpy():
  rng = np.random.default_rng(0)
  embeddings = [rng.normal(size=(n, 6)).astype(np.float32) for n in (9, 20, 1)]
  embeddings = [e / np.linalg.norm(e, axis=1)[:, None] for e in embeddings]
  averages = [sum(e) / len(e) for e in embeddings]
  np.testing.assert_allclose(
    fit_centroids(embeddings)[:, 0], averages, atol=1e-6
  )
  np.testing.assert_allclose(
    fit_lorauter(embeddings)["tasks"], averages, atol=1e-6
  )
  several = fit_ariadne(embeddings, clusters=2, seed=5)["centroids"]
  assert (several.shape, several.dtype) == ((3, 2, 6), np.float32)
  np.testing.assert_array_equal(several[1], kmeans(embeddings[1], 2, seed=5))
  np.testing.assert_array_equal(several[2], embeddings[2][[0, 0]])
  fit = fit_hilora(embeddings, shrinkage=0.25)
  np.testing.assert_allclose(fit["means"], averages, atol=1e-6)
  own = np.array(
    [
      sum((e - mean) ** 2) / len(e)
      for e, mean in zip(embeddings, averages, strict=True)
    ]
  )
  np.testing.assert_allclose(
    fit["variances"], 0.75 * own + 0.25 * own.mean(), rtol=1e-5
  )
  # What was fitted makes a router, by the names of the arrays.
  three = Adapters(("a", "b", "c"), ())
  for name, arrays in (
    ("ariadne", fit_ariadne(embeddings)),
    ("lorauter", fit_lorauter(embeddings)),
    ("hilora", {**fit_hilora(embeddings), "adapters": three}),
    ("classifier", fit_classifier(embeddings)),
  ):
    router = make_router(name, encoder="hidden", **arrays)
    gates = router.gates(3, (), jnp.array(averages))
    assert np.argmax(gates, axis=1).tolist() == [0, 1, 2]


def test_a_classifier_is_where_the_penalised_loss_is_least():
  """Its gradient is 0, and the loss is convex: there is no other such place."""
  rng = np.random.default_rng(0)
  embeddings = [rng.normal(i / 3, 1, (n, 5)) for i, n in enumerate((9, 30, 4))]
  embeddings[0][:, 2] *= 1e-2  # Features of other sizes weigh alike.
  for e in embeddings:
    e[:, 4] = 0.5  # And one tells nothing.
  fit = fit_classifier(embeddings)
  x = np.concatenate(embeddings)
  mean, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
  weights = fit["weights"] * spread
  bias = fit["bias"] + fit["weights"] @ mean
  slope, shift = weights.copy(), np.zeros(3)
  for owner, own in enumerate(embeddings):
    for vector in own:
      z = (vector - mean) / spread
      miss = softmax(weights @ z + bias) - np.eye(3)[owner]
      slope += np.outer(miss, z)
      shift += miss
  np.testing.assert_allclose(slope, 0, atol=1e-4)
  np.testing.assert_allclose(shift, 0, atol=1e-4)
  np.testing.assert_allclose(fit["weights"][:, 4], 0, atol=1e-6)
  assert abs(weights).max() > 0.1


# -----------------------------------------------------------------------------
# HiLoRA's parts.


def test_hilora_sorts_once_and_ties_go_to_the_first():
  """Beside the obvious: each part's place in a stable order."""
  adapters = random_adapters(make_base(), experts=3, rank=6)
  router, _ = make("hilora", 8, "hidden", 3, adapters)
  rng = np.random.default_rng(1)
  # Small whole numbers, so that most rows have ties.
  low = rng.integers(-2, 3, (4, 50, 3, 6)).astype(np.float32)
  for kept in ([0, 1, 2], [3, 4, 5], [6, 6, 1]):
    found = router.position_gates(jnp.array(kept), None, None, low)
    order = np.argsort(-np.abs(low), axis=-1, kind="stable")
    places = np.argsort(order, axis=-1)
    np.testing.assert_array_equal(found, places < np.array(kept)[:, None])
  told = str(
    jax.make_jaxpr(
      lambda kept, x: router.position_gates(kept, None, None, x)
    )(jnp.array(kept), low)
  )  # fmt: skip
  assert told.count("sort[") == 1
  # Of values alone, not of their places with them.
  assert "num_keys=1" in told and "iota" not in told


def test_hilora_keeps_the_parts_that_answer_most():
  """Of each adapter's own: two of rank 3 stand beside two of rank 5."""
  adapters = random_adapters(make_base(), experts=4, rank=5)
  small = np.array([3, 3, 5, 5])
  real = np.arange(5) < small[:, None]
  padded = tuple(
    {
      name: dataclasses.replace(
        lora, a=lora.a * real[..., None], b=lora.b * real[..., None]
      )
      for name, lora in layer.items()
    }
    for layer in adapters.layers
  )
  adapters = dataclasses.replace(adapters, layers=padded)
  low = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  low *= real
  router, _ = make("hilora", 8, "hidden", 4, adapters)
  maps = [sorted(layer) for layer in router.prototypes]
  assert maps == [["q", "v"], ["q", "v"]]
  for known in router.prototypes[0].values():
    found = np.asarray(router.position_gates(known, None, None, low))
    for row, parts in zip(
      found.reshape(-1, 4, 5), np.abs(low).reshape(-1, 4, 5), strict=True
    ):
      for own, gates, sizes in zip(small, row, parts, strict=True):
        count = math.ceil(0.4 * own)
        best = sorted(range(5), key=lambda j: -sizes[j])[:count]
        assert gates.tolist() == [float(j in best) for j in range(5)]
    # A share of 0.4: two of 5, and two of 3 (of which 1.2 is the share).
    assert known.tolist() == [2, 2, 2, 2]
  whole = make_router(
    "hilora", means=np.eye(4), variances=np.ones((4, 4)), encoder="hidden",
    adapters=adapters, rank_share=1.0,
  )  # fmt: skip
  assert whole.prototypes[0]["q"].tolist() == small.tolist()
  some = make_router(
    "hilora", means=np.eye(4), variances=np.ones((4, 4)), encoder="hidden",
    adapters=adapters, rank_share=0.3,
  )  # fmt: skip
  assert some.prototypes[0]["q"].tolist() == [1, 1, 2, 2]


# -----------------------------------------------------------------------------
# Bad settings.

HIDDEN = {"encoder": "hidden"}


@pytest.mark.parametrize(
  ("name", "settings", "told"),
  [
    ("cbtm", {"centroids": np.ones(3), **HIDDEN}, r"router\.centroids: .*\[3\]"),
    ("ariadne", {"centroids": np.ones((1, 2, 3, 4)), **HIDDEN}, "clusters, wid"),
    ("ariadne", {"centroids": [[np.nan]], **HIDDEN}, "want finite numbers"),
    ("cbtm", {"centroids": np.ones((2, 8)), "encoder": "minilm"}, "'minilm'"),
    (
      "ariadne",
      {"centroids": np.ones((2, 3, 5)), "encoder": make_encoder()},
      "width 5, but the encoder gives 8",
    ),
    ("lorauter", {"tasks": np.ones((2, 2, 8)), **HIDDEN}, r"router\.tasks: "),
    ("lorauter", HIDDEN, "router lorauter: needs tasks"),
    (
      "classifier",
      {"weights": np.ones((3, 8)), "bias": np.ones(2), **HIDDEN},
      r"router\.bias: .*\[2\] .* here \[3\]",
    ),
    ("lorauter", {"task": 1}, r"'task' is not .*did you mean 'tasks'\?"),
    ("logo", {"adapters": NO_ADAPTERS}, "router logo: the adapters adapt noth"),
    ("logo", {"adapters": NO_ADAPTERS, "measure": "nrom"}, r"did you mean 'norm'\?"),
    (
      "hilora",
      {"means": np.ones((2, 3)), "variances": np.ones((2, 4))},
      r"router\.variances: .*\[2, 4\] .* means' shape \[2, 3\]",
    ),
    (
      "hilora",
      {"means": np.ones((2, 3)), "variances": np.zeros((2, 3))},
      r"router\.variances: .* more than 0",
    ),
    (
      "hilora",
      {
        "means": np.ones((2, 3)), "variances": np.ones((2, 3)),
        "rank_share": 1.5,
      },
      r"router\.rank-share: 1\.5 ",
    ),
  ],
)  # fmt: skip
def test_errors_are_one_line(name, settings, told):
  if name == "hilora":
    settings = {"encoder": "hidden", "adapters": NO_ADAPTERS, **settings}
  with pytest.raises(InputError, match=told) as caught:
    make_router(name, **settings)
  assert "\n" not in str(caught.value)


def test_errors_of_fits_are_one_line():
  for fit in (
    fit_centroids, fit_ariadne, fit_lorauter, fit_hilora, fit_classifier
  ):  # fmt: skip
    with pytest.raises(InputError, match="expert 1 has no texts"):
      fit([np.ones((2, 3)), np.ones((0, 3))])
  with pytest.raises(InputError, match=r"router\.clusters: 0 is not allowed"):
    fit_centroids([np.ones((2, 3))], clusters=0)
  with pytest.raises(InputError, match=r"kmeans: .*\[3\]"):
    kmeans(np.ones(3), 2)
