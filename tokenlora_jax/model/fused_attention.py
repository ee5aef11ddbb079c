"""Chooses the attention implementation: a fused kernel, or plain XLA.

A fused kernel never holds the [T, S] scores in memory. TPUs use Pallas' splash
attention, which also skips the blocks that a causal mask hides. NVIDIA GPUs use
cuDNN's flash attention. Other devices, and shapes that a kernel does not
support, use our own `attention`.

Axis letters: B batch, T length, N query heads, K kv heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from tokenlora_jax.model.attention import ATTENTION, attention, causal_mask
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.llama import Attend


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An attention implementation for training, without a cache.

  Attributes:
    name: `xla`, `splash` or `cudnn`.
    attend: (q [B, T, N, H], k and v [B, K, T, H], mask) -> [B, T, N, H].
    mask: computes that mask from segment ids int32[B, T].
  """

  name: str
  attend: Attend
  mask: Callable[[jax.Array], Any]


XLA = Kernel("xla", attention, causal_mask)


# Compute capabilities for GPUs that are only planned for: JAX has no device.
_CAPABILITIES = {
  "Tesla T4": (7, 5),
  "NVIDIA A100": (8, 0),
  "NVIDIA L4": (8, 9),
  "NVIDIA H100": (9, 0),
  "NVIDIA H200": (9, 0),
}


@runtime_checkable
class Accelerator(Protocol):
  """The two facts of a device that choose a kernel."""

  platform: str
  device_kind: str


@runtime_checkable
class Devices(Protocol):
  """The two facts of a mesh that choose a kernel: its devices and axes."""

  devices: np.ndarray
  shape: Mapping[str, int]


def compute_capability(device: Accelerator) -> tuple[int, int] | None:
  """Returns an NVIDIA GPU's compute capability, or None if it is unknown.

  Args:
    device: a device of any platform.

  Example:
    >>> compute_capability(jax.devices("cpu")[0]) is None
    True
  """
  try:
    major, minor = map(int, device.compute_capability.split("."))
  except (AttributeError, ValueError):
    # AMD GPUs report a name instead of numbers.
    kind = getattr(device, "device_kind", "")
    return next(
      (known for name, known in _CAPABILITIES.items() if kind.startswith(name)),
      None,
    )
  return major, minor


def choose_kernel(
  mesh: Devices,
  length: int,
  shape: LlamaConfig,
  dtype: jax.typing.DTypeLike,
  packed: bool,
) -> Kernel:
  """Returns the fastest kernel that the devices and the shape allow.

  cuDNN's flash attention needs a 16-bit dtype, compute capability 8.0 and a
  head width that is a multiple of 8, at most 128 (on Hopper up to 256, which no
  Llama has).

  Args:
    mesh: its devices run the kernel; heads are sharded over its `tensor` axis.
    length: T.
    shape: the base's shape: head width and sliding window.
    dtype: dtype of queries, keys and values.
    packed: whether a row may hold several segments.

  Example:
    >>> from tokenlora_jax.config import MeshConfig
    >>> from tokenlora_jax.parallel.sharding import make_mesh
    >>> mesh = make_mesh(MeshConfig(), devices=jax.devices("cpu")[:1])
    >>> from tokenlora_jax.model.config import PRESETS
    >>> shape = PRESETS["llama2-7b"]
    >>> choose_kernel(mesh, 1024, shape, jnp.bfloat16, packed=False).name
    'xla'
  """
  if shape.sliding_window is not None and length > shape.sliding_window:
    # The kernels below have no sliding window.
    return XLA
  device = mesh.devices.flat[0]
  if device.platform == "tpu" and length % _BLOCKS[-1] == 0:
    return Kernel("splash", _by_heads(_splash), lambda segments: segments)
  if (
    device.platform in ("gpu", "cuda")
    and not packed
    and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    and (compute_capability(device) or (0, 0)) >= (8, 0)
    and shape.head_width % 8 == 0
    and shape.head_width <= 128
  ):
    attend = _cudnn if mesh.devices.size == 1 else _by_heads(_cudnn)
    return Kernel("cudnn", attend, _lengths)
  return XLA


# Block sizes (rows and columns of scores in fast memory at once); the largest
# that divides the length is used.
_BLOCKS = (512, 256, 128)


def _by_heads(attend: Attend) -> Attend:
  # XLA cannot shard a Pallas call, nor cuDNN's under the training step's
  # `shard_map`, so each device attends for its own heads.
  heads = P(None, "tensor")
  return jax.shard_map(
    attend,
    in_specs=(P(None, None, "tensor"), heads, heads, P()),
    out_specs=P(None, None, "tensor"),
    axis_names={"tensor"},
    check_vma=False,
  )


def _splash(q, k, v, segment_ids):
  _, length, heads, width = q.shape
  block = next(b for b in _BLOCKS if length % b == 0)
  names = [f.name for f in dataclasses.fields(splash_attention.BlockSizes)]
  sizes = {name: block for name in names if name.startswith("block_")}
  causal = splash_attention.CausalMask((length, length))
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([causal] * heads),
    block_sizes=splash_attention.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=ATTENTION,
  )
  q = q.swapaxes(1, 2) / math.sqrt(width)
  segments = splash_attention.SegmentIds(segment_ids, segment_ids)
  mixed = jax.vmap(kernel)(q.astype(k.dtype), k, v, segments)
  return mixed.swapaxes(1, 2)


def _cudnn(q, k, v, lengths):
  return jax.nn.dot_product_attention(
    q, k.swapaxes(1, 2), v.swapaxes(1, 2),
    query_seq_lengths=lengths, key_value_seq_lengths=lengths,
    is_causal=True, implementation="cudnn",
  )  # fmt: skip


def _lengths(segment_ids):
  """Returns int32[B], the tokens of each row, at least 1.

  A row is one segment, then padding.
  """
  lengths = jnp.sum(segment_ids > 0, axis=-1, dtype=jnp.int32)
  # cuDNN cannot take the softmax over no keys, so a row of padding alone keeps
  # one. None of its tokens has a target, so the result does not matter.
  return jnp.maximum(lengths, 1)
