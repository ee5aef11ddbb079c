"""Routers for whole sequences while decoding, against a slow twin."""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from numpy_routers import NAMES, make
import pytest
from slow import follow, make_base, make_encoder, shaped, softmax

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.examples import Example
from tokenlora_jax.decoding import generate, graph
from tokenlora_jax.encoders import TextEncoder
from tokenlora_jax.evaluation.evaluator import Evaluator, Variant
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.lora import Adapters, Lora, random_adapters

PROMPTS = [[1, 104, 50, 120, 88], [1, 99], [1, 70, 71, 72, 73, 74, 75, 76, 77]]
NEW = 4
RANK = 4
KEPT = 2  # Of 4 ranks, the share .4 rounded up.


@pytest.fixture(scope="module")
def base():
  return make_base()


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=4, rank=RANK)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("random:tiny")


def config(**settings):
  return DecodeConfig(
    **{"max_new_tokens": NEW, "stop_at_eos": False, **settings}
  )


@pytest.mark.parametrize(
  ("name", "encoder", "refresh_every", "cache"),
  [
    *((name, "text", 2, "reuse") for name in NAMES),
    ("centroid", "text", 0, "reuse"),
    ("hilora", "text", 2, "recompute"),
    ("cbtm", "hidden", 2, "reuse"),
    ("classifier", "hidden", 1, "reuse"),
    ("lorauter", "hidden", 2, "recompute"),
    ("hilora", "hidden", 2, "reuse"),
  ],
)
def test_decoding_equals_the_slow_twin(
  base, adapters, tokenizer, name, encoder, refresh_every, cache
):
  by_text = make_encoder()
  width = 8 if encoder == "text" else base.config.width
  router, numpy_gates = make(
    name, width, by_text if encoder == "text" else "hidden", 4, adapters
  )
  out = generate(
    base, PROMPTS, adapters, router,
    config(refresh_every=refresh_every, cache=cache), tokenizer,
  )  # fmt: skip

  def route(tokens, hidden):
    if encoder == "hidden":
      return numpy_gates(hidden.astype(np.float64))
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return numpy_gates(by_text.embed([text])[0].astype(np.float64))

  moved = []
  for i, prompt in enumerate(PROMPTS):
    gates, log_probs, likeliest = follow(
      base, adapters, prompt, out.tokens[i], route,
      0 if router.at_prompt_only else refresh_every,
      rereads=cache == "recompute",
      kept=KEPT if name == "hilora" else None,
    )  # fmt: skip
    np.testing.assert_allclose(out.gates[i], gates, atol=1e-5)
    np.testing.assert_allclose(out.log_probs[i], log_probs, atol=1e-4)
    np.testing.assert_allclose(log_probs, likeliest, atol=1e-4)
    moved.append(np.abs(np.diff(gates, axis=0)).max() > 1e-3)
  refreshed = refresh_every and not router.at_prompt_only
  assert any(moved) == bool(refreshed)


def test_what_is_decided_at_the_prompt_is_asked_once(base, adapters, tokenizer):
  asked = []

  def prepare(encoder, texts):
    asked.append(len(texts))
    return before(encoder, texts)

  before = TextEncoder.prepare
  for name, times in (("ariadne", 1), ("centroid", 2)):
    router, _ = make(name, 8, make_encoder(), 4)
    asked.clear()
    with mock.patch.object(TextEncoder, "prepare", prepare):
      generate(
        base, PROMPTS, adapters, router, config(refresh_every=2), tokenizer
      )
    assert asked == [3] * times


def test_evaluation_asks_about_the_prompt_alone(base, adapters, tokenizer):
  text = [1, 104, 50, 120, 88, 99, 100]
  example = Example(np.array(text, np.int32), np.ones(7, np.float32), 3)
  evaluator = Evaluator(base, adapters, tokenizer)
  router, numpy_gates = make("lorauter", 8, make_encoder(), 4)
  (gates,) = evaluator.gates(router, 1, [example])
  prompt = tokenizer.decode(text[:3], skip_special_tokens=True)
  x = router.router.encoder.embed([prompt])[0].astype(np.float64)
  np.testing.assert_allclose(gates, [numpy_gates(x)] * 4, atol=1e-5)


def test_evaluation_scores_what_is_decided_twice(base, adapters, tokenizer):
  """By text, and in the layers: as the slow twin reads it."""
  text = [1, 104, 50, 120, 88, 99, 100]
  example = Example(np.array(text, np.int32), np.ones(7, np.float32), 3)
  encoder = make_encoder()
  router, numpy_gates = make("hilora", 8, encoder, 4, adapters)
  evaluator = Evaluator(base, adapters, tokenizer)
  (((_, losses, _),),) = evaluator.score(Variant(router, 2), [example])

  def route(tokens, hidden):
    words = tokenizer.decode(tokens, skip_special_tokens=True)
    return numpy_gates(encoder.embed([words])[0].astype(np.float64))

  _, log_probs, _ = follow(
    base, adapters, text[:3], text[3:], route, 2, kept=KEPT
  )
  np.testing.assert_allclose(losses, -log_probs, atol=1e-4)


def test_rules_that_let_experts_read_alone_refuse_hilora(base, adapters):
  router, _ = make("hilora", base.config.width, "hidden", 4, adapters)
  for settings, told in (
    ({"rule": "probabilities"}, r"decode\.rule: 'probabilities'"),
    ({"cache": "remix"}, r"decode\.cache: 'remix'"),
  ):
    with pytest.raises(InputError, match=told):
      generate(base, PROMPTS, adapters, router, config(**settings))


# -----------------------------------------------------------------------------
# LoGo.


@jax.jit
def inputs_of_maps(base, layers, tokens):
  """What each map reads at the last token, all adapters added, in their order."""
  inputs = []

  def adapt(lora, x, keys):
    inputs.append(x[0, -1])
    low = jnp.einsum("bti,eri->bter", x, lora.a)
    return jnp.einsum("bter,ero,e->bto", low, lora.b, lora.scaling)

  places = jnp.arange(tokens.size)[None]
  mask = causal_mask(jnp.ones_like(tokens))
  base(tokens, places, mask, loras=layers, adapt=adapt)
  return inputs


def logo_scores(base, adapters, prompt, layer, name, measure):
  """Each adapter's answer at the prompt's last token, one adapter at a time."""
  maps = [
    (i, p)
    for i, own in enumerate(adapters.layers)
    for p in ("q", "v")
    if p in own
  ]
  inputs = inputs_of_maps(base, adapters.layers, jnp.array([prompt]))
  h = np.asarray(inputs[maps.index((layer, name))], np.float64)
  asked = jax.tree.map(lambda x: np.asarray(x, np.float64), adapters.layers)
  asked = asked[layer][name]
  scores = []
  for a, b, scaling in zip(asked.a, asked.b, asked.scaling, strict=True):
    out = scaling * (b.T @ (a @ h))
    if measure == "norm":
      scores.append(math.sqrt(sum(out**2)))
    else:
      p = softmax(out)
      scores.append(1 / -sum(p * np.log(p)))
  return np.array(scores)


@pytest.mark.parametrize(
  ("measure", "top_k", "refresh_every"),
  [("norm", None, 2), ("norm", 2, 0), ("entropy", None, 0)],
)
def test_logo_matches_numpy_while_decoding(
  base, adapters, measure, top_k, refresh_every
):
  router = make_router("logo", adapters=adapters, measure=measure, top_k=top_k)
  out = generate(
    base, PROMPTS, adapters, router, config(refresh_every=refresh_every)
  )
  for i, prompt in enumerate(PROMPTS):
    s = logo_scores(base, adapters, prompt, 1, "q", measure)
    expected = shaped(s / s.sum(), top_k=top_k or 0)
    np.testing.assert_allclose(out.gates[i], [expected] * NEW, atol=1e-5)


def test_logo_asks_the_last_map_there_is(base, adapters):
  for projection in ("v", "q"):
    only = {projection: adapters.layers[0][projection]}
    some = Adapters(adapters.names, (only, {}))
    router = make_router("logo", adapters=some)
    tokens = np.array([[0, 0, *PROMPTS[0]]], np.int32)
    found = graph.read_prompt(router, base, some.layers, tokens, np.array([2]))
    expected = logo_scores(base, some, PROMPTS[0], 0, projection, "norm")
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.parametrize("measure", ["norm", "entropy"])
def test_logo_takes_new_adapters_alike(base, adapters, measure):
  new = Adapters(
    adapters.names,
    jax.tree.map(
      lambda lora: Lora(lora.a, 0 * lora.b, lora.scaling),
      adapters.layers,
      is_leaf=lambda x: isinstance(x, Lora),
    ),
  )
  router = make_router("logo", adapters=new, measure=measure)
  out = generate(base, PROMPTS, new, router, config())
  np.testing.assert_allclose(out.gates, 0.25, atol=1e-6)
