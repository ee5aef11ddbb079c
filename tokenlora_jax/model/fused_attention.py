"""Which program attends: a fused kernel of the accelerator, or plain XLA.

A fused kernel never has the [T, S] scores in memory. On TPU it is Pallas'
splash attention, which also skips the blocks that a causal mask leaves out; on
NVIDIA GPUs cuDNN's flash attention; elsewhere, and where a shape does not suit
the kernel, our own `attention`.

Axis letters: B batch, T length, N query heads, K kv heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tokenlora_jax.model.attention import ATTENTION, attention, causal_mask
from tokenlora_jax.model.llama import Attend


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to attend within rows of segments.

  Attributes:
    name: `xla`, `splash` or `cudnn`.
    attend: (q [B, T, N, H], k and v [B, K, T, H], mask) -> [B, T, N, H].
    mask: gives that mask for segment ids int32[B, T].
  """

  name: str
  attend: Attend
  mask: Callable[[jax.Array], Any]


XLA = Kernel("xla", attention, causal_mask)


def choose_kernel(
  mesh: Mesh, length: int, head_width: int, packed: bool
) -> Kernel:
  """Returns the fastest kernel that the devices and the shape allow.

  Args:
    mesh: its devices run the kernel; heads are split over its `tensor`.
    length: T.
    head_width: H.
    packed: whether a row may hold several segments.

  Example:
    >>> from tokenlora_jax.config import MeshConfig
    >>> from tokenlora_jax.parallel.sharding import make_mesh
    >>> mesh = make_mesh(MeshConfig(), devices=jax.devices("cpu")[:1])
    >>> choose_kernel(mesh, 1024, 128, packed=False).name
    'xla'
  """
  platform = mesh.devices.flat[0].platform
  if platform == "tpu" and length % _BLOCKS[-1] == 0:
    return Kernel("splash", _splash, lambda segment_ids: segment_ids)
  if platform in ("gpu", "cuda") and head_width % 8 == 0 and not packed:
    return Kernel("cudnn", _cudnn, _lengths)
  return XLA


# Rows and columns of scores that are in fast memory at once: the largest that
# divides the length.
_BLOCKS = (512, 256, 128)


def _splash(q, k, v, segment_ids):
  # XLA cannot split a Pallas call by itself: each device attends for its heads.
  heads = P(None, "tensor")
  split = jax.shard_map(
    _splash_heads,
    in_specs=(P(None, None, "tensor"), heads, heads, P()),
    out_specs=P(None, None, "tensor"),
    axis_names={"tensor"},
    check_vma=False,
  )
  return split(q, k, v, segment_ids)


def _splash_heads(q, k, v, segment_ids):
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
  """int32[B], the tokens of rows that are one segment and padding after it."""
  return jnp.sum(segment_ids > 0, axis=-1, dtype=jnp.int32)
