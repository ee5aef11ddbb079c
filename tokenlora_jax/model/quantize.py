"""Frozen kernels in few bits: int8 an output channel, or 4 bits a block.

A kernel is an array [in, out...], or one of the two classes here in its place.
Both are pytrees, and each axis of their arrays is an axis of the kernel, or
blocks of one: so they are stacked, scanned, split over devices and gathered
array by array, as kernels are. A kernel is never trained, so a product passes
its gradient on to the activations alone, and the backward pass makes the
numbers again from the few bits instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.model.config import LlamaConfig

# Inputs that share one scale of an `Nf4`.
BLOCK = 64

# What a standard normal variable's sixteenths look like, scaled to [-1, 1]: the
# 4-bit NormalFloat (Dettmers et al., 2023, "QLoRA", appendix E).
NF4_LEVELS = np.array([
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
_MIDDLES = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A kernel in 8 bits, with one scale an output.

  W = values * scales, so y = (x values) * scales: nothing is dequantised.

  Attributes:
    values: int8[in, out...], -127 to 127.
    scales: float32[out...].
  """

  values: jax.Array
  scales: jax.Array

  def factors(self, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (matrix [in, out...] in `dtype`, scales [out...])."""
    return self.values.astype(dtype), self.scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
  """A kernel in 4-bit NormalFloats, with one scale a block of 64 inputs.

  Two codes share a byte: row i of a block is in the low half of byte row i, row
  i + 32 in the high half. A code is the place of its level in `NF4_LEVELS`.

  Attributes:
    codes: uint8[in / 64, 32, out...].
    largest: bfloat16[in / 64, out...], the largest magnitude of each block.
  """

  codes: jax.Array
  largest: jax.Array

  def factors(self, dtype) -> tuple[jax.Array, float]:
    """Returns (matrix [in, out...] in `dtype`, 1)."""
    levels = _levels(_unpack(self.codes), dtype)
    matrix = levels * self.largest[:, None].astype(dtype)
    return matrix.reshape(-1, *matrix.shape[2:]), 1.0


Kernel = jax.Array | Int8 | Nf4


def quantize_int8(kernel: jax.Array) -> Int8:
  """Returns a kernel in 8 bits: values = round(W / scales).

  scales = max over inputs of |W| / 127, the symmetric absmax.

  Args:
    kernel: [in, out...], any float type.

  Example:
    >>> quantize_int8(jnp.array([[1.0], [-2.0]])).values.tolist()
    [[64], [-127]]
  """
  # Products alone: a quotient is a bit more or less, as XLA likes.
  largest = jnp.abs(kernel).max(axis=0).astype(jnp.float32)
  scales = largest * jnp.float32(1 / 127)
  inverse = _divide(jnp.float32(1), scales)
  return Int8(jnp.round(kernel * inverse).astype(jnp.int8), scales)


def quantize_nf4(kernel: jax.Array) -> Nf4:
  """Returns a kernel in 4 bits: of each W / largest the nearest level's code.

  Args:
    kernel: [in, out...], any float type; `in` is a multiple of 64.

  Example:
    >>> codes = quantize_nf4(jnp.linspace(-1, 1, 64)[:, None]).codes
    >>> [f"{byte:02x}" for byte in codes[0, ::8, 0].tolist()]
    ['70', 'a1', 'd2', 'e4']
  """
  blocks = kernel.reshape(-1, BLOCK, *kernel.shape[1:])
  largest = jnp.abs(blocks).max(axis=1).astype(jnp.bfloat16)
  shares = _divide(blocks, largest[:, None].astype(jnp.float32))
  above = [(shares > middle).astype(jnp.uint8) for middle in _MIDDLES]
  return Nf4(_pack(sum(above)), largest)


QUANTIZERS: dict[str, Callable[[jax.Array], Kernel]] = {
  "none": lambda kernel: kernel,
  "int8": quantize_int8,
  "nf4": quantize_nf4,
}


def check_blocks(config: LlamaConfig, kind: str) -> None:
  """Raises `InputError` unless the kernels of a Llama have whole blocks.

  Args:
    config: the shape of the Llama.
    kind: of `QUANTIZERS`.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> check_blocks(PRESETS["llama2-7b"], "nf4")
  """
  for name, (inputs, _) in config.projection_shapes.items():
    if kind == "nf4" and inputs % BLOCK:
      raise InputError(
        f"base.quantize: 'nf4' is not allowed; want int8 or none, since {name}"
        f" has {inputs} inputs, no multiple of {BLOCK}"
      )


def dot(x: jax.Array, kernel: Kernel) -> jax.Array:
  """Multiplies activations with a kernel: y = x W.

  Args:
    x: [..., in].
    kernel: [in, out...]; in few bits it passes no gradient to itself.

  Returns:
    [..., out...] in x's dtype.

  Example:
    >>> kernel = jnp.array([[1.0, 0.5], [-2.0, 4.0]])
    >>> dot(jnp.ones((1, 2)), quantize_int8(kernel)).round(2).tolist()
    [[-0.99, 4.5]]
  """
  if isinstance(kernel, (Int8, Nf4)):
    return _frozen_dot(x, kernel)
  return jnp.tensordot(x, kernel, axes=1)


@jax.custom_vjp
def _frozen_dot(x, kernel):
  matrix, scales = kernel.factors(x.dtype)
  y = jnp.tensordot(x, matrix, 1, preferred_element_type=jnp.float32)
  return (y * scales).astype(x.dtype)


def _forward(x, kernel):
  return _frozen_dot(x, kernel), kernel


def _backward(kernel, gradient):
  dtype = gradient.dtype
  matrix, scales = kernel.factors(dtype)
  outputs = tuple(range(1, matrix.ndim))
  last = tuple(range(-len(outputs), 0))
  scaled = (gradient * scales).astype(dtype)
  return jnp.tensordot(scaled, matrix, (last, outputs)), None


_frozen_dot.defvjp(_forward, _backward)


def _divide(x, by):
  """x / by in float32, and 0 where `by` is 0: then x is 0 too."""
  return x.astype(jnp.float32) / jnp.where(by == 0, 1, by)


def _pack(codes):
  """uint8[blocks, 64, out...] of 0 to 15 as uint8[blocks, 32, out...]."""
  low, high = jnp.split(codes, 2, axis=1)
  return low | (high << 4)


def _unpack(packed):
  return jnp.concatenate([packed & 15, packed >> 4], axis=1)


def _levels(codes, dtype):
  """The level of each code, by halving: accelerators gather slowly."""
  levels = [jnp.asarray(level, dtype) for level in NF4_LEVELS]
  for bit in range(4):
    odd = (codes >> bit) & 1 == 1
    pairs = zip(levels[::2], levels[1::2], strict=True)
    levels = [jnp.where(odd, high, low) for low, high in pairs]
  return levels[0]
