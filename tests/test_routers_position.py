"""Routers that decide inside the layers, against NumPy, alone and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHAPE, by_projection, draw

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.decoding import generate
from tokenlora_jax.mixing.mixture import Mixture, forward, route_layers
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import (
  arrow_vectors,
  flat_table,
  make_router,
  output_factors,
)
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, Lora

EXPERTS, RANK, NEW = 4, 3, 4
PROMPTS = [[5, 9, 40, 17, 3], [7, 2], [30, 31, 2, 33, 34, 8, 21, 11]]
# A layer may lack a map, and out may be smaller than the rank.
MAPS = (("q", "v", "down"), ("q", "o"))


def rng(*names) -> np.random.Generator:
  return np.random.default_rng([len(names), *map(ord, "".join(names))])


def make_lora(*name: str) -> Lora:
  fan_in, fan_out = SHAPE.projection_shapes[name[-1]]
  draws = rng(*name)
  a = draws.normal(size=(EXPERTS, RANK, fan_in)) / np.sqrt(fan_in)
  b = draws.normal(size=(EXPERTS, RANK, fan_out)) / np.sqrt(fan_out)
  a[1, 2:], b[1, 2:] = 0, 0  # Of a smaller rank.
  scaling = draws.uniform(1, 3, EXPERTS)
  return Lora(*(jnp.asarray(x, jnp.float32) for x in (4 * a, b, scaling)))


@pytest.fixture(scope="module")
def base():
  return Llama(SHAPE, by_projection(SHAPE, draw))


@pytest.fixture(scope="module")
def adapters():
  layers = tuple(
    {name: make_lora(str(i), name) for name in names}
    for i, names in enumerate(MAPS)
  )
  return Adapters(("a", "b", "c", "d"), layers)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def dense(lora: Lora) -> np.ndarray:
  """B_e A_e, float64[E, out, in]."""
  a, b = np.asarray(lora.a, np.float64), np.asarray(lora.b, np.float64)
  return np.swapaxes(b, 1, 2) @ a


# What each router decides at a map, float64 and one matrix at a time:
# (lora, the map's fitted arrays, x [B, T, in], hidden [B, T, D]) -> [B, T, E].


def arrow_gates(lora, fitted, x, hidden):
  vectors = np.stack([np.linalg.svd(w)[2][0] for w in dense(lora)])
  return softmax(abs(x @ vectors.T))


def spectr_gates(lora, fitted, x, hidden):
  scores = []
  for w in dense(lora):
    _, s, right = np.linalg.svd(w, full_matrices=False)
    scores.append(np.linalg.norm(x @ right.T * s, axis=-1))
  return softmax(np.stack(scores, axis=-1))


def phatgoose_gates(lora, fitted, x, hidden):
  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

  scores = norm(x) @ norm(fitted["vectors"]).T
  return softmax(scores / np.sqrt(x.shape[-1]))


def lora_flow_gates(lora, fitted, x, hidden):
  return softmax(x @ fitted["weights"].T) + fitted["bias"]


def switch_gates(lora, fitted, x, hidden):
  return softmax(x @ fitted["weights"].T)


def x_lora_gates(lora, fitted, x, hidden):
  return softmax(hidden @ fitted["weights"].T + fitted["bias"])


def linear_shapes(width):
  return {"weights": (EXPERTS, width), "bias": (EXPERTS,)}


# Router -> (reference, the shapes of its fitted arrays, its paper's top-k).
CASES = {
  "arrow": (arrow_gates, None, 3),
  "spectr": (spectr_gates, None, 4),
  "phatgoose": (
    phatgoose_gates, lambda width: {"vectors": (EXPERTS, width)}, 2,
  ),
  "lora-flow": (lora_flow_gates, linear_shapes, 0),
  "switch": (switch_gates, lambda width: {"weights": (EXPERTS, width)}, 1),
  "x-lora": (x_lora_gates, lambda _: linear_shapes(SHAPE.width), 0),
}  # fmt: skip


def fitted_arrays(name: str) -> dict[str, np.ndarray]:
  """Random arrays of a router's shapes, by flat name."""
  shapes = CASES[name][1]

  def one(i, map_name):
    width = SHAPE.projection_shapes[map_name][0]
    draws = rng(name, str(i), map_name)
    return {
      field: draws.normal(size=shape, scale=width**-0.5).astype(np.float32)
      for field, shape in shapes(width).items()
    }

  return flat_table(
    [{m: one(i, m) for m in names} for i, names in enumerate(MAPS)]
  )


def build(name: str, adapters: Adapters, **shaping) -> Router:
  settings = {} if CASES[name][1] is None else {"arrays": fitted_arrays(name)}
  return make_router(name, adapters=adapters, **settings, **shaping)


def top(gates: np.ndarray, k: int) -> np.ndarray:
  """The k largest gates, scaled to the sum of all."""
  kept = np.where(gates >= np.sort(gates)[..., -k:][..., :1], gates, 0)
  return kept * gates.sum(-1, keepdims=True) / kept.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Recording(Router):
  """Asks a router, and keeps what it was asked and said, in running order."""

  router: Router
  kept: list
  experts = EXPERTS

  def position_gates(self, prototype, lora, x, low):
    gates = self.router.position_gates(prototype, lora, x, low)
    self.kept.append(tuple(map(np.asarray, (x, gates))))
    return gates


def run(base, texts, adapters, router):
  """What a router was asked and said at each map, and the base's hidden."""
  tokens = jnp.asarray(texts)
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask(jnp.ones_like(tokens))
  hidden, _ = base(tokens, places, mask)
  if router.looks_first:
    router = router.look(hidden)
  kept = []
  gates = jnp.ones((len(texts), EXPERTS))
  base(
    tokens, places, mask,
    loras=route_layers(adapters.layers, router),
    adapt=Mixture(get_rule("exact"), gates, Recording(router, kept)),
  )  # fmt: skip
  return kept, np.asarray(hidden, np.float64)


def expected_gates(name, adapters, kept, hidden) -> list[np.ndarray]:
  """What NumPy decides at each map, in running order; no shaping."""
  arrays = {} if CASES[name][1] is None else fitted_arrays(name)
  gates = []
  maps = [(i, m) for i, names in enumerate(MAPS) for m in names]
  for (i, m), (x, _) in zip(maps, kept, strict=True):
    prefix = f"layers.{i}.{m}."
    own = {
      k.removeprefix(prefix): np.asarray(v, np.float64)
      for k, v in arrays.items()
      if k.startswith(prefix)
    }
    lora = adapters.layers[i][m]
    gates.append(CASES[name][0](lora, own, x.astype(np.float64), hidden))
  return gates


each = pytest.mark.parametrize("name", CASES)
TEXTS = [[3, 1, 40, 17, 3, 9, 9, 12], [7, 2, 20, 21, 47, 30, 5, 6]]


@each
def test_gates_inside_the_layers_match_numpy(base, adapters, name):
  """As the paper shapes them, then colder and with two left."""
  router = build(name, adapters)
  kept, hidden = run(base, TEXTS, adapters, router)
  k = CASES[name][2] or EXPERTS
  for want, (_, got) in zip(
    expected_gates(name, adapters, kept, hidden), kept, strict=True
  ):
    np.testing.assert_allclose(got, top(want, k), atol=1e-5)
    assert got.dtype == np.float32
    assert np.ptp(want, axis=(0, 1)).max() > 0.03  # They do move.
  if router.may_be_negative:
    return
  router = build(name, adapters, top_k=2, temperature=0.5)
  kept, hidden = run(base, TEXTS, adapters, router)
  for want, (_, got) in zip(
    expected_gates(name, adapters, kept, hidden), kept, strict=True
  ):
    # Gates' logarithms are the logits, but for a constant.
    cold = softmax(np.log(want) / 0.5)
    np.testing.assert_allclose(got, top(cold, 2), atol=1e-5)


@each
def test_decoding_equals_reading_the_whole_text(base, adapters, name):
  router = build(name, adapters)
  config = DecodeConfig(max_new_tokens=NEW, stop_at_eos=False)
  out = generate(base, PROMPTS, adapters, router, config)
  assert out.gates.shape == (3, NEW, EXPERTS)
  # The whole texts at once; what pads them behind is not looked at.
  size = max(map(len, PROMPTS)) + NEW
  texts = np.zeros((3, size), np.int32)
  for text, prompt, made in zip(texts, PROMPTS, out.tokens, strict=True):
    text[: len(prompt) + NEW] = [*prompt, *made]
  logits = forward(base, texts, adapters, router=router)
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  kept, hidden = run(base, texts, adapters, router)
  k = CASES[name][2] or EXPERTS
  every = expected_gates(name, adapters, kept, hidden)
  mean = np.mean([top(gates, k) for gates in every], axis=0)
  for i, prompt in enumerate(PROMPTS):
    made = slice(len(prompt) - 1, len(prompt) - 1 + NEW)
    assert log_probs[i, made].argmax(-1).tolist() == out.tokens[i].tolist()
    np.testing.assert_allclose(
      log_probs[i, made].max(-1), out.log_probs[i], atol=1e-4
    )
    # The gates told are the mean over the maps, at the position that was read.
    np.testing.assert_allclose(out.gates[i], mean[i, made], atol=1e-5)


def test_arrows_vector_is_the_first_of_the_dense_svd(adapters):
  for layer in adapters.layers:
    for lora in layer.values():
      found = arrow_vectors(jax.tree.map(np.asarray, lora))
      for vector, w in zip(found, dense(lora), strict=True):
        want = np.linalg.svd(w)[2][0]
        sign = np.sign(vector @ want)
        np.testing.assert_allclose(sign * vector, want, atol=1e-5)


def test_an_adapter_of_zeros_has_no_direction(adapters):
  lora = jax.tree.map(np.array, adapters.layers[0]["q"])
  lora.b[2] = 0
  norms = np.linalg.norm(arrow_vectors(lora), axis=-1)
  np.testing.assert_allclose(norms, [1, 1, 0, 1], atol=1e-6)


def test_spectrs_length_is_that_of_its_svd_and_of_the_gram_matrix(adapters):
  for layer in adapters.layers:
    for lora in layer.values():
      x = rng("x").normal(size=(20, lora.a.shape[-1]))
      factors = output_factors(jax.tree.map(np.asarray, lora))
      for e, w in enumerate(dense(lora)):
        _, s, right = np.linalg.svd(w, full_matrices=False)
        z = x @ np.asarray(lora.a[e], np.float64).T
        want = np.linalg.norm(x @ right.T * s, axis=-1)
        b = np.asarray(lora.b[e], np.float64)
        gram = np.sqrt(np.einsum("nr,rs,ns->n", z, b @ b.T, z))
        got = np.linalg.norm(z @ factors[e].T, axis=-1)
        np.testing.assert_allclose(gram, want, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(x @ w.T, axis=-1), want)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_papers_k_is_at_most_the_experts(base, adapters):
  two = Adapters(("a", "b"), jax.tree.map(lambda x: x[:2], adapters.layers))
  router = make_router("arrow", adapters=two).bind(two.names)
  assert forward(base, TEXTS, two, router=router).shape == (2, 8, SHAPE.vocab)
  with pytest.raises(InputError, match=r"top-k: 3 .* at most the 2 experts"):
    make_router("arrow", adapters=two, top_k=3).bind(two.names)


def test_gates_below_zero_are_not_shaped(adapters):
  for shaping, told in (
    ({"top_k": 2}, "top-k: 2"),
    ({"temperature": 2.0}, "2.0"),
  ):
    with pytest.raises(InputError, match=f"{told} .* may be negative"):
      build("lora-flow", adapters, **shaping)


def test_one_expert_is_kept_at_full_strength(base, adapters):
  kept, _ = run(base, TEXTS, adapters, build("switch", adapters))
  for _, gates in kept:
    np.testing.assert_allclose(np.sort(gates)[..., -1], 1, atol=1e-6)
    assert (np.count_nonzero(gates, axis=-1) == 1).all()


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lambda a: a.pop("layers.1.q.bias"), r"layers\.1\.q\.bias has .* \[0\]"),
    (
      lambda a: a.update({"layers.0.v.weights": np.zeros((2, 32), np.float32)}),
      r"layers\.0\.v\.weights has the shape \[2, 32\]; want .* \[4, 32\]",
    ),
    (
      lambda a: a["layers.0.q.bias"].fill(np.nan),
      r"layers\.0\.q\.bias .*finite",
    ),
    (
      lambda a: a.update({"layers.1.v.bias": np.zeros(4, np.float32)}),
      r"layers\.1\.v\.bias is for a map that no expert adapts",
    ),
  ],
)
def test_arrays_that_do_not_fit_are_told_in_one_line(adapters, change, told):
  arrays = fitted_arrays("lora-flow")
  change(arrays)
  with pytest.raises(InputError, match=told) as caught:
    make_router("lora-flow", adapters=adapters, arrays=arrays)
  assert "\n" not in str(caught.value)


def test_x_lora_is_for_bases_of_its_width(base, adapters):
  arrays = fitted_arrays("x-lora")
  for name, array in arrays.items():
    if name.endswith("weights"):
      arrays[name] = array[:, :-1]
  router = make_router("x-lora", adapters=adapters, arrays=arrays)
  with pytest.raises(InputError, match=r"width 31, but .* have 32"):
    forward(base, TEXTS, adapters, router=router)
