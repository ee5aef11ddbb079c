"""Routers against plain numpy, by name, and under jit."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import make_encoder

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import (
  centroids,
  make_router,
  register_router,
  sharpened_softmax,
)

run = jax.jit(lambda router, *rest: router.gates(*rest), static_argnums=1)
NAMES = ("gsm8k", "arc", "code", "squad")


def numpy_gates(vectors, table, sharpen):
  """The paper's rule, one number at a time."""
  rows = []
  for vector in np.asarray(vectors, np.float64):
    s = [
      vector @ c / math.dist(vector, 0 * vector) / math.dist(c, 0 * c)
      for c in table
    ]
    s[s.index(max(s))] *= sharpen
    rows.append([math.exp(x) / sum(map(math.exp, s)) for x in s])
  return np.array(rows)


@pytest.mark.parametrize(
  ("similarities", "expected"),
  [
    ((0.60, 0.30, 0.20, 0.25), (0.740881, 0.090726, 0.082092, 0.086301)),
    ((0.50, 0.49, 0.20, 0.20), (0.644534, 0.142384, 0.106541, 0.106541)),
    ((0.49, 0.50, 0.20, 0.20), (0.142384, 0.644534, 0.106541, 0.106541)),
    ((-0.02, -0.10, -0.05, -0.08), (0.249336, 0.244399, 0.256929, 0.249336)),
  ],
)
def test_sharpened_softmax_gives_the_worked_gates(similarities, expected):
  gates = sharpened_softmax(jnp.array(similarities), 4.0)
  np.testing.assert_allclose(gates, expected, atol=1e-6)


def test_sharpened_softmax_bound_and_ties():
  most = math.exp(4) / (math.exp(4) + 3)
  assert round(most, 3) == 0.948
  reached = sharpened_softmax(jnp.array([0.0, 1.0, 0.0, 0.0]), 4.0)
  np.testing.assert_allclose(reached[1], most, atol=1e-6)
  drawn = jax.random.uniform(jax.random.key(0), (500, 4))
  assert sharpened_softmax(drawn, 4.0).max() <= most
  # Only the first of equals is multiplied, as argmax finds it.
  tied = sharpened_softmax(jnp.array([0.1, 0.5, 0.5]), 4.0)
  total = math.exp(0.1) + math.exp(2) + math.exp(0.5)
  np.testing.assert_allclose(tied[1:], np.exp([2, 0.5]) / total, atol=1e-6)


def test_text_centroid_matches_numpy():
  encoder = make_encoder()
  texts = [["aa", "ab ba"], ["zz zz z"], ["m", "no", "mon"]]
  table = centroids(encoder, texts)
  # The mean as it is, not made of length 1 again.
  by_hand = [sum(encoder.embed([t])[0] for t in e) / len(e) for e in texts]
  np.testing.assert_allclose(table, by_hand, atol=1e-6)
  assert table.dtype == np.float32

  router = make_router("centroid", centroids=table, encoder=encoder, sharpen=3)
  assert (router.needs, router.experts) == ("text", 3)
  asked = ["aab", "zzzz", "on", "q"]
  gates = run(router, 4, router.observe(asked), None)
  expected = numpy_gates(encoder.embed(asked), table, 3)
  np.testing.assert_allclose(gates, expected, atol=1e-5)
  assert gates.dtype == jnp.float32


def test_hidden_centroid_matches_numpy():
  rng = np.random.default_rng(0)
  table, hidden = rng.normal(size=(4, 16)), 9 * rng.normal(size=(5, 16))
  router = make_router("centroid", centroids=table, encoder="hidden")
  assert (router.needs, router.observe(["any"])) == ("hidden", ())
  gates = router.gates(5, (), jnp.asarray(hidden, jnp.float32))
  np.testing.assert_allclose(gates, numpy_gates(hidden, table, 4), atol=1e-5)


def test_two_routers_of_one_shape_share_a_trace():
  @jax.jit
  @chex.assert_max_traces(n=1)
  def gates(router, observation):
    return router.gates(2, observation, None)

  rng = np.random.default_rng(0)
  seen = []
  for seed in range(2):
    router = make_router(
      "centroid",
      centroids=rng.normal(size=(3, 8)),
      encoder=make_encoder(seed),
      sharpen=4.0 + seed,
    )
    observation = router.observe(["aba", "zo"])
    seen.append(gates(router, observation))
    expected = numpy_gates(
      router.encoder.embed(["aba", "zo"]), router.table, 4.0 + seed
    )
    np.testing.assert_allclose(seen[-1], expected, atol=1e-5)
  assert np.abs(seen[0] - seen[1]).max() > 1e-3


@pytest.mark.parametrize(
  ("name", "settings", "expected"),
  [
    ("base", {}, [0, 0, 0, 0]),
    ("sum", {}, [1, 1, 1, 1]),
    ("uniform", {}, [0.25, 0.25, 0.25, 0.25]),
    ("one-hot", {"expert": "code"}, [0, 0, 1, 0]),
    ("one-hot", {"expert": 1}, [0, 1, 0, 0]),
  ],
)
def test_constants(name, settings, expected):
  named = make_router(name, names=NAMES, **settings)
  bound = make_router(name, **settings).bind(NAMES)
  for router in (named, bound):
    assert (router.needs, router.experts) == ("nothing", 4)
    gates = jax.jit(lambda r: r.gates(3, (), None))(router)
    assert gates.dtype == jnp.float32
    np.testing.assert_array_equal(gates, [expected] * 3)
  if settings.get("expert") != "code":
    counted = make_router(name, experts=4, **settings)
    np.testing.assert_array_equal(counted.gates(1, (), None), [expected])


def test_fixed():
  router = make_router("fixed", gates=[0.4, 0.3, 0.2, 0.7]).bind(NAMES)
  np.testing.assert_allclose(
    router.gates(2, (), None), [[0.4, 0.3, 0.2, 0.7]] * 2, rtol=1e-7
  )


def test_a_router_from_outside_plugs_in_by_name():
  @register_router("longest")
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Longest(Router):
    scale: float
    needs = "text"
    experts = 2

    def observe(self, texts):
      return np.array([len(text) for text in texts])

    def gates(self, batch, observation, hidden):
      return self.scale * jnp.eye(2)[(observation > 5).astype(int)]

  router = make_router("longest", scale=3.0)
  gates = jax.jit(lambda r, o: r.gates(2, o, None))
  seen = gates(router, router.observe(["short", "longer"]))
  assert seen.tolist() == [[3.0, 0.0], [0.0, 3.0]]


TABLE = np.ones((2, 8))


@pytest.mark.parametrize(
  ("name", "settings", "told"),
  [
    ("centriod", {}, r"router: 'centriod' .*did you mean 'centroid'\?"),
    ("uniform", {"expert": 4}, r"'expert' is not .*did you mean 'experts'\?"),
    ("fixed", {}, "router fixed: needs gates"),
    ("centroid", {"sharpen": 4}, "needs centroids, encoder"),
    ("uniform", {"experts": 0}, r"router\.experts: 0 "),
    ("uniform", {"experts": "4"}, r"router\.experts: '4' "),
    ("sum", {"experts": 3, "names": NAMES}, "3 experts, but 4 names"),
    ("one-hot", {"expert": "sqad", "names": NAMES}, "did you mean 'squad'"),
    ("one-hot", {"expert": 4, "names": NAMES}, "expert: 4 .* want 0 to 3"),
    ("one-hot", {"expert": -1, "experts": 2}, "expert: -1 .* want 0 to 1"),
    ("fixed", {"gates": [0.5, float("nan")]}, "finite"),
    ("fixed", {"gates": "half"}, r"router\.gates: 'half'"),
    ("fixed", {"gates": []}, r"router\.gates: \[\]"),
    ("centroid", {"centroids": np.ones(3), "encoder": "hidden"}, r"\[3\]"),
    ("centroid", {"centroids": TABLE, "encoder": "minilm"}, "'minilm'"),
    (
      "centroid",
      {"centroids": TABLE, "encoder": "hidden", "sharpen": 0},
      r"router\.sharpen: 0 ",
    ),
    (
      "centroid",
      {"centroids": np.ones((2, 5)), "encoder": make_encoder()},
      "width 5, but the encoder gives 8",
    ),
  ],
)
def test_errors_are_one_line(name, settings, told):
  with pytest.raises(InputError, match=told) as caught:
    make_router(name, **settings)
  assert "\n" not in str(caught.value)


def test_errors_where_router_meets_bank():
  with pytest.raises(
    InputError, match="made for 2 experts, but the bank has 4"
  ):
    make_router("fixed", gates=[0.5, 0.5]).bind(NAMES)
  with pytest.raises(InputError, match="'sqad' is not one of"):
    make_router("one-hot", expert="sqad").bind(NAMES)
  unbound = make_router("uniform")
  with pytest.raises(InputError, match="how many experts"):
    unbound.gates(1, (), None)
  with pytest.raises(InputError, match="how many experts"):
    _ = unbound.experts
  router = make_router("centroid", centroids=TABLE, encoder="hidden")
  with pytest.raises(InputError, match=r"width 8, but .* have 5"):
    router.gates(1, (), jnp.ones((1, 5)))
  with pytest.raises(InputError, match="expert 1 has no texts"):
    centroids(make_encoder(), [["a"], []])


def test_a_routers_own_setting_may_have_the_name_of_a_shape():
  @register_router("own-temperature")
  def own(temperature: float = 5.0, names=("a", "b")):
    return make_router("fixed", gates=[temperature, 1.0])

  for settings, want in (({}, 5.0), ({"temperature": 0.5}, 0.5)):
    gates = make_router("own-temperature", **settings).gates(1, (), None)
    assert gates.tolist() == [[want, 1.0]]
  shaped = make_router("own-temperature", temperature=3.0, top_k=1)
  assert shaped.gates(1, (), None).tolist() == [[4.0, 0.0]]
