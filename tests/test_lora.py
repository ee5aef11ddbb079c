"""The stacked adapters and the exact rule, against slow and obvious twins."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import by_projection

from tokenlora_jax.config import InputError, LoraConfig
from tokenlora_jax.mixing.mixture import Mixture, forward
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import (
  Adapters,
  Lora,
  init_stacked,
  random_adapters,
)

CONFIG = LlamaConfig(
  vocab=40,
  width=24,
  mlp_width=36,
  layers=2,
  heads=4,
  kv_heads=2,
  head_width=10,
)
ALL_SEVEN = ("q", "k", "v", "o", "gate", "up", "down")


def random_weights(seed=0):
  """Returns a parameter factory and the weights that it has made, by name."""
  rng = np.random.default_rng(seed)
  made = {}

  def make(name, shape):
    made[name] = rng.normal(0, 0.3, shape).astype(np.float32)
    return jnp.asarray(made[name])

  return by_projection(CONFIG, make), made


def full_adapters(experts=3, ranks=(4, 2, 3), seed=1):
  """Random adapters on all seven maps, whose ranks are padded to the largest."""
  rng = np.random.default_rng(seed)
  layers = []
  for _ in range(CONFIG.layers):
    loras = {}
    for name, (fan_in, fan_out) in CONFIG.projection_shapes.items():
      a = rng.normal(0, 0.2, (experts, max(ranks), fan_in))
      b = rng.normal(0, 0.2, (experts, max(ranks), fan_out))
      for e, rank in enumerate(ranks):
        a[e, rank:] = b[e, rank:] = 0
      scaling = rng.uniform(0.5, 2.0, experts)
      loras[name] = Lora(
        *(jnp.asarray(x, jnp.float32) for x in (a, b, scaling))
      )
    layers.append(loras)
  return Adapters(tuple("xyz"[:experts]), tuple(layers))


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


class TestInit:
  LORA = LoraConfig(rank=8, alpha=4.0, targets=ALL_SEVEN)
  WIDE = LlamaConfig(
    vocab=8,
    width=256,
    mlp_width=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=32,
  )

  def init(self, *names, lora=LORA):
    return init_stacked(jax.random.key(0), self.WIDE, lora, names)

  def test_a_is_uniform_within_one_over_root_fan_in(self):
    for name, lora in self.init("x", "y").items():
      fan_in, _ = self.WIDE.projection_shapes[name]
      assert lora.a.shape == (2, 3, 8, fan_in)
      a = np.asarray(lora.a) * np.sqrt(fan_in)
      assert 0.98 < np.abs(a).max() <= 1.0
      # Six standard errors of the mean and of the variance 1/3.
      assert abs(a.mean()) < 6 * np.sqrt(1 / 3 / a.size)
      assert abs(a.var() - 1 / 3) < 6 * np.sqrt(4 / 45 / a.size)

  def test_b_is_zero_and_scaling_is_alpha_over_rank(self):
    for name, lora in self.init("x", "y").items():
      _, fan_out = self.WIDE.projection_shapes[name]
      assert lora.b.shape == (2, 3, 8, fan_out)
      assert not lora.b.any()
      np.testing.assert_array_equal(lora.scaling, np.full((2, 3), 0.5))

  def test_rslora_scales_by_the_root_of_the_rank(self):
    lora = LoraConfig(rank=16, alpha=4.0, rslora=True, targets=("q",))
    np.testing.assert_array_equal(
      self.init("x", lora=lora)["q"].scaling, np.ones((1, 3))
    )

  def test_an_expert_does_not_depend_on_the_others(self):
    both, alone = self.init("x", "y"), self.init("y")
    assert_same(jax.tree.map(lambda x: x[1:], both), alone)

  def test_no_two_maps_are_alike(self):
    drawn = [
      lora.a[e, layer, :, :32]
      for lora in self.init("x", "y").values()
      for e, layer in itertools.product(range(2), range(3))
    ]
    similarity = np.corrcoef(np.stack(drawn).reshape(len(drawn), -1))
    np.fill_diagonal(similarity, 0)
    assert np.abs(similarity).max() < 0.4


class TestAdapters:
  def test_stack_and_unstack_are_inverse(self):
    adapters = full_adapters()
    stacked = adapters.stack(depth=2)
    assert stacked["down"].a.shape == (3, 2, 4, 36)
    np.testing.assert_array_equal(
      stacked["k"].b[2, 1], adapters.layers[1]["k"].b[2]
    )
    again = Adapters.unstack(adapters.names, stacked)
    assert again.names == adapters.names
    assert_same(again.layers, adapters.layers)

  def test_layers_that_lack_a_map_or_rows_are_stacked_as_zeros(self):
    first, second = full_adapters().layers
    lora = second["q"]
    small = Lora(lora.a[:, :2], lora.b[:, :2], lora.scaling)
    uneven = Adapters(("x", "y", "z"), ({"k": first["k"]}, {"q": small}))
    stacked = uneven.stack(depth=3)
    assert stacked["k"].a.shape[1] == stacked["q"].b.shape[1] == 3
    np.testing.assert_array_equal(stacked["k"].a[:, 0], first["k"].a)
    np.testing.assert_array_equal(stacked["q"].b[:, 1], small.b)
    for absent in (stacked["k"].a[:, 1:], stacked["q"].a[:, [0, 2]]):
      assert not np.any(absent)
    np.testing.assert_array_equal(stacked["q"].scaling[:, 0], 0)

  def test_select_keeps_one_expert_and_its_axis(self):
    adapters = full_adapters()
    one = adapters.select("y")
    assert one.names == ("y",)
    assert_same(one.layers, jax.tree.map(lambda x: x[1:2], adapters.layers))
    assert_same(one.layers, adapters.select(1).layers)

  @pytest.mark.parametrize(
    ("expert", "message"),
    [
      ("gsm8", r"'gsm8' is not one of gsm8k, squad \(did you mean 'gsm8k'\?\)"),
      (2, "expert 2: the bank has experts 0 to 1"),
      (-1, "expert -1: the bank has experts 0 to 1"),
    ],
  )
  def test_an_expert_that_is_not_there(self, expert, message):
    adapters = Adapters(("gsm8k", "squad"), full_adapters(2, (2, 2)).layers)
    with pytest.raises(InputError, match=message):
      adapters.index(expert)
    with pytest.raises(InputError, match=message):
      adapters.select(expert)

  def test_check_wants_the_shapes_of_the_base(self):
    adapters = full_adapters()
    adapters.check(CONFIG)
    wider = dataclasses.replace(CONFIG, mlp_width=40)
    with pytest.raises(
      InputError,
      match=r"layer 0 gate .*\[24, 36\], but the base has \[24, 40\]",
    ):
      adapters.check(wider)
    shallow = dataclasses.replace(CONFIG, layers=1)
    with pytest.raises(InputError, match="2 layers, but the base has 1"):
      adapters.check(shallow)
    base = Llama(shallow, random_weights()[0])
    with pytest.raises(InputError, match="2 layers, but the base has 1"):
      forward(base, [[1, 2]], adapters, jnp.ones((1, 3)))

  def test_random_adapters_are_not_silent_and_follow_their_seed(self):
    base = Llama(CONFIG, random_weights()[0])
    adapters = random_adapters(base, experts=3, rank=5, seed=4)
    assert adapters.names == ("e0", "e1", "e2")
    adapters.check(CONFIG)
    for layer in adapters.layers:
      assert sorted(layer) == ["q", "v"]
      assert layer["v"].b.shape == (3, 5, 20)
      assert np.abs(layer["v"].b).min() > 0
      np.testing.assert_allclose(layer["v"].scaling, 16 / 5, rtol=1e-6)
    same = random_adapters(base, experts=3, rank=5, seed=4)
    assert_same(adapters.layers, same.layers)
    other = random_adapters(base, experts=3, rank=5, seed=5)
    assert (other.layers[0]["q"].a != adapters.layers[0]["q"].a).all()


class TestExact:
  TOKENS = np.random.default_rng(2).integers(0, CONFIG.vocab, (2, 7))

  @pytest.mark.parametrize("each", ["row", "token"])
  def test_one_map_is_the_merged_matrix(self, each):
    rng = np.random.default_rng(3)
    lora = full_adapters().layers[0]["gate"]
    a, b, scaling = (
      np.asarray(x, np.float64) for x in (lora.a, lora.b, lora.scaling)
    )
    x = rng.normal(size=(2, 5, CONFIG.width))
    gates = rng.uniform(-1, 1, (2, 3) if each == "row" else (2, 5, 3))
    want = np.zeros((2, 5, CONFIG.mlp_width))
    for row, t, e in itertools.product(range(2), range(5), range(3)):
      gate = gates[row, e] if each == "row" else gates[row, t, e]
      delta = gate * scaling[e] * a[e].T @ b[e]
      want[row, t] += x[row, t] @ delta
    mixture = Mixture(get_rule("exact"), jnp.asarray(gates, jnp.float32))
    got = mixture(lora, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)

  @pytest.mark.parametrize("stacked", [False, True])
  def test_forward_is_the_base_with_merged_kernels(self, stacked):
    adapters = full_adapters()
    gates = np.array([[0.7, 0.2, -0.4], [0.0, 1.0, 0.5]], np.float32)
    make, weights = random_weights()
    Llama(CONFIG, make)

    def merged(row):
      def make(name, shape):
        weight = weights[name].astype(np.float64)
        _, *place = name.split(".")
        if name.endswith(".kernel"):
          lora = adapters.layers[int(place[0])][place[1]]
          for e in range(3):
            delta = np.asarray(lora.a[e]).T @ np.asarray(lora.b[e])
            weight += gates[row, e] * float(lora.scaling[e]) * delta
        return jnp.asarray(weight, jnp.float32)

      return Llama(CONFIG, by_projection(CONFIG, make))

    want = [forward(merged(row), self.TOKENS[row : row + 1]) for row in (0, 1)]

    def load(name, shape):
      if ".*." not in name:
        return jnp.asarray(weights[name])
      return jnp.stack([weights[name.replace("*", str(i))] for i in (0, 1)])

    base = Llama(CONFIG, by_projection(CONFIG, load), stacked)
    got = forward(base, self.TOKENS, adapters, gates)
    np.testing.assert_allclose(got, np.concatenate(want), atol=1e-4)
    # The adapters matter, or this would be a test of the base.
    assert np.abs(got - forward(base, self.TOKENS)).max() > 0.5

  def test_gates_of_a_token_do_not_reach_tokens_before_it(self):
    base, adapters = Llama(CONFIG, random_weights()[0]), full_adapters()
    first, then = np.array([0.5, 0.2, 0.3]), np.array([0.0, 1.0, -1.0])
    gates = np.tile(first, (2, 7, 1))
    constant = forward(base, self.TOKENS, adapters, gates)
    np.testing.assert_allclose(
      constant,
      forward(base, self.TOKENS, adapters, np.tile(first, (2, 1))),
      atol=1e-5,
    )
    gates[:, 4:] = then
    moved = forward(base, self.TOKENS, adapters, gates)
    np.testing.assert_allclose(moved[:, :4], constant[:, :4], atol=1e-5)
    assert np.abs(moved - constant)[:, 4:].max(axis=-1).min() > 1e-2

  def test_zero_gates_are_the_base_bit_for_bit(self):
    base = Llama(CONFIG, random_weights()[0])
    silent = forward(base, self.TOKENS, full_adapters(), np.zeros((2, 3)))
    np.testing.assert_array_equal(silent, forward(base, self.TOKENS))

  @pytest.mark.parametrize("name", ["q", "down"])
  def test_the_padding_of_a_rank_gets_no_gradient(self, name):
    lora = full_adapters().layers[0][name]
    x = np.random.default_rng(3).normal(size=(2, 5, lora.a.shape[-1]))

    @jax.grad
    def gradient(lora):
      mixture = Mixture(get_rule("exact"), jnp.full((2, 3), 0.5))
      y = mixture(lora, jnp.asarray(x, jnp.float32))
      return (y**2).sum()

    for half in (gradient(lora).a, gradient(lora).b):
      for e, rank in enumerate((4, 2, 3)):
        assert not half[e, rank:].any()
        assert np.abs(half[e, :rank]).max(axis=-1).min() > 0

  @pytest.mark.parametrize("gates", [None, np.ones(3), np.ones((2, 4))])
  def test_gates_of_a_wrong_shape(self, gates):
    base = Llama(CONFIG, random_weights()[0])
    with pytest.raises(ValueError, match=r"\[B, E\] = \[2, 3\]"):
      forward(base, self.TOKENS, full_adapters(), gates)
