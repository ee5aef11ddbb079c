"""The Llama against transformers: modules first, then whole models."""

import dataclasses
import functools
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal
import torch
import transformers
from transformers.models.llama import modeling_llama as theirs

from tokenlora_jax.formats.load import load_base
from tokenlora_jax.mixing.mixture import Mixture, forward
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.cache import KV, Cache
from tokenlora_jax.model.config import RopeScaling
from tokenlora_jax.model.llama import rms_norm
from tokenlora_jax.model.lora import random_adapters
from tokenlora_jax.model.loss import token_losses
from tokenlora_jax.model.rope import rope_frequencies, rotate

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
# With theta 100 and these lengths a head of 16 has frequencies that are kept,
# that are divided and that are in between.
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
  "rope_theta": 100.0,
}
OUR_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)

CASES = {
  "multi-head": {"num_key_value_heads": 4},
  "grouped-query": {},
  "multi-query": {"num_key_value_heads": 1},
  "wide heads": {"head_dim": 20},
  "narrow heads": {"head_dim": 6},
  "tied": {"tie_word_embeddings": True},
  "biases": {"attention_bias": True, "mlp_bias": True},
  "attention bias": {"attention_bias": True},
  "odd theta": {
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.7}
  },
  "linear": {"rope_parameters": LINEAR},
  "llama3": {"rope_parameters": LLAMA3},
  "norm eps": {"rms_norm_eps": 0.3},
  "qwen2": {"family": "Qwen2"},
  "mistral": {"family": "Mistral", "sliding_window": None},
  "sliding window": {"family": "Mistral", "sliding_window": 6},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Returns (the torch model, its folder) of a case, built once."""
  made = {}

  def build(case):
    if case not in made:
      settings = dict(CASES[case])
      family = settings.pop("family", "Llama")
      sizes = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
      }
      config = getattr(transformers, f"{family}Config")(**sizes | settings)
      torch.manual_seed(len(made))
      torch_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
      # Large enough that attention is peaked, and biases and norms matter.
      for name, parameter in torch_model.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, centre, 0.2)
      folder = tmp_path_factory.mktemp("base")
      torch_model.save_pretrained(folder)
      made[case] = torch_model, str(folder)
    return made[case]

  return build


def random_tokens(batch, length, seed=0):
  return np.random.default_rng(seed).integers(0, 50, (batch, length))


class TestModules:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_rms_norm(self, dtype):
    x, scale = 3 * normal(2, 5, 32), normal(32, seed=1)
    norm = theirs.LlamaRMSNorm(32, eps=1e-2).to(getattr(torch, dtype))
    norm.weight.data[:] = torch.tensor(scale)
    want = norm(torch.tensor(x).to(norm.weight.dtype))
    got = rms_norm(jnp.asarray(x, dtype), jnp.asarray(scale, dtype), 1e-2)
    assert got.dtype == dtype
    # In bfloat16 this holds only if the statistics are float32.
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(
      got.astype(jnp.float32), want.detach().float(), rtol=tolerance, atol=1e-6
    )

  @pytest.mark.parametrize(
    ("parameters", "theta", "scaling"),
    [
      ({"rope_type": "default", "rope_theta": 5e5}, 5e5, RopeScaling()),
      (LINEAR, 1e4, RopeScaling("linear", 4.0)),
      (LLAMA3, 100.0, OUR_LLAMA3),
    ],
    ids=["none", "linear", "llama3"],
  )
  @pytest.mark.parametrize("width", [6, 16])
  def test_rope(self, parameters, theta, scaling, width):
    config = theirs.LlamaConfig(
      hidden_size=4 * width,
      num_attention_heads=4,
      max_position_embeddings=256,
      rope_parameters=parameters,
    )
    rope = theirs.LlamaRotaryEmbedding(config)
    frequencies = rope_frequencies(width, theta, scaling)
    np.testing.assert_allclose(frequencies, rope.inv_freq, rtol=1e-6)

    positions = np.array([[0, 1, 2, 200], [7, 7, 99, 3]])
    q, k = normal(2, 4, 4, width), normal(2, 4, 2, width, seed=1)
    cos, sin = rope(torch.tensor(q), torch.tensor(positions))
    want = theirs.apply_rotary_pos_emb(
      torch.tensor(q), torch.tensor(k), cos, sin, unsqueeze_dim=2
    )
    angles = jnp.asarray(positions)[:, :, None, None] * frequencies
    for x, rotated in zip((q, k), want, strict=True):
      got = rotate(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles))
      np.testing.assert_allclose(got, rotated, atol=3e-5)

  def test_llama3_has_all_three_regimes_here(self):
    ratio = rope_frequencies(16, 100.0, OUR_LLAMA3) / rope_frequencies(
      16, 100.0, RopeScaling()
    )
    assert ratio[0] == 1
    assert 1 / 8 < ratio[2] < 1
    np.testing.assert_allclose(ratio[-1], 1 / 8)

  @pytest.mark.parametrize("case", ["grouped-query", "biases"])
  def test_one_layer(self, model, case):
    torch_model, folder = model(case)
    x = normal(2, 9, 64)
    positions = torch.arange(9)[None]
    embedded = torch_model.model.rotary_emb(torch.tensor(x), positions)
    blocked = torch.triu(torch.full((9, 9), -torch.inf), diagonal=1)
    with torch.no_grad():
      want = torch_model.model.layers[1](
        torch.tensor(x),
        attention_mask=blocked[None, None],
        position_embeddings=embedded,
      )
    base = load_base(folder, "float32")
    angles = jnp.arange(9.0)[None, :, None, None] * rope_frequencies(
      16, 10_000.0, RopeScaling()
    )
    mask = causal_mask(jnp.ones((2, 9), int))
    rotation = jnp.cos(angles), jnp.sin(angles)
    got, kv = base.layers[1](jnp.asarray(x), rotation, mask)
    assert kv.k.shape == (2, base.config.kv_heads, 9, 16)
    np.testing.assert_allclose(got, want, atol=1e-4)


class TestLogits:
  @pytest.mark.parametrize("stacked", [False, True])
  @pytest.mark.parametrize("case", CASES)
  def test_are_those_of_transformers(self, model, case, stacked):
    torch_model, folder = model(case)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
      want = torch_model(torch.tensor(tokens)).logits
    got = forward(load_base(folder, "float32", stacked=stacked), tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4)

  @pytest.mark.parametrize("case", ["grouped-query", "sliding window"])
  def test_packed_segments_are_separate_sequences(self, model, case):
    base = load_base(model(case)[1], "float32")
    first, second = random_tokens(2, 5), random_tokens(2, 8, seed=1)
    tokens = np.concatenate([first, second, np.zeros((2, 3), int)], axis=1)
    segments = np.repeat([1, 2, 0], [5, 8, 3])[None].repeat(2, axis=0)
    positions = np.concatenate([np.arange(5), np.arange(8), np.zeros(3, int)])
    hidden, _ = jax.jit(base)(
      jnp.asarray(tokens),
      jnp.asarray(positions)[None].repeat(2, axis=0),
      causal_mask(jnp.asarray(segments)),
    )
    packed = base.logits(hidden)
    np.testing.assert_allclose(packed[:, :5], forward(base, first), atol=1e-5)
    np.testing.assert_allclose(
      packed[:, 5:13], forward(base, second), atol=1e-5
    )
    assert np.isfinite(packed).all()


class TestCache:
  @pytest.mark.parametrize("case", ["llama3", "sliding window"])
  def test_prefill_and_steps_are_the_whole_forward(self, model, case):
    """Rows of 7, 4 and 1 prompt tokens, padded on the left to 7."""
    base = load_base(model(case)[1], "float32")
    lengths, steps = np.array([7, 4, 1]), 6
    tokens = random_tokens(3, 7 + steps)
    adapters = random_adapters(base, experts=2, rank=3)
    gates = jnp.asarray([[0.4, 0.6], [1.0, 0.0], [-0.5, 1.0]])
    run = jax.jit(
      functools.partial(
        base, loras=adapters.layers, adapt=Mixture(get_rule("exact"), gates)
      )
    )
    # Row b reads tokens[b]; its pad slots hold a token that must not be seen.
    pad = 7 - lengths
    prompt = np.full((3, 7), 49)
    for row, n in enumerate(lengths):
      prompt[row, 7 - n :] = tokens[row, :n]
    places = np.arange(7) - pad[:, None]
    hidden, layers = run(
      jnp.asarray(prompt),
      jnp.maximum(places, 0),
      causal_mask(jnp.asarray(places >= 0, int)),
    )
    cache = Cache.of_prompt(layers, jnp.asarray(pad), 7 + steps + 2)
    assert cache.slot == 7
    outputs = [hidden]
    # One token, then three at once, then one by one.
    for first, last in ((0, 1), (1, 4), (4, 5), (5, 6)):
      columns = lengths[:, None] + np.arange(first, last)
      new = np.take_along_axis(tokens, columns, axis=1)
      hidden, cache = run(
        jnp.asarray(new),
        cache.positions(last - first),
        cache.mask(last - first),
        cache,
      )
      outputs.append(hidden)
    assert cache.slot == 7 + steps
    got = base.logits(jnp.concatenate(outputs, axis=1))
    want = forward(base, tokens, adapters, gates)
    for row, n in enumerate(lengths):
      np.testing.assert_allclose(
        got[row, pad[row] :], want[row, : n + steps], atol=1e-4
      )

  def test_steps_beyond_the_window_are_those_of_transformers(self, model):
    torch_model, folder = model("sliding window")
    base, step = load_base(folder, "float32"), jax.jit(lambda b, *x: b(*x))
    tokens = random_tokens(2, 20)
    with torch.no_grad():
      want = torch_model(torch.tensor(tokens)).logits
    places = jnp.arange(9)[None].repeat(2, axis=0)
    hidden, layers = base(
      jnp.asarray(tokens[:, :9]), places, causal_mask(jnp.ones((2, 9), int))
    )
    cache, outputs = Cache.of_prompt(layers, jnp.zeros(2, int), 20), [hidden]
    for i in range(9, 20):
      hidden, cache = step(
        base,
        jnp.asarray(tokens[:, i : i + 1]),
        cache.positions(1),
        cache.mask(1),
        cache,
      )
      outputs.append(hidden)
    got = base.logits(jnp.concatenate(outputs, axis=1))
    np.testing.assert_allclose(got, want, atol=1e-4)

  def test_no_window_and_a_wide_one_add_nothing(self, model):
    base = load_base(model("sliding window")[1], "float32")
    tokens = jnp.ones((1, 8), int)

    def program(window):
      base.config = dataclasses.replace(base.config, sliding_window=window)
      mask = causal_mask(tokens)
      run = jax.jit(lambda base: base(tokens, tokens, mask)[0])
      return run.lower(base).as_text()

    assert program(None) == program(8) != program(7)

  def test_positions_and_mask_of_a_padded_row(self):
    empty = KV(jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 1, 3, 4)))
    cache = Cache.of_prompt([empty], jnp.asarray([0, 2]), slots=6)
    assert cache.layers[0].k.shape == (2, 1, 6, 4)
    assert cache.positions(2).tolist() == [[3, 4], [1, 2]]
    assert cache.mask(2).astype(int).tolist() == [
      [[1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1]],
      [[0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 1, 1]],
    ]

  def test_appended_tokens_lie_in_their_slots(self):
    old = KV(jnp.zeros((1, 1, 2, 1)), jnp.zeros((1, 1, 2, 1)))
    new = KV(jnp.ones((1, 1, 1, 1)), 2 * jnp.ones((1, 1, 1, 1)))
    cache = Cache.of_prompt([old], jnp.zeros(1, int), slots=4)
    # Whatever `after` is, it moves nothing.
    for after, slot in ((jnp.nan, 3), (-7.0, 4)):
      cache = cache.append([new], jnp.full(2, after))
      assert cache.slot == slot
    assert cache.layers[0].k.ravel().tolist() == [0, 0, 1, 1]
    assert cache.layers[0].v.ravel().tolist() == [0, 0, 2, 2]

  def test_steps_write_it_in_place(self):
    base = load_base("random:tiny", "float32")
    tokens = jnp.ones((1, 3), int)
    _, layers = base(tokens, jnp.arange(3)[None], causal_mask(tokens))
    cache = Cache.of_prompt(layers, jnp.zeros(1, int), slots=8)

    def steps(base, cache):
      def step(carry, _):
        token, cache = carry
        hidden, cache = base(token, cache.positions(1), cache.mask(1), cache)
        return (base.logits(hidden).argmax(-1), cache), None

      return jax.lax.scan(step, (tokens[:, :1], cache), length=4)[0]

    compiled = jax.jit(steps, donate_argnums=1).lower(base, cache).compile()
    shape = ",".join(map(str, cache.layers[0].k.shape))
    made = re.findall(rf"f32\[{shape}\]\S* ([\w-]+)\(", compiled.as_text())
    assert "dynamic-update-slice" in made
    assert "copy" not in made

  def test_stacked_layers_do_not_decode(self, model):
    base = load_base(model("tied")[1], "float32", stacked=True)
    kv = KV(jnp.zeros((1, 4, 1, 16)), jnp.zeros((1, 4, 1, 16)))
    cache = Cache.of_prompt([kv] * 2, jnp.zeros(1, int), 4)
    with pytest.raises(ValueError, match="list layout"):
      base(
        jnp.zeros((1, 1), int), cache.positions(1), cache.mask(1), cache=cache
      )


class TestGradients:
  def adapter_gradient(self, base, loras, remat):
    """Returns the traced loss and gradient with respect to the adapters."""
    tokens = jnp.asarray(random_tokens(2, 8))
    adapt = Mixture(get_rule("exact"), jnp.asarray([[0.4, 0.6], [1.0, 0.0]]))

    def loss(loras):
      hidden, _ = base(
        tokens,
        jnp.arange(8)[None].repeat(2, axis=0),
        causal_mask(jnp.ones_like(tokens)),
        loras=loras,
        adapt=adapt,
        remat=remat,
      )
      return token_losses(base, hidden, tokens).mean()

    return jax.jit(jax.value_and_grad(loss)).trace(loras)

  @pytest.mark.parametrize("stacked", [False, True])
  def test_remat_computes_more_and_no_other_gradient(self, model, stacked):
    base = load_base(model("grouped-query")[1], "float32", stacked=stacked)
    adapters = random_adapters(base, experts=2, rank=3)
    loras = adapters.layers
    if stacked:
      loras = jax.tree.map(
        lambda x: x.swapaxes(0, 1), adapters.stack(base.config.layers)
      )
    traced = {
      remat: self.adapter_gradient(base, loras, remat)
      for remat in ("none", "elementwise", "full")
    }
    products = [str(x.jaxpr).count("dot_general") for x in traced.values()]
    assert products == sorted(set(products))
    if not stacked:
      return  # The layer that is run is the same one; compiling it is slow.
    quick = {"xla_backend_optimization_level": 0}
    (want_loss, want), *others = (
      trace.lower().compile(quick)(loras) for trace in traced.values()
    )
    want, restore = jax.flatten_util.ravel_pytree(want)
    assert all(x.any() for x in jax.tree.leaves(restore(want)))
    for loss, got in others:
      got, _ = jax.flatten_util.ravel_pytree(got)
      np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
      np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())

  @pytest.mark.parametrize(
    ("case", "length"),
    # Less than a chunk, one, and some with a rest.
    [("tied", 5), ("grouped-query", 64), ("tied", 150)],
  )
  @pytest.mark.parametrize("experts", [None, 3])
  def test_token_losses(self, model, case, length, experts):
    base = load_base(model(case)[1], "float32")
    shape = (2, length) if experts is None else (experts, 2, length)
    hidden = jnp.asarray(normal(*shape, 64))
    targets = jnp.asarray(np.random.default_rng(1).integers(0, 50, shape))
    # The weights a mask or a mean gives; zero for some.
    weights = jnp.asarray(np.maximum(normal(*shape, seed=2), 0))

    def plain(hidden, targets):
      shares = jax.nn.log_softmax(base.logits(hidden))
      return -jnp.take_along_axis(shares, targets[..., None], axis=-1)[..., 0]

    def ours(hidden, targets):
      return token_losses(base, hidden, targets)

    results = []
    for losses in (plain, ours):
      losses = losses if experts is None else jax.vmap(losses)

      def total(hidden, losses=losses):
        each = losses(hidden, targets)
        return (weights * each).sum(), each

      (_, each), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
        hidden
      )
      results.append((each, gradient))
    (want, want_gradient), (got, got_gradient) = results
    assert got.shape == shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_gradient, want_gradient, atol=1e-5)
    assert np.abs(want_gradient).max() > 0.1
