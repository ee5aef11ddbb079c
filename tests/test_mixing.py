"""Rules, cache policies and the posterior, each against a slow twin."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Tokenizer, by_projection, normal

from tokenlora_jax import register_rule
from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.decoding import Decoder, generate
from tokenlora_jax.mixing.mixture import Mixture, forward
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router, register_router
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.llama import Llama, rms_norm
from tokenlora_jax.model.lora import Adapters, Lora, random_adapters
from tokenlora_jax.model.rope import rope_frequencies, rotate

SHAPE = LlamaConfig(
  vocab=48, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_width=8
)
PROMPTS = [[1, 14, 5, 12, 8], [1, 9], [1, 7, 17, 27, 37, 4, 5, 6, 7]]
NEW, LENGTH = 6, 16  # All texts are padded to LENGTH: one compiled pass.
GATES = np.array([[0.7, 0.2, 0.4], [0.1, 1.0, 0.5], [0.3, 0.3, 0.4]])


def make_base(layers: int) -> Llama:
  rng = np.random.default_rng(0)
  config = dataclasses.replace(SHAPE, layers=layers)

  def make(name, shape):
    if "norm" in name:
      return jnp.ones(shape)
    scale = 1 / math.sqrt(shape[-2])
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

  return Llama(config, by_projection(config, make))


@pytest.fixture(scope="module")
def base():
  return make_base(2)


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=3, rank=4)


@register_router("newest")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Newest(Router):
  """Gates from the running text's hidden states, which turn fast."""

  turns: jax.Array
  needs = "hidden"

  @property
  def experts(self):
    return self.turns.shape[0]

  def gates(self, batch, observation, seen):
    return jax.nn.softmax(3 * seen @ self.turns.T)


ROUTER = make_router("newest", turns=jnp.asarray(normal(3, 32)))


def padded(text) -> np.ndarray:
  return np.array([[*text, *[0] * (LENGTH - len(text))]])


def read(base, text, adapters, gates, rule="exact"):
  """Log-probabilities [T, V] of one text, all under the same gates."""
  logits = forward(base, padded(text), adapters, gates, rule)
  return np.asarray(jax.nn.log_softmax(logits))[0, : len(text)]


# -----------------------------------------------------------------------------
# Rules.


def dense(rule, lora, gates):
  """The matrix [in, out] that a rule makes of adapters, by its definition."""
  a, b, scaling = (np.asarray(x, np.float64) for x in jax.tree.leaves(lora))
  weights = gates * scaling
  if rule == "peft040":
    return np.einsum("e,eri->ir", weights, a) @ b.sum(axis=0)
  if rule == "peft_linear":
    roots = np.sqrt(np.abs(weights))
    into = np.einsum("e,eri->ir", np.sign(weights) * roots, a)
    return into @ np.einsum("e,ero->ro", roots, b)
  return np.einsum("e,eri,ero->io", weights, a, b)


@pytest.mark.parametrize("rule", ["exact", "peft_linear", "peft040"])
@pytest.mark.parametrize("each", ["row", "token"])
def test_a_rule_is_the_matrix_of_its_definition(rule, each):
  lora = Lora(
    jnp.asarray(normal(3, 4, 10)),
    jnp.asarray(normal(3, 4, 6, seed=1)),
    jnp.array([0.5, 2.0, 1.0]),
  )
  x = normal(2, 5, 10, seed=2)
  gates = normal(2, 5, 3, seed=3)
  gates = gates[:, 0] if each == "row" else gates
  got = Mixture(get_rule(rule), jnp.asarray(gates))(lora, jnp.asarray(x))
  table = np.broadcast_to(
    gates if each == "token" else gates[:, None], (2, 5, 3)
  )
  for row, t in np.ndindex(2, 5):
    want = x[row, t] @ dense(rule, lora, table[row, t])
    np.testing.assert_allclose(got[row, t], want, atol=1e-4)


def test_one_hot_gates_give_an_adapter_back_under_all_rules_but_peft040(
  base, adapters
):
  tokens, one = np.arange(8)[None], np.array([[0.0, 1.0, 0.0]])
  exact = forward(base, tokens, adapters, one)
  for rule in ("peft_linear", "probabilities"):
    same = forward(base, tokens, adapters, one, rule)
    wanted = jax.nn.log_softmax(exact) if rule == "probabilities" else exact
    np.testing.assert_allclose(same, wanted, atol=1e-4)
  other = forward(base, tokens, adapters, one, "peft040")
  assert np.abs(other - exact).max() > 0.1


def test_probabilities_are_the_mean_of_what_experts_predict(base, adapters):
  tokens = np.arange(16).reshape(2, 8)
  gates = np.abs(normal(2, 8, 3))
  got = forward(base, tokens, adapters, gates, "probabilities")
  alone = [
    jax.nn.softmax(forward(base, tokens, adapters, np.tile(row, (2, 1))))
    for row in np.eye(3)
  ]
  shares = gates / gates.sum(axis=-1, keepdims=True)
  want = np.einsum("bte,ebtv->btv", shares, np.array(alone))
  np.testing.assert_allclose(np.exp(got), want, atol=1e-5)


@pytest.mark.parametrize("rule", ["peft_linear", "peft040", "probabilities"])
def test_the_decoder_follows_a_rule(base, adapters, rule):
  gates = [0.5, 0.1, 0.7]
  out = generate(
    base, PROMPTS, adapters, make_router("fixed", gates=gates),
    DecodeConfig(NEW, rule=rule),
  )  # fmt: skip
  for i, prompt in enumerate(PROMPTS):
    text = [*prompt, *out.tokens[i]]
    rows = read(base, text, adapters, [gates], rule)[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == out.tokens[i].tolist()
    np.testing.assert_allclose(rows.max(-1), out.log_probs[i], atol=1e-4)


def test_a_rule_and_a_router_of_ones_own_plug_in_by_name(base, adapters):
  @register_rule("winner")
  def winner(low, gates, scaling):
    best = gates == gates.max(axis=-2, keepdims=True)
    return low * best * scaling

  @register_router("longest")
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Longest(Router):
    experts = 3

    def gates(self, batch, observation, seen):
      return jnp.tile(jnp.array([0.2, 0.5, 0.3]), (batch, 1))

  config = DecodeConfig(NEW, rule="winner")
  out = generate(base, PROMPTS, adapters, make_router("longest"), config)
  alone = make_router("one-hot", expert=1)
  want = generate(base, PROMPTS, adapters, alone, DecodeConfig(NEW))
  assert out.tokens.tolist() == want.tokens.tolist()


# -----------------------------------------------------------------------------
# The cache when gates move.


def decode(base, adapters, router=ROUTER, forced=None, **settings):
  config = DecodeConfig(NEW, **settings)
  *_, out = Decoder(base, PROMPTS, adapters, router, config, forced=forced)
  return out


@pytest.mark.parametrize("refresh_every", [1, 2, 3])
def test_recompute_is_a_plain_prefill_at_each_refresh(
  base, adapters, refresh_every
):
  out = decode(base, adapters, refresh_every=refresh_every, cache="recompute")
  for i, prompt in enumerate(PROMPTS):
    text, log_probs, gates = list(prompt), [], []
    layers, nothing = adapters.layers, np.zeros((1, 3))
    first = mixed_hidden(base, padded(text), layers, nothing)
    hidden = [*np.asarray(first)[: len(text)]]
    for n in range(NEW):
      if n % refresh_every == 0:
        mean = np.mean(hidden, axis=0, keepdims=True)
        now = ROUTER.gates(1, (), mean)
      # Everything so far is read under the newest gates, whatever was before.
      row = read(base, text, adapters, now)[-1]
      gates.append(now[0])
      log_probs.append(row.max())
      if n > 0:
        read_anew = mixed_hidden(base, padded(text), layers, now)
        hidden.append(np.asarray(read_anew)[len(text) - 1])
      text.append(int(row.argmax()))
    assert out.tokens[i].tolist() == text[len(prompt) :]
    np.testing.assert_allclose(out.gates[i], gates, atol=1e-4)
    np.testing.assert_allclose(out.log_probs[i], log_probs, atol=1e-4)
  assert np.abs(np.diff(out.gates, axis=1)).max() > 0.05


@jax.jit
def mixed_hidden(base, tokens, loras, gates):
  """Last hidden states [T, D] of one text, all under the same gates."""
  mix, places = Mixture(get_rule("exact"), gates), jnp.arange(LENGTH)[None]
  mask = causal_mask(jnp.ones_like(tokens))
  return base(tokens, places, mask, loras=loras, adapt=mix)[0][0]


class TestRemix:
  def test_is_recompute_in_a_model_of_one_layer(self):
    base = make_base(1)
    adapters = random_adapters(base, experts=3, rank=4)
    forced = np.random.default_rng(1).integers(0, 48, (3, NEW))
    router = make_router("letter", turns=jnp.array([0.3, 1.1, 2.3]))
    same = dict(router=router, forced=forced, refresh_every=1)
    remix, recompute, reuse = (
      decode_text(base, adapters, cache=cache, **same)
      for cache in ("remix", "recompute", "reuse")
    )
    np.testing.assert_allclose(remix.log_probs, recompute.log_probs, atol=1e-4)
    assert np.abs(remix.log_probs - reuse.log_probs).max() > 1e-3

  def test_reads_every_value_under_the_gates_of_now(self, base, adapters):
    forced = np.random.default_rng(1).integers(0, 48, (3, NEW))
    out = decode(base, adapters, forced=forced, refresh_every=2, cache="remix")
    for i, prompt in enumerate(PROMPTS):
      text = [*prompt, *forced[i, :-1]]
      gates = np.concatenate(
        [np.tile(out.gates[i, 0], (len(prompt) - 1, 1)), out.gates[i]]
      )
      rows = slow_remix(base, adapters, text, gates)[len(prompt) - 1 :]
      want = rows[np.arange(NEW), forced[i]]
      np.testing.assert_allclose(out.log_probs[i], want, atol=1e-4)

  def test_works_with_other_rules(self, base, adapters):
    for rule in ("peft_linear", "peft040"):
      gates = make_router("fixed", gates=[0.5, 0.2, 0.3])
      same = decode(base, adapters, gates, rule=rule)
      moving = decode(base, adapters, rule=rule, cache="remix")
      kept = decode(base, adapters, rule=rule)
      assert np.isfinite(moving.log_probs).all()
      assert np.abs(moving.log_probs - kept.log_probs).max() > 1e-4
      assert np.isfinite(same.log_probs).all()

  @pytest.mark.parametrize(
    ("targets", "told"),
    [
      ("qkv", "'remix' is not allowed; want reuse or recompute.*keys"),
      ("qo", "no adapter touches v"),
    ],
  )
  def test_is_refused_with_a_reason(self, base, adapters, targets, told):
    layer = dict.fromkeys(targets, None)
    layers = tuple(
      {name: full_lora(base.config.projection_shapes[name]) for name in layer}
      for _ in range(2)
    )
    with pytest.raises(InputError, match=told):
      decode(base, Adapters(adapters.names, layers), cache="remix")


def full_lora(shape):
  return Lora(
    jnp.ones((3, 2, shape[0])), jnp.ones((3, 2, shape[1])), jnp.ones(3)
  )


def slow_remix(base, adapters, text, gates):
  """Log-probabilities [T, V], values built anew for each query's gates."""
  config, count = base.config, LENGTH
  gates = np.concatenate([gates, np.zeros((count - len(text), 3))])
  frequencies = rope_frequencies(
    config.head_width, config.rope_theta, config.rope_scaling
  )
  angles = jnp.arange(count)[None, :, None, None] * frequencies
  x = base.embedding[...][padded(text)]
  for layer, loras in zip(base.layers, adapters.layers, strict=True):

    def adapted(name, h, gates, loras=loras):
      matrices = [dense("exact", loras[name], g) for g in gates]
      rows = [np.asarray(h)[0, t] @ m for t, m in enumerate(matrices)]
      return np.array(rows, np.float32)[None]

    h = rms_norm(x, layer.attention_norm[...], config.norm_eps)
    q, k, v = layer.qkv(h)
    q = q + adapted("q", h, gates)
    q, k = (y.reshape(1, count, -1, config.head_width) for y in (q, k))
    q, k = (rotate(y, jnp.cos(angles), jnp.sin(angles)) for y in (q, k))
    q, k, v = np.array(q), np.repeat(k, 2, axis=2), np.array(v)
    rows = []
    for t in range(count):
      values = v + adapted("v", h, [gates[t]] * count)
      values = values.reshape(1, count, -1, config.head_width)
      values = np.repeat(values, 2, axis=2)[0, : t + 1]
      scores = np.einsum("nh,snh->ns", q[0, t], k[0, : t + 1])
      weights = np.exp(scores / math.sqrt(config.head_width))
      weights /= weights.sum(axis=-1, keepdims=True)
      rows.append(np.einsum("ns,snh->nh", weights, values).ravel())
    x = x + layer.o(jnp.asarray(rows)[None])
    h = rms_norm(x, layer.mlp_norm[...], config.norm_eps)
    x = x + layer.down(jax.nn.silu(layer.gate(h)) * layer.up(h))
  hidden = rms_norm(x, base.norm[...], config.norm_eps)
  return np.asarray(jax.nn.log_softmax(base.logits(hidden)))[0]


@register_router("letter")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Letter(Newest):
  """Gates from the text alone, so that no cache policy changes them."""

  needs = "text"

  def observe(self, texts):
    return np.array([sum(map(ord, text)) % 97 for text in texts], np.float32)

  def gates(self, batch, observation, seen):
    return jax.nn.softmax(3 * jnp.sin(observation[:, None] * self.turns))


class Alphabet(Tokenizer):
  eos_token_id = None

  def decode(self, token_ids, skip_special_tokens=False):
    return "".join(chr(0x100 + token) for token in token_ids)


def decode_text(base, adapters, router, forced, **settings):
  config = DecodeConfig(NEW, **settings)
  *_, out = Decoder(
    base, PROMPTS, adapters, router, config, Alphabet(), forced=forced
  )
  return out


@pytest.mark.parametrize("cache", ["recompute", "remix"])
def test_a_text_router_moves_the_cache_too(base, adapters, cache):
  """Between the host's calls the same happens as inside the graph."""
  router = make_router("letter", turns=jnp.array([0.3, 1.1, 2.3]))
  forced = np.random.default_rng(1).integers(0, 48, (3, NEW))
  out = decode_text(
    base, adapters, router, forced, refresh_every=2, cache=cache
  )
  for i, prompt in enumerate(PROMPTS):
    text = [*prompt, *forced[i, :-1]]
    if cache == "remix":
      first = np.tile(out.gates[i, 0], (len(prompt) - 1, 1))
      gates = np.concatenate([first, out.gates[i]])
      rows = slow_remix(base, adapters, text, gates)[len(prompt) - 1 :]
    else:
      rows = [
        read(base, text[: len(prompt) + n], adapters, out.gates[i, n][None])[-1]
        for n in range(NEW)
      ]
    want = np.array(rows)[np.arange(NEW), forced[i]]
    np.testing.assert_allclose(out.log_probs[i], want, atol=1e-4)


# -----------------------------------------------------------------------------
# The posterior.


def alone(base, adapters, text, first):
  """Log-probability of each token from `first` on by each expert, [N, E]."""
  rows = []
  for gates in np.eye(3):
    log_probs = read(base, text, adapters, gates[None])
    places = np.arange(first, len(text))
    rows.append(log_probs[places - 1, np.array(text)[places]])
  return np.array(rows).T


FORCED = np.random.default_rng(2).integers(0, 48, (3, NEW))
PRIOR = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize("evidence", ["answer", "all"])
@pytest.mark.parametrize("rule", ["probabilities", "exact"])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_posterior_is_bayes_rule(base, adapters, rule, evidence, share):
  router = make_router(
    "posterior", prior=make_router("fixed", gates=PRIOR), evidence=evidence,
    share=share,
  )  # fmt: skip
  out = decode(base, adapters, router, FORCED, refresh_every=1, rule=rule)
  for i, prompt in enumerate(PROMPTS):
    text = [*prompt, *FORCED[i]]
    weights = PRIOR
    if evidence == "all":
      told = alone(base, adapters, prompt, 1).sum(axis=0)
      weights = share / 3 + (1 - share) * bayes(weights, told)
    for n, told in enumerate(alone(base, adapters, text, len(prompt))):
      np.testing.assert_allclose(out.gates[i, n], weights, atol=1e-4)
      if rule == "probabilities":
        want = np.log(np.sum(weights * np.exp(told)))
        np.testing.assert_allclose(out.log_probs[i, n], want, atol=1e-4)
      weights = share / 3 + (1 - share) * bayes(weights, told)


def bayes(weights, log_probs):
  weights = weights * np.exp(log_probs - log_probs.max())
  return weights / weights.sum()


def test_a_posterior_loses_at_most_log_e_to_the_best_expert(base, adapters):
  out = decode(
    base, adapters, make_router("posterior"), FORCED,
    refresh_every=1, rule="probabilities",
  )  # fmt: skip
  for i, prompt in enumerate(PROMPTS):
    text = [*prompt, *FORCED[i]]
    losses = -alone(base, adapters, text, len(prompt)).sum(axis=0)
    mixed = -out.log_probs[i].sum()
    assert losses.min() - 1e-3 < mixed <= losses.min() + math.log(3) + 1e-3
    # Exactly: the chance of a text is the prior's mean of the experts'.
    want = -np.log(np.mean(np.exp(-losses)))
    np.testing.assert_allclose(mixed, want, atol=1e-3)


@pytest.mark.parametrize("router", ["base", "threshold"])
def test_predictions_need_gates_that_are_not_all_zero(base, adapters, router):
  chosen = (
    make_router("uniform", threshold=0.5)
    if router == "threshold"
    else make_router("base")
  )
  with pytest.raises(InputError, match=r"'probabilities' is not allowed"):
    decode(base, adapters, chosen, rule="probabilities")
