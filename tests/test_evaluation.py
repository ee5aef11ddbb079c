"""Held-out losses against a plain loop over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import by_projection, normal

from tokenlora_jax.config import DataConfig, DecodeConfig
from tokenlora_jax.data.examples import Example, held_out
from tokenlora_jax.data.rows import Row
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.evaluation.evaluator import Evaluator, Variant
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import random_adapters

ROWS = [
  Row("How many?", " 4", "a:1"),
  Row("Which letter is it, then?", " It is B.", "a:2"),
  Row("Go", " on and on", "a:3"),
]
LENGTH = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Letters(Router):
  """Reads text; remembers on the class which texts it was asked about."""

  turns: jax.Array
  needs = "text"
  asked = []  # noqa: RUF012

  @property
  def experts(self):
    return self.turns.shape[0]

  def observe(self, texts):
    self.asked.extend(texts)
    return np.array([sum(map(ord, text)) % 97 for text in texts], np.float32)

  def gates(self, batch, observation, hidden):
    return jax.nn.softmax(3 * jnp.sin(observation[:, None] * self.turns))


@pytest.fixture(scope="module")
def base():
  rng = np.random.default_rng(0)

  def make(name, shape):
    if "norm" in name:
      return jnp.ones(shape)
    scale = 1 / np.sqrt(shape[-2])
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

  return Llama(PRESETS["tiny"], by_projection(PRESETS["tiny"], make))


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=3, rank=4)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("random:tiny")


@pytest.fixture(scope="module")
def examples(tokenizer):
  return list(held_out(ROWS, tokenizer, DataConfig(length=LENGTH)).values())


@pytest.fixture(scope="module")
def evaluator(base, adapters, tokenizer):
  return Evaluator(base, adapters, tokenizer)


@pytest.fixture(scope="module")
def letters():
  return Letters(jnp.array([0.3, 1.1, 2.3]))


def loop(base, adapters, tokenizer, router, refresh_every, example):
  """One answer's losses, a forward pass a token."""
  losses = []
  size = example.prompt_length
  table = np.zeros((1, LENGTH, 3), np.float32)
  for n in range(len(example.tokens) - size):
    if n == 0 or (refresh_every and n % refresh_every == 0):
      text = tokenizer.decode(
        example.tokens[: size + n], skip_special_tokens=True
      )
      gates = np.asarray(router.gates(1, router.observe([text]), None))[0]
    if n == 0:
      table[0, :size] = gates
    table[0, size - 1 + n] = gates
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : size + n] = example.tokens[: size + n]
    logits = np.asarray(forward(base, padded, adapters, table), np.float64)
    row = logits[0, size - 1 + n]
    row = row - np.log(np.exp(row).sum())
    losses.append(-row[example.tokens[size + n]])
  return np.array(losses)


def scored(evaluator, variant, examples):
  """{place: losses of the answer's tokens}."""
  found = [one for batch in evaluator.score(variant, examples) for one in batch]
  assert sorted(one.place for one in found) == list(range(len(examples)))
  for place, losses, gates in found:
    example = examples[place]
    count = len(example.tokens) - example.prompt_length
    assert losses.shape == (count,)
    if variant.router is None:
      assert gates is None
    else:
      assert gates.shape == (count, 3)
  return {one.place: one.losses for one in found}


@pytest.mark.parametrize("refresh_every", [0, 1, 2])
def test_losses_equal_a_loop_over_tokens(
  base, adapters, tokenizer, evaluator, examples, letters, refresh_every
):
  losses = scored(evaluator, Variant(letters, refresh_every), examples)
  for i, example in enumerate(examples):
    expected = loop(base, adapters, tokenizer, letters, refresh_every, example)
    np.testing.assert_allclose(losses[i], expected, atol=1e-4)


def test_the_decoder_gives_a_text_router_the_losses_of_one_pass(
  base, adapters, tokenizer, evaluator, examples, letters
):
  losses = scored(evaluator, Variant(letters, 2), examples)
  answers = [e.tokens[e.prompt_length :] for e in examples]
  forced = np.zeros((len(answers), 12), np.int32)
  for row, answer in zip(forced, answers, strict=True):
    row[: len(answer)] = answer
  prompts = [e.tokens[: e.prompt_length].tolist() for e in examples]
  config = DecodeConfig(12, refresh_every=2, stop_at_eos=False)
  *_, out = Decoder(
    base, prompts, adapters, letters, config, tokenizer, forced=forced
  )
  for i, answer in enumerate(answers):
    followed = -out.log_probs[i, : len(answer)]
    np.testing.assert_allclose(followed, losses[i], atol=1e-4)


def test_rows_that_the_decoder_follows_get_the_losses_of_one_pass(
  evaluator, examples, monkeypatch
):
  """Constant gates, as if they came from hidden states."""
  router = make_router("fixed", gates=[0.2, 0.9, 0.4])
  variant = Variant(router, 3)
  once = scored(evaluator, variant, examples)
  monkeypatch.setattr(type(router), "needs", "hidden")
  followed = scored(evaluator, variant, examples)
  for i in once:
    np.testing.assert_allclose(followed[i], once[i], atol=1e-4)


@jax.jit
def hidden_states(base, tokens):
  """Last hidden states of the base alone, [B, T, D]."""
  places = jnp.arange(tokens.shape[1])[None]
  return base(tokens, places, causal_mask(jnp.ones_like(tokens)))[0]


def test_hidden_states_decide_at_the_prompt(
  base, adapters, evaluator, examples
):
  table = np.random.default_rng(0).normal(size=(3, 64))
  router = make_router("centroid", centroids=table, encoder="hidden")
  losses = scored(evaluator, Variant(router), examples)
  for i, example in enumerate(examples):
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(example.tokens)] = example.tokens
    states = hidden_states(base, tokens)[:, : example.prompt_length]
    gates = router.gates(1, (), states.mean(axis=1))
    logits = forward(base, tokens, adapters, gates)
    rows = np.asarray(jax.nn.log_softmax(logits))[0]
    expected = [
      -rows[t - 1, example.tokens[t]]
      for t in range(example.prompt_length, len(example.tokens))
    ]
    np.testing.assert_allclose(losses[i], expected, atol=1e-4)
  # Refreshed gates are others.
  moved = scored(evaluator, Variant(router, 2), examples)
  assert np.abs(moved[1] - losses[1])[2:].max() > 1e-3


def test_base_one_adapter_and_uniform(evaluator, examples, base, adapters):
  bare = scored(evaluator, Variant(None), examples)
  off = scored(evaluator, Variant(make_router("base")), examples)
  alone, other = (
    scored(evaluator, Variant(make_router("one-hot", expert=name)), examples)
    for name in ("e2", "e1")
  )
  mean = scored(evaluator, Variant(make_router("uniform")), examples)
  fixed = make_router("fixed", gates=[1 / 3] * 3)
  fixed = scored(evaluator, Variant(fixed), examples)
  for i in range(len(examples)):
    np.testing.assert_array_equal(bare[i], off[i])
    np.testing.assert_allclose(mean[i], fixed[i], atol=1e-6)
    assert np.abs(alone[i] - other[i]).max() > 0.1
  tokens = examples[0].tokens[None]
  logits = jax.nn.log_softmax(forward(base, tokens))[0]
  expected = [-logits[t - 1, tokens[0, t]] for t in range(10, tokens.shape[1])]
  np.testing.assert_allclose(bare[0], expected, atol=1e-4)


@pytest.mark.parametrize("whole_first", [True, False])
def test_what_an_expert_said_of_a_text_serves_from_any_place_on(
  whole_first, base, adapters, tokenizer, examples
):
  """An answer's losses are those of the whole text there, asked in any order."""
  evaluator = Evaluator(base, adapters, tokenizer)
  one = Variant(make_router("one-hot", expert="e1"))
  whole = [example._replace(prompt_length=1) for example in examples]
  if whole_first:
    texts = scored(evaluator, one, whole)
    answers = scored(evaluator, one, examples)
  else:
    answers = scored(evaluator, one, examples)
    texts = scored(evaluator, one, whole)
  for i, example in enumerate(examples):
    assert len(texts[i]) == len(example.tokens) - 1
    end = texts[i][example.prompt_length - 1 :]
    np.testing.assert_allclose(answers[i], end, atol=1e-5)


def test_the_router_is_asked_once_about_a_text(
  base, adapters, tokenizer, examples, letters
):
  evaluator = Evaluator(base, adapters, tokenizer)
  letters.asked.clear()
  scored(evaluator, Variant(letters, 1), examples)
  texts = {
    tokenizer.decode(e.tokens[:n], skip_special_tokens=True)
    for e in examples
    for n in range(e.prompt_length, len(e.tokens))
  }
  assert set(letters.asked) == texts
  letters.asked.clear()
  for refresh_every in (2, 4, 0, 1):
    scored(evaluator, Variant(letters, refresh_every), examples)
  assert letters.asked == []
  # Another router is not answered with this one's gates.
  scored(evaluator, Variant(Letters(letters.turns * 2)), examples)
  assert len(set(letters.asked)) == len(examples)


def test_routers_that_are_gone_are_not_taken_for_new_ones(
  base, adapters, tokenizer, examples
):
  """Each call binds a router anew, maybe where the last one's memory was."""
  evaluator = Evaluator(base, adapters, tokenizer)
  for expert in range(3):
    router = make_router("one-hot", expert=expert, experts=3)
    for gates in evaluator.gates(router, 0, examples):
      assert gates.tolist() == [np.eye(3)[expert].tolist()] * len(gates)
    del router


def test_more_rows_than_a_batch_and_rows_cut_before_the_answer(
  evaluator, examples
):
  uniform = Variant(make_router("uniform"))
  cut = examples[0]
  size = cut.prompt_length
  cut = Example(cut.tokens[:size], cut.loss_mask[:size], size)
  many = [*examples * 4, cut]
  batches = list(evaluator.score(uniform, many))
  assert [len(batch) for batch in batches] == [8, 4]
  found = {one.place: one.losses for batch in batches for one in batch}
  assert sorted(found) == list(range(12))
  few = scored(evaluator, uniform, examples)
  for i, losses in found.items():
    np.testing.assert_allclose(losses, few[i % 3], atol=1e-5)


@pytest.mark.parametrize("rule", ["exact", "probabilities"])
@pytest.mark.parametrize(
  ("router", "pace"),
  [("posterior", 0), ("posterior", 1), ("posterior", 3), ("hidden", 0)],
)
def test_one_pass_scores_as_the_decoder_does(rule, router, pace):
  """For routers that look at what the decoder reads."""
  base = load_base("random:tiny", "float32")
  adapters = random_adapters(base, experts=3, rank=4)
  rng = np.random.default_rng(0)
  examples = [
    Example(rng.integers(4, 250, n).astype(np.int32), np.ones(n), 5)
    for n in (9, 14, 11)
  ]
  made = (
    make_router("posterior", share=0.1, smoothing=0.3)
    if router == "posterior"
    else make_router("centroid", centroids=normal(3, 64), encoder="hidden")
  )
  evaluator = Evaluator(base, adapters, None)
  variant = Variant(made, pace, rule)
  (got,) = evaluator.score(variant, examples)
  followed = evaluator._decode(examples, variant, made.bind(adapters.names))
  for found in got:
    losses, gates = followed[found.place]
    np.testing.assert_allclose(found.losses, losses, atol=1e-4)
    np.testing.assert_allclose(found.gates, gates, atol=1e-4)
