"""Decoding against a plain Python loop without cache, buckets or scans."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Tokenizer, by_projection

from tokenlora_jax.config import DecodeConfig
from tokenlora_jax.decoding import Decoder, generate, graph
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.mixture import Mixture, forward
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router, register_router
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, random_adapters

PROMPTS = [[1, 104, 50, 120, 88], [1, 99], [1, 70, 71, 72, 73, 74, 75, 76, 77]]
# Whole chunks of 1, 2, 3 and 6 tokens: programs of few shapes are compiled.
NEW = 6
# The slow loop's texts are all padded to this, so that it compiles once.
LENGTH = 24


@register_router("letters")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Letters(Router):
  """A text router that no package has: gates from the letters' sum."""

  turns: jax.Array
  needs = "text"

  @property
  def experts(self):
    return self.turns.shape[0]

  def observe(self, texts):
    return np.array([sum(map(ord, text)) % 97 for text in texts], np.float32)

  def gates(self, batch, observation, seen):
    assert seen is None
    return jax.nn.softmax(3 * jnp.sin(observation[:, None] * self.turns))


def random_base(dtype):
  rng = np.random.default_rng(0)

  def make(name, shape):
    if "norm" in name:
      return jnp.ones(shape, dtype)
    scale = 1 / math.sqrt(shape[-2])
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)

  return Llama(PRESETS["tiny"], by_projection(PRESETS["tiny"], make))


@pytest.fixture(scope="module")
def base():
  return random_base("float32")


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=3, rank=4)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("random:tiny")


@pytest.fixture(scope="module")
def routers():
  table = np.random.default_rng(0).normal(size=(3, 64))
  return {
    "letters": make_router("letters", turns=jnp.array([0.3, 1.1, 2.3])),
    "hidden": make_router("centroid", centroids=table, encoder="hidden"),
    "fixed": make_router("fixed", gates=[0.5, 0.1, 0.7]),
    "uniform": make_router("uniform"),
  }


def config(**settings):
  return DecodeConfig(**{"max_new_tokens": NEW, **settings})


@jax.jit
def run(base, tokens, loras, gates):
  """Last hidden states and log-probabilities of whole texts [B, T]."""
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  adapt = None if gates is None else Mixture(get_rule("exact"), gates)
  mask = causal_mask(jnp.ones_like(tokens))
  hidden, _ = base(tokens, places, mask, loras=loras, adapt=adapt)
  return hidden, jax.nn.log_softmax(base.logits(hidden))


def slow_loop(base, adapters, router, tokenizer, prompt, refresh_every):
  """Reads the whole text anew for every token, each under its own gates."""
  router = router.bind(adapters.names)
  size = len(prompt)
  text = list(prompt)
  table = np.zeros((1, LENGTH, len(adapters.names)), np.float32)
  padded = np.zeros((1, LENGTH), np.int32)
  padded[0, :size] = prompt
  seen = [*np.asarray(run(base, padded, None, None)[0])[0, :size]]
  gates, log_probs = [], []
  for n in range(NEW):
    if n == 0 or (refresh_every and n % refresh_every == 0):
      observation = hidden = None
      if router.needs == "text":
        observation = router.observe(
          [tokenizer.decode(text, skip_special_tokens=True)]
        )
      if router.needs == "hidden":
        # All tokens so far but the last, which nothing has read.
        hidden = jnp.mean(jnp.array(seen), axis=0, keepdims=True)
      now = np.asarray(router.gates(1, observation, hidden))[0]
    if n == 0:
      table[0, :size] = now
    table[0, size - 1 + n] = now
    padded[0, : len(text)] = text
    states, rows = run(base, padded, adapters.layers, table)
    if n > 0:
      seen.append(np.asarray(states)[0, size - 1 + n])
    row = np.asarray(rows)[0, size - 1 + n]
    gates.append(now)
    log_probs.append(row.max())
    text.append(int(row.argmax()))
  return text[size:], gates, log_probs


@pytest.mark.parametrize("refresh_every", [0, 1, 3])
@pytest.mark.parametrize("name", ["letters", "hidden", "fixed"])
def test_a_ragged_batch_equals_the_slow_loop_row_by_row(
  base, adapters, tokenizer, routers, name, refresh_every
):
  router = routers[name]
  out = generate(
    base, PROMPTS, adapters, router,
    config(refresh_every=refresh_every, stop_at_eos=False), tokenizer,
  )  # fmt: skip
  for i, prompt in enumerate(PROMPTS):
    tokens, gates, log_probs = slow_loop(
      base, adapters, router, tokenizer, prompt, refresh_every
    )
    assert out.tokens[i].tolist() == tokens
    np.testing.assert_allclose(out.gates[i], gates, atol=1e-5)
    np.testing.assert_allclose(out.log_probs[i], log_probs, atol=1e-4)
  assert out.lengths.tolist() == [NEW] * 3
  # Gates move between chunks and never within one.
  moves = np.abs(np.diff(out.gates, axis=1)).max(axis=(0, 2)) > 1e-3
  at = [n + 1 for n in range(NEW - 1) if moves[n]]
  if name == "fixed" or refresh_every == 0:
    assert at == []
  else:
    # Before token 1, nothing but the prompt has hidden states.
    first = 2 if (name, refresh_every) == ("hidden", 1) else refresh_every
    assert at == list(range(first, NEW, refresh_every))


def test_the_gates_returned_explain_the_tokens_returned(
  base, adapters, tokenizer, routers
):
  out = generate(
    base, PROMPTS[:1], adapters, routers["letters"],
    config(refresh_every=2, stop_at_eos=False), tokenizer,
  )  # fmt: skip
  text = [*PROMPTS[0], *out.tokens[0, :-1].tolist()]
  first = len(PROMPTS[0]) - 1
  gates = np.concatenate([[out.gates[0, 0]] * first, out.gates[0]])
  logits = forward(base, [text], adapters, gates[None])[0, first:]
  assert logits.argmax(-1).tolist() == out.tokens[0].tolist()
  np.testing.assert_allclose(
    jax.nn.log_softmax(logits).max(-1), out.log_probs[0], atol=1e-4
  )


@pytest.mark.parametrize("name", ["letters", "hidden"])
def test_a_batch_equals_one_by_one(base, adapters, tokenizer, routers, name):
  router = routers[name]
  settings = config(refresh_every=2)
  whole = generate(base, PROMPTS, adapters, router, settings, tokenizer)
  for i, prompt in enumerate(PROMPTS):
    one = generate(base, [prompt], adapters, router, settings, tokenizer)
    assert one.tokens[0].tolist() == whole.tokens[i].tolist()
    assert one.texts[0] == whole.texts[i]
    np.testing.assert_allclose(one.gates[0], whole.gates[i], atol=1e-5)
    np.testing.assert_allclose(one.log_probs[0], whole.log_probs[i], atol=1e-4)


def test_one_hot_is_that_adapter_alone(base, adapters):
  for expert in adapters.names:
    mixed = generate(
      base, PROMPTS, adapters, make_router("one-hot", expert=expert), config()
    )
    alone = generate(
      base, PROMPTS, adapters.select(expert), make_router("sum"), config()
    )
    assert mixed.tokens.tolist() == alone.tokens.tolist()
    np.testing.assert_allclose(mixed.log_probs, alone.log_probs, atol=1e-4)
  summed = generate(base, PROMPTS, adapters, make_router("sum"), config())
  assert mixed.tokens.tolist() != summed.tokens.tolist()


def test_zero_gates_are_the_base_to_the_bit(base, adapters):
  off = generate(base, PROMPTS, adapters, make_router("base"), config())
  bare = generate(base, PROMPTS, config=config())
  assert off.tokens.tolist() == bare.tokens.tolist()
  np.testing.assert_array_equal(off.log_probs, bare.log_probs)
  assert bare.gates.shape == (3, NEW, 0)
  assert bare.texts is None
  on = generate(base, PROMPTS, adapters, make_router("sum"), config())
  assert on.tokens.tolist() != bare.tokens.tolist()


@pytest.mark.parametrize("name", ["letters", "hidden", "fixed"])
def test_banks_prompts_and_routers_of_one_shape_compile_once(
  base, adapters, tokenizer, routers, name
):
  def sizes():
    parts = (graph.prefill, graph.decode, graph.route)
    return [part._cache_size() for part in parts]

  def go(bank, prompts, router, seed):
    settings = config(refresh_every=3, seed=seed)
    return generate(base, prompts, bank, router, settings, tokenizer)

  first = go(adapters, PROMPTS, routers[name], 0)
  before = sizes()
  other = random_adapters(base, experts=3, rank=4, seed=1)
  other = Adapters(("x", "y", "z"), other.layers)
  half = jax.tree.map(lambda x: x / 2, routers[name])
  prompts = [[1, 2], list(range(4, 36)), [7]]
  second = go(other, prompts, half, 1)
  assert sizes() == before
  assert second.tokens.tolist() != first.tokens.tolist()


def test_forced_tokens_are_read_and_scored(base, adapters, tokenizer, routers):
  """As if the text had been made: its gates and log-probabilities."""
  for name in ("letters", "hidden"):
    settings = config(refresh_every=3, stop_at_eos=False)
    made = generate(base, PROMPTS, adapters, routers[name], settings, tokenizer)
    *_, read = Decoder(
      base, PROMPTS, adapters, routers[name],
      dataclasses.replace(settings, temperature=1.0), tokenizer,
      forced=made.tokens,
    )  # fmt: skip
    assert read.tokens.tolist() == made.tokens.tolist()
    np.testing.assert_allclose(read.gates, made.gates, atol=1e-5)
    np.testing.assert_allclose(read.log_probs, made.log_probs, atol=1e-4)


# -----------------------------------------------------------------------------
# Ends, streaming, sampling.


class Alphabet(Tokenizer):
  """Token n is a letter; which one ends a text is free to choose."""

  def __init__(self, eos_token_id=None):
    self.eos_token_id = eos_token_id

  def get_vocab(self):
    return {}

  def encode(self, text, add_special_tokens=True, **kwargs):
    return [ord(letter) for letter in text]

  def decode(self, token_ids, skip_special_tokens=False):
    assert skip_special_tokens
    ends = [self.eos_token_id]
    return text_of(token for token in token_ids if token not in ends)


def text_of(tokens):
  return "".join(chr(0x100 + token) for token in tokens)


@pytest.fixture(scope="module")
def free(base, adapters):
  """What greedy decoding makes where nothing ends it."""
  return generate(base, PROMPTS, adapters, make_router("sum"), config()).tokens


@pytest.mark.parametrize("refresh_every", [0, 1, 3, 100])
def test_the_end_token_ends_a_row(base, adapters, free, refresh_every):
  row = free[0].tolist()
  end = row[2]
  first = row.index(end)
  out = generate(
    base, PROMPTS, adapters, make_router("sum"),
    config(refresh_every=refresh_every), Alphabet(end),
  )  # fmt: skip
  assert out.lengths[0] == first + 1
  expected = row[: first + 1] + [end] * (out.tokens.shape[1] - first - 1)
  assert out.tokens[0].tolist() == expected
  assert (out.log_probs[0, first + 1 :] == 0).all()
  assert out.texts[0] == text_of(row[:first])
  # The others go on, each to its own end.
  for i in (1, 2):
    until = out.lengths[i]
    assert out.tokens[i, :until].tolist() == free[i, :until].tolist()
  assert out.stats["new_tokens"] == out.lengths.sum()
  assert out.stats["prompt_tokens"] == sum(map(len, PROMPTS))
  # Where all have ended, no further chunk is made.
  alike = generate(
    base, PROMPTS[:1] * 3, adapters, make_router("sum"),
    config(refresh_every=refresh_every), Alphabet(end),
  )  # fmt: skip
  made = {0: NEW, 1: first + 1, 3: 3, 100: NEW}[refresh_every]
  assert alike.tokens.shape[1] == made
  assert alike.lengths.tolist() == [first + 1] * 3


def test_the_end_token_may_be_ignored_or_unknown(base, adapters, free):
  for settings, tokenizer in (
    ({"stop_at_eos": False}, Alphabet(int(free[0, 2]))),
    ({}, Alphabet(None)),
  ):
    out = generate(
      base, PROMPTS, adapters, make_router("sum"), config(**settings), tokenizer
    )
    assert out.tokens.tolist() == free.tolist()
    assert out.lengths.tolist() == [NEW] * 3


@pytest.mark.parametrize("refresh_every", [0, 1, 3])
def test_stop_strings_cut_the_text(base, adapters, free, refresh_every):
  row = free[2].tolist()
  stop = text_of(row[2:4])
  place = text_of(row).index(stop)
  out = generate(
    base, PROMPTS, adapters, make_router("sum"),
    config(refresh_every=refresh_every, stop=("never", stop)), Alphabet(),
  )  # fmt: skip
  assert out.texts[2] == text_of(row[:place])
  assert out.lengths[2] == place + 2
  assert out.tokens[2, : place + 2].tolist() == row[: place + 2]
  assert (out.tokens[2, place + 2 :] == 0).all()
  # The others are as long as before.
  for i in (0, 1):
    assert stop not in text_of(free[i])
    assert out.texts[i] == text_of(free[i])
    assert out.lengths[i] == NEW


@pytest.mark.parametrize(
  ("name", "temperature"), [("letters", 0.9), ("hidden", 0.0), ("uniform", 0.9)]
)
def test_streaming_ends_where_generate_does(
  base, adapters, tokenizer, routers, name, temperature
):
  settings = config(max_new_tokens=5, refresh_every=3, temperature=temperature)
  inputs = (base, PROMPTS, adapters, routers[name], settings, tokenizer)
  whole = generate(*inputs)
  parts = list(Decoder(*inputs, chunked=True))
  assert [part.tokens.shape[1] for part in parts] == [3, 5]
  for part in parts:
    size = part.tokens.shape[1]
    np.testing.assert_array_equal(part.tokens, whole.tokens[:, :size])
    np.testing.assert_array_equal(part.gates, whole.gates[:, :size])
  assert parts[-1].texts == whole.texts
  assert parts[-1].lengths.tolist() == whole.lengths.tolist()


def test_sampling_follows_its_seed_and_restrictions(base, adapters):
  def sample(seed, **settings):
    return generate(
      base, PROMPTS, adapters, make_router("sum"),
      config(temperature=0.9, seed=seed, **settings),
    )  # fmt: skip

  once, again, other = (sample(seed).tokens.tolist() for seed in (0, 0, 1))
  assert once == again != other
  # One token is left to pick: the likeliest.
  greedy = generate(base, PROMPTS, adapters, make_router("sum"), config())
  # log_probs are those before temperature and restriction.
  out = sample(3, top_k=1)
  assert out.tokens.tolist() == greedy.tokens.tolist()
  np.testing.assert_allclose(out.log_probs, greedy.log_probs, atol=1e-5)


def test_bfloat16_decodes(adapters, routers):
  base = random_base("bfloat16")
  settings = config(refresh_every=2)
  out = generate(base, PROMPTS, adapters, routers["hidden"], settings)
  assert out.tokens.shape == (3, NEW)
  assert out.gates.dtype == out.log_probs.dtype == np.float32
  np.testing.assert_allclose(out.gates.sum(-1), 1, atol=1e-5)


def test_texts_in_texts_out(base, adapters, tokenizer, routers):
  """Text prompts are the tokens that training gave them, BOS included."""
  told = generate(
    base, ["ab"], adapters, routers["letters"], config(), tokenizer
  )
  ids = [1, *(4 + byte for byte in b"ab")]
  given = generate(
    base, [ids], adapters, routers["letters"], config(), tokenizer
  )
  assert told.tokens.tolist() == given.tokens.tolist()
  count = told.lengths[0]
  row = told.tokens[0, :count].tolist()
  assert told.texts == [tokenizer.decode(row, skip_special_tokens=True)]


def test_a_text_compiles_once_and_its_pace_leaves_that_out(
  base, adapters, tokenizer, routers
):
  settings = config(refresh_every=2)
  # Programs of this test alone.
  prompts = [[1, 5], [7, 8, 9], [4]] * 3
  before = graph.decode._cache_size()
  decoder = Decoder(
    base, prompts, adapters, routers["letters"], settings, tokenizer,
    chunked=True,
  )  # fmt: skip
  stats = [out.stats for out in decoder]
  assert len(stats) == NEW / 2
  # The state that a call returns is placed as the first one was.
  assert graph.decode._cache_size() == before + 1
  made = [each["new_tokens"] for each in stats]
  # The first call compiles what decodes, the second what is asked of a router
  # again.
  assert [each["timed_tokens"] for each in stats[:2]] == [0, 0]
  assert [each["timed_tokens"] for each in stats[2:]] == [
    n - made[1] for n in made[2:]
  ]
  first = stats[0]
  spent = first["decode_seconds"] + first["router_seconds"]
  assert first["tokens_per_second"] == pytest.approx(made[0] / spent)
  again = generate(
    base, prompts, adapters, routers["letters"], settings, tokenizer
  )
  assert again.stats["timed_tokens"] == again.stats["new_tokens"] == made[-1]
