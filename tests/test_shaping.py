"""Top-k, temperature, threshold and smoothing of any router; the posterior."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy_routers import NO_ADAPTERS, make
import pytest
from slow import follow, make_base, shaped, softmax

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.examples import Example
from tokenlora_jax.decoding import generate
from tokenlora_jax.evaluation.evaluator import Evaluator
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router, register_router
from tokenlora_jax.mixing.shaping import ShapedRouter, keep_top, shape_gates
from tokenlora_jax.model.lora import random_adapters

PROMPTS = [[1, 104, 50, 120, 88], [1, 99]]
NEW = 6


@register_router("turning")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turning(Router):
  """Gates that turn with what it looks at: the text, or hidden states."""

  turns: jax.Array
  needs: str = dataclasses.field(metadata={"static": True})

  @property
  def experts(self):
    return self.turns.shape[0]

  def observe(self, texts):
    return np.array([float(sum(map(ord, t)) % 97) for t in texts], np.float32)

  def gates(self, batch, observation, seen):
    x = observation if self.needs == "text" else seen.sum(axis=-1)
    return jax.nn.softmax(2 * jnp.sin(x[:, None] * self.turns))


@register_router("by-input")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByInput(Router):
  """Gates of each position in the layers: those that `low` holds."""

  experts = 4

  @property
  def prototypes(self):
    return ({"q": ()},)

  def position_gates(self, prototype, lora, x, low):
    return low[..., 0]


run = jax.jit(lambda router: router.gates(1, (), None))
TURNS = np.array([0.3, 1.1, 2.3, 0.7], np.float32)


def turning(needs, **settings):
  return make_router("turning", turns=jnp.array(TURNS), needs=needs, **settings)


# -----------------------------------------------------------------------------
# Single rows.

SHAPES = [
  {},
  {"top_k": 1},
  {"top_k": 4},
  {"temperature": 0.2},
  {"temperature": 3.0},
  {"threshold": 0.5},
  {"threshold": 1.0},
  {"top_k": 2, "temperature": 0.5},
  {"top_k": 3, "temperature": 2.0, "threshold": 0.45},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_gates_are_shaped_as_in_numpy(shape):
  rng = np.random.default_rng(0)
  rows = rng.dirichlet(np.ones(4), size=8).astype(np.float32)
  rows[1] *= 3  # Gates need not sum to 1.
  rows[2] = 0  # As of `base`.
  rows[3] = [0.7, 0, 0.3, 0]
  expected = np.array([shaped(row, **shape) for row in rows])

  # Of whole sequences, of a router without an input.
  for row, gates in zip(rows, expected, strict=True):
    fixed = make_router("fixed", gates=row, **shape)
    found = run(fixed)
    np.testing.assert_allclose(found, [gates], atol=1e-5)
  # Of positions in the layers, [B, T, E]; then sequences have gates of 1.
  router = shape_gates(ByInput(), **shape)
  low = rows.reshape(2, 4, 4, 1)
  found = router.position_gates((), None, None, low)
  np.testing.assert_allclose(found, expected.reshape(2, 4, 4), atol=1e-5)
  assert router.gates(2, (), None).tolist() == [[1.0] * 4] * 2


def test_another_top_k_is_the_same_program():
  rows = np.random.default_rng(0).integers(0, 4, size=(40, 5)) / 4
  rows = jnp.asarray(rows, jnp.float32)  # Many are equal.
  keep = jax.jit(keep_top)
  for k in range(1, 6):
    best = jax.lax.top_k(rows, k)[1]
    kept = rows * jax.nn.one_hot(best, 5).sum(axis=1)
    found = keep(rows, jnp.int32(k))
    np.testing.assert_array_equal(found > 0, kept > 0)
    np.testing.assert_allclose(found.sum(axis=1), rows.sum(axis=1), rtol=1e-6)
  np.testing.assert_array_equal(found, rows)
  assert keep._cache_size() == 1
  routers = [make_router("fixed", gates=rows[0], top_k=k) for k in (1, 2)]
  before = run._cache_size()
  assert not np.array_equal(*map(run, routers))
  assert run._cache_size() <= before + 1


@pytest.mark.parametrize("shape", [{"top_k": 2, "temperature": 0.5}, {}])
def test_what_text_and_hidden_states_decide_is_shaped(shape):
  hidden = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  raw = [softmax(2 * np.sin(h.sum() * TURNS)) for h in hidden]
  gates = turning("hidden", **shape).gates(5, (), hidden)
  np.testing.assert_allclose(
    gates, [shaped(r, **shape) for r in raw], atol=1e-5
  )
  router = turning("text", **shape)
  raw = softmax(2 * np.sin((ord("a") + ord("b")) % 97 * TURNS))
  gates = router.gates(1, router.observe(["ab"]), None)
  np.testing.assert_allclose(gates, [shaped(raw, **shape)], atol=1e-5)


def test_a_router_of_both_kinds_has_its_sequences_gates_shaped():
  """Top-k is of experts; HiLoRA's ranks keep their own share."""
  hidden = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
  plain, _ = make("hilora", 16, "hidden", 5, NO_ADAPTERS)
  raw = plain.router.gates(5, (), hidden)
  low = np.random.default_rng(1).normal(size=(1, 2, 5, 8)).astype(np.float32)
  parts = jnp.full(5, math.ceil(0.4 * 8))
  kept = plain.position_gates(parts, None, None, low)
  assert (np.asarray(kept).sum(axis=-1) == math.ceil(0.4 * 8)).all()
  router = shape_gates(plain.router, top_k=1, temperature=0.5, smoothing=0.5)
  found = router.gates(5, (), hidden)
  expected = [shaped(row, 1, 0.5) for row in np.asarray(raw)]
  np.testing.assert_allclose(found, expected, atol=1e-5)
  np.testing.assert_array_equal(
    router.position_gates(parts, None, None, low), kept
  )


def test_no_shape_is_the_router_itself():
  router = turning("text")
  assert shape_gates(router) is router
  off = {"top_k": 0, "temperature": 1.0, "threshold": 0.0, "smoothing": 0.0}
  assert shape_gates(router, **off) is router
  # A paper's own shape can be switched off.
  tables = {"centroids": np.eye(3), "encoder": "hidden"}
  bare = make_router("ariadne", **tables, top_k=0)
  assert bare.gates(1, (), jnp.ones((1, 3))).min() > 0


def test_a_shaped_router_passes_on_all_that_a_router_has():
  public = {name for name in vars(Router) if not name.startswith("_")}
  assert public <= vars(ShapedRouter).keys()


def test_the_base_alone_may_be_what_a_threshold_leaves():
  for router, may in (
    (turning("text"), False),
    (turning("text", top_k=1), False),
    (turning("text", threshold=0.9), True),
    (make_router("base", experts=2, top_k=1), True),
  ):
    assert router.may_be_zero == may


# -----------------------------------------------------------------------------
# Smoothing, at each refresh.


@pytest.fixture(scope="module")
def base():
  return make_base()


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=4, rank=4)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("random:tiny")


def config(refresh_every):
  return DecodeConfig(NEW, refresh_every, stop_at_eos=False)


@pytest.mark.parametrize(
  ("needs", "refresh_every", "smoothing", "shape"),
  [
    ("text", 1, 0.7, {}),
    ("text", 3, 0.5, {"top_k": 2, "temperature": 0.5}),
    ("text", 0, 0.7, {}),
    ("hidden", 2, 0.6, {"top_k": 3}),
  ],
)
def test_gates_at_each_refresh_follow_the_recursion(
  base, adapters, tokenizer, needs, refresh_every, smoothing, shape
):
  """g <- s g + (1 - s) shaped(raw), from shaped(raw) at the prompt."""
  router = turning(needs, smoothing=smoothing, **shape)
  out = generate(
    base, PROMPTS, adapters, router, config(refresh_every), tokenizer
  )
  plain = turning(needs)

  def route(tokens, hidden):
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    raw = plain.gates(1, plain.observe([text]), hidden[None])
    return shaped(np.asarray(raw)[0], **shape)

  moves = 0
  for i, prompt in enumerate(PROMPTS):
    gates, log_probs, _ = follow(
      base, adapters, prompt, out.tokens[i], route, refresh_every, smoothing
    )
    np.testing.assert_allclose(out.gates[i], gates, atol=1e-5)
    np.testing.assert_allclose(out.log_probs[i], log_probs, atol=1e-4)
    moves += (np.abs(np.diff(gates, axis=0)).max(axis=1) > 1e-3).sum()
  assert moves > 0 or refresh_every == 0


def test_evaluation_smooths_as_decoding_does(base, adapters, tokenizer):
  text = np.array([*PROMPTS[0], 99, 100, 101, 102], np.int32)
  example = Example(text, np.ones(len(text), np.float32), 5)
  router = turning("text", smoothing=0.5)
  (found,) = Evaluator(base, adapters, tokenizer).gates(router, 2, [example])
  plain = turning("text")
  raw = []
  for n in (5, 7):
    words = tokenizer.decode(text[:n].tolist(), skip_special_tokens=True)
    raw.append(np.asarray(plain.gates(1, plain.observe([words]), None))[0])
  second = 0.5 * raw[0] + 0.5 * raw[1]
  np.testing.assert_allclose(found, [raw[0]] * 2 + [second] * 2, atol=1e-5)


# -----------------------------------------------------------------------------
# The posterior.


def test_the_posterior_is_bayes_rule():
  rng = np.random.default_rng(0)
  told = np.log(rng.dirichlet(np.ones(3), size=(6, 2))).astype(np.float32)
  router = make_router(
    "posterior", prior=make_router("fixed", gates=[0.5, 0.3, 0.2])
  ).bind(("a", "b", "c"))
  assert (router.needs, router.experts) == ("evidence", 3)
  belief = jnp.log(router.prior.gates(2, (), None))
  for t in range(6):
    belief = jax.jit(router.learn.__func__)(router, belief, told[t])
    weights = np.array([0.5, 0.3, 0.2]) * np.exp(told[: t + 1].sum(axis=0))
    np.testing.assert_allclose(
      router.gates(2, (), belief),
      weights / weights.sum(axis=1, keepdims=True),
      atol=1e-5,
    )


def test_the_posterior_never_runs_out_of_numbers():
  """After 100 tokens the product itself, e^-900, would be 0."""
  router = make_router("posterior", share=0.0).bind(("a", "b"))
  belief = jnp.log(jnp.array([[0.5, 0.5]]))
  told = jnp.array([[-9.0, -9.03]])
  for _ in range(100):
    belief = router.learn(belief, told)
  gates = np.asarray(router.gates(1, (), belief))[0]
  np.testing.assert_allclose(gates[1] / gates[0], math.exp(-3), rtol=1e-3)


def test_a_fixed_share_lets_the_lead_change():
  """w <- (1 - a) w' + a / E (Herbster and Warmuth, 1998)."""
  share, told = 0.1, np.log([[0.9, 0.1]] * 40 + [[0.1, 0.9]] * 3)
  router = make_router("posterior", share=share).bind(("a", "b"))
  belief, weights = jnp.log(jnp.array([[0.5, 0.5]])), np.array([0.5, 0.5])
  for row in told.astype(np.float32):
    belief = router.learn(belief, row[None])
    weights = weights * np.exp(row)
    weights = (1 - share) * weights / weights.sum() + share / 2
    np.testing.assert_allclose(
      router.gates(1, (), belief), [weights], atol=1e-5
    )
  assert weights[1] > 0.9
  # Without a share, 3 tokens do not outweigh 40.
  router = make_router("posterior").bind(("a", "b"))
  assert router.gates(1, (), jnp.array([told.sum(axis=0)]))[0, 1] < 1e-6


def test_a_shaped_posterior_learns_as_ever_and_is_shaped_where_asked():
  plain = make_router("posterior", prior="uniform", evidence="all")
  router = make_router("posterior", evidence="all", top_k=1, smoothing=0.5)
  plain, router = (r.bind(("a", "b", "c")) for r in (plain, router))
  assert router.counts_prompt and plain.counts_prompt
  assert not make_router("posterior").counts_prompt
  assert router.prior is not None
  belief, told = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.zeros((1, 3))
  np.testing.assert_array_equal(
    router.learn(belief, told), plain.learn(belief, told)
  )
  np.testing.assert_allclose(
    router.gates(1, (), belief), [[1, 0, 0]], atol=1e-6
  )
  before = jnp.array([[0.0, 1.0, 0.0]])
  np.testing.assert_allclose(
    router.smooth(before, router.gates(1, (), belief)), [[0.5, 0.5, 0]],
    atol=1e-6,
  )  # fmt: skip


# -----------------------------------------------------------------------------
# Bad settings.


@pytest.mark.parametrize(
  ("name", "settings", "told"),
  [
    ("uniform", {"top_k": -1}, r"router\.top-k: -1 .* 0 \(all\) or more"),
    ("uniform", {"temperature": 0}, r"router\.temperature: 0 .* more than 0"),
    ("uniform", {"threshold": 1.5}, r"router\.threshold: 1\.5 .* 0 \(off\) to"),
    ("uniform", {"smoothing": 1}, r"router\.smoothing: 1 .* 0 <= s < 1"),
    ("uniform", {"topk": 1}, r"'topk' is not a setting; .*mean 'top_k'\?"),
    ("by-input", {"smoothing": 0.5}, "decides for each position by itself"),
    ("posterior", {"share": 1}, r"router\.share: 1 .* 0 <= share < 1"),
    ("posterior", {"evidence": "anwser"}, r"did you mean 'answer'\?"),
    ("posterior", {"prior": "unifrom"}, r"did you mean 'uniform'\?"),
    ("posterior", {"prior": ByInput()}, "decides at the prompt"),
  ],
)
def test_errors_are_one_line(name, settings, told):
  with pytest.raises(InputError, match=told) as caught:
    make_router(name, **settings)
  assert "\n" not in str(caught.value)


def test_more_than_all_is_refused_where_it_was_asked_for():
  router = make_router("fixed", gates=[0.5, 0.5], top_k=3)
  with pytest.raises(InputError, match=r"router\.top-k: 3 .* the 2 experts"):
    router.bind(("a", "b"))
