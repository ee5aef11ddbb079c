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
from tokenlora_jax.mixing.routers import (
  Router,
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


# Router -> (reference, the shapes of its fitted arrays, its paper's top-k).
CASES = {
  "arrow": (arrow_gates, None, 3),
  "spectr": (spectr_gates, None, 4),
}


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
TEXTS = [[3, 1, 40, 17, 3, 9], [7, 2, 20, 21, 47, 30]]


@each
def test_gates_inside_the_layers_match_numpy(base, adapters, name):
  for k in (0, 2, None):
    router = build(name, adapters, **({} if k is None else {"top_k": k}))
    kept, hidden = run(base, TEXTS, adapters, router)
    k = CASES[name][2] if k is None else k
    for want, (_, got) in zip(
      expected_gates(name, adapters, kept, hidden), kept, strict=True
    ):
      np.testing.assert_allclose(got, top(want, k) if k else want, atol=1e-5)
      assert got.dtype == np.float32
      assert np.ptp(want, axis=(0, 1)).max() > 0.05  # They do move.


@each
def test_temperature_is_that_of_the_logits(base, adapters, name):
  plain = build(name, adapters, top_k=0)
  cold = build(name, adapters, top_k=2, temperature=0.5)
  kept, hidden = run(base, TEXTS, adapters, cold)
  for want, (_, got) in zip(
    expected_gates(name, adapters, kept, hidden), kept, strict=True
  ):
    logits = np.log(want)  # But for a constant.
    np.testing.assert_allclose(got, top(softmax(logits / 0.5), 2), atol=1e-5)
  assert plain.experts == EXPERTS


@each
def test_decoding_equals_reading_the_whole_text(base, adapters, name):
  router = build(name, adapters)
  config = DecodeConfig(max_new_tokens=NEW, stop_at_eos=False)
  out = generate(base, PROMPTS, adapters, router, config)
  assert out.gates.shape == (3, NEW, EXPERTS)
  for i, prompt in enumerate(PROMPTS):
    text = [*prompt, *out.tokens[i].tolist()]
    logits = forward(base, [text], adapters, router=router)[0]
    made = logits[len(prompt) - 1 : -1]
    assert made.argmax(-1).tolist() == out.tokens[i].tolist()
    log_probs = jax.nn.log_softmax(made).max(-1)
    np.testing.assert_allclose(log_probs, out.log_probs[i], atol=1e-4)
    # The gates told are the mean over the maps, at the position that was read.
    kept, hidden = run(base, [text], adapters, router)
    every = expected_gates(name, adapters, kept, hidden)
    k = CASES[name][2] or EXPERTS
    mean = np.mean([top(gates, k) for gates in every], axis=0)
    np.testing.assert_allclose(
      out.gates[i], mean[0, len(prompt) - 1 : -1], atol=1e-5
    )


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
  assert forward(base, TEXTS, two, router=router).shape == (2, 6, SHAPE.vocab)
  with pytest.raises(InputError, match=r"top-k: 3 .* at most the 2 experts"):
    make_router("arrow", adapters=two, top_k=3).bind(two.names)
