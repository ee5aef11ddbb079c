"""Quantisation of frozen kernels: int8 with a scale per output, or 4 bits.

  y = dot(x, quantize_int8(kernel))  # x [..., in], kernel [in, out...]

A kernel is an array [in, out...], or an `Int8` or `Nf4` in its place. Both are
pytrees whose arrays have the kernel's axes, or blocks of them, so they are
stacked, scanned, sharded and gathered as kernels are. A kernel is never
trained: a product passes its gradient to the activations alone, and the
backward pass dequantises the kernel again instead of saving it.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.model.config import LlamaConfig

# Inputs in a group of an `Nf4` that is packed together.
GROUP = 64

# Inputs that share a step. Errors in the kernels `qkv` and `down` cost most per
# weight, so their blocks are smaller.
BLOCK = 32
SMALL_BLOCK = 16
SMALL_BLOCKS = ("qkv", "down")

# The 16 levels with the least mean squared error for blocks of normal numbers,
# each block with its best scale, of either sign (Lloyd's algorithm). QLoRA's
# NormalFloat (Dettmers et al., 2023, appendix E) scales by the largest
# magnitude, so its levels reach to -1 and 1.
NF4_LEVELS = np.array([
  -0.9684, -0.6906, -0.5313, -0.4030, -0.2912, -0.1942, -0.1048, -0.0190,
  0.0666, 0.1552, 0.2480, 0.3482, 0.4608, 0.5974, 0.7797, 0.9571,
], np.float32)  # fmt: skip
_MIDDLES = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2

# The scales tried for a block, as shares of its largest magnitude.
SHARES = np.array([0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A kernel in int8 with one scale per output.

  W = values * scales, so y = (x values) * scales: W itself is never built.

  Attributes:
    values: int8[in, out...], -127 to 127.
    scales: float32[out...].

  Example:
    >>> kernel = quantize_int8(jnp.array([[1.0], [-2.0]]))
    >>> (kernel.values * kernel.scales).round(2).tolist()
    [[1.01], [-2.0]]
  """

  values: jax.Array
  scales: jax.Array

  def factors(self, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (matrix [in, out...] in `dtype`, scales [out...]).

    Args:
      dtype: dtype of the matrix.
    """
    return self.values.astype(dtype), self.scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
  """A kernel in 4-bit floats with an 8-bit step per block of inputs.

  W = level * step * scale: a level per number, a step per block, a scale per
  output. A code is the index of its level in `NF4_LEVELS`. Two codes share a
  byte: row i of a group of 64 inputs is in the low half of byte row i, row
  i + 32 in the high half.

  Attributes:
    codes: uint8[in / 64, 32, out...].
    steps: int8[in / 32 or 16, out...], -127 to 127.
    scales: float32[out...].

  Example:
    >>> kernel = quantize_nf4(jnp.linspace(-1, 1, 64)[:, None])
    >>> kernel.codes.shape, kernel.steps.shape, kernel.scales.shape
    ((1, 32, 1), (2, 1), (1,))
  """

  codes: jax.Array
  steps: jax.Array
  scales: jax.Array

  def factors(self, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (matrix [in, out...] in `dtype`, scales [out...]).

    Args:
      dtype: dtype of the matrix.
    """
    blocks, *outputs = self.steps.shape
    levels = _levels(_unpack(self.codes), dtype)
    levels = levels.reshape(blocks, -1, *outputs)
    matrix = levels * self.steps[:, None].astype(dtype)
    return matrix.reshape(-1, *outputs), self.scales


Kernel = jax.Array | Int8 | Nf4


def quantize_int8(kernel: Float[Array | np.ndarray, "I ..."]) -> Int8:
  """Quantises a kernel to int8: values = round(W / scales).

  scales = max over inputs of |W| / 127, the symmetric absmax.

  Args:
    kernel: [in, out...], any float type.

  Example:
    >>> quantize_int8(jnp.array([[1.0], [-2.0]])).values.tolist()
    [[64], [-127]]
  """
  # Only products: XLA may round a quotient differently from program to program.
  largest = jnp.abs(kernel).max(axis=0).astype(jnp.float32)
  scales = largest * jnp.float32(1 / 127)
  inverse = _divide(jnp.float32(1), scales)
  return Int8(jnp.round(kernel * inverse).astype(jnp.int8), scales)


def quantize_nf4(
  kernel: Float[Array | np.ndarray, "I ..."], block: int = BLOCK
) -> Nf4:
  """Quantises a kernel to 4 bits: the nearest level to each W / (step scale).

  Each block takes the step of least squared error among several of either sign.

  Args:
    kernel: [in, out...], any float type; `in` is a multiple of 64.
    block: inputs that share a step, a divisor of 64.

  Example:
    >>> found = quantize_nf4(jnp.linspace(-1, 1, 64)[:, None])
    >>> found.steps.tolist(), [f"{byte:02x}" for byte in found.codes[0, ::8, 0]]
    ([[-106], [106]], ['7f', 'ae', 'cc', 'ea'])
  """
  kernel = kernel.astype(jnp.float32)
  blocks = kernel.reshape(-1, block, *kernel.shape[1:])
  largest = jnp.abs(blocks).max(axis=1)
  scales = largest.max(axis=0) * (SHARES.max() / 127)

  def better(best, share):
    size = jnp.clip(
      jnp.round(_divide(largest * jnp.abs(share), scales)), 1, 127
    )
    step = jnp.sign(share) * size
    shares = _divide(blocks, (step * scales)[:, None])
    errors = functools.reduce(
      jnp.minimum, [jnp.square(shares - level) for level in NF4_LEVELS]
    )
    error = jnp.sum(errors, axis=1) * jnp.square(step)
    least, steps = best
    steps = jnp.where(error < least, step, steps)
    return (jnp.minimum(error, least), steps), None

  start = jnp.full(largest.shape, jnp.inf), jnp.zeros(largest.shape)
  (_, steps), _ = jax.lax.scan(better, start, np.append(SHARES, -SHARES))
  shares = _divide(blocks, (steps * scales)[:, None])
  above = [(shares > middle).astype(jnp.uint8) for middle in _MIDDLES]
  codes = sum(above).reshape(-1, GROUP, *kernel.shape[1:])
  return Nf4(_pack(codes), steps.astype(jnp.int8), scales)


# Kinds of quantisation.
QUANTIZERS = ("none", "int8", "nf4")


def get_quantizer(kind: str, name: str) -> Callable[[jax.Array], Kernel]:
  """Returns the function that quantises a kernel.

  Args:
    kind: a name of `QUANTIZERS`.
    name: the kernel's name, such as `layers.0.qkv.kernel`.

  Example:
    >>> get_quantizer("nf4", "layers.0.down.kernel")(jnp.ones((64, 1))).steps.shape
    (4, 1)
  """
  if kind == "nf4":
    small = name.split(".")[-2] in SMALL_BLOCKS
    return functools.partial(
      quantize_nf4, block=SMALL_BLOCK if small else BLOCK
    )
  return quantize_int8 if kind == "int8" else lambda kernel: kernel


def check_blocks(config: LlamaConfig, kind: str) -> None:
  """Raises `InputError` unless a Llama's kernels consist of whole blocks.

  Args:
    config: the shape of the Llama.
    kind: a name of `QUANTIZERS`.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> check_blocks(PRESETS["llama2-7b"], "nf4")
  """
  for name, (inputs, _) in config.projection_shapes.items():
    if kind == "nf4" and inputs % GROUP:
      raise InputError(
        f"base.quantize: 'nf4' is not allowed; want int8 or none, since {name}"
        f" has {inputs} inputs, no multiple of {GROUP}"
      )


def dot(x: Float[Array, "*B I"], kernel: Kernel) -> Float[Array, "..."]:
  """Multiplies activations with a kernel: y = x W.

  Args:
    x: [..., in].
    kernel: [in, out...]; a quantised one gets no gradient.

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
  """Returns x / by in float32, and 0 where `by` is 0 (then x is 0 too)."""
  return x.astype(jnp.float32) / jnp.where(by == 0, 1, by)


def _pack(codes):
  """Packs codes 0 to 15, uint8[blocks, 64, out...], two to a byte."""
  low, high = jnp.split(codes, 2, axis=1)
  return low | (high << 4)


def _unpack(packed):
  return jnp.concatenate([packed & 15, packed >> 4], axis=1)


def _levels(codes, dtype):
  """Returns the level of each code, by bisection: gathers are slow."""
  levels = [jnp.asarray(level, dtype) for level in NF4_LEVELS]
  for bit in range(4):
    odd = (codes >> bit) & 1 == 1
    pairs = zip(levels[::2], levels[1::2], strict=True)
    levels = [jnp.where(odd, high, low) for low, high in pairs]
  return levels[0]
