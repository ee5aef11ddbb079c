"""Loads a base from any path: a folder, .gguf file, hub id or `random:PRESET`.

  base = load_base("random:tiny")
  base.config.layers  # 2

Parameters are loaded one by one, layer by layer; each is put on its devices
before the next is read. So the host holds at most one device's shard of one
layer's parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import ctypes
import dataclasses
import functools
import math
from pathlib import Path
import re
from typing import TYPE_CHECKING
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
import numpy as np

from tokenlora_jax.config import check_choice
from tokenlora_jax.formats.locate import BaseReader, locate_base, read_base
from tokenlora_jax.formats.tokenizers import load_tokenizer, read_tokenizer
from tokenlora_jax.model.config import HUB_PRESETS, PRESETS, LlamaConfig
from tokenlora_jax.model.llama import Llama, join_heads
from tokenlora_jax.model.quantize import (
  QUANTIZERS,
  Kernel,
  check_blocks,
  get_quantizer,
)
from tokenlora_jax.parallel.sharding import (
  check_heads,
  decoding_mesh,
  tree_shardings,
)

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# A host array aligned to this becomes a CPU device's array without a copy.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
  """Shape and fingerprints of a base, without its weights.

  Attributes:
    config: the base's shape.
    fingerprint: a hash of its weights, the same as the `Llama`'s.
    fingerprint_1: the fingerprint in banks of earlier versions; "" if it is
      the same.
  """

  config: LlamaConfig
  fingerprint: str
  fingerprint_1: str = ""


@dataclasses.dataclass(frozen=True)
class Base:
  """A base on disk: opened once, for its shape, weights and tokenizer.

  Attributes:
    path: the base's path, as it was given.
    shape: the shape of the Llama.
    place: its folder or .gguf file; None for `random:PRESET`.
    reader: reads its tensors; None for `random:PRESET`.

  Example:
    >>> base = Base.open("random:tiny")
    >>> base.shape.layers, base.identity.fingerprint, base.tokenizer().encode("h")
    (2, 'random:tiny', [1, 108])
    >>> base.weights("float32").config == base.shape
    True
  """

  path: str
  shape: LlamaConfig
  place: Path | None = None
  reader: BaseReader | None = dataclasses.field(default=None, compare=False)

  @classmethod
  def open(cls, path: str) -> Base:
    """Finds a base and reads its files' headers.

    Args:
      path: as for `load_base`.

    Raises:
      InputError: there is no base at the path.
    """
    if path.startswith("random:"):
      return cls(path, _preset(path))
    place = locate_base(path)
    reader = read_base(place)
    return cls(path, reader.config, place, reader)

  @functools.cached_property
  def identity(self) -> BaseIdentity:
    """The base's shape and fingerprints."""
    if self.reader is None:
      return BaseIdentity(self.shape, self.path)
    prints = self.reader.fingerprint(), self.reader.fingerprint_1()
    return BaseIdentity(self.shape, *prints)

  def tokenizer(self) -> PreTrainedTokenizerFast:
    """Returns the base's tokenizer.

    Raises:
      InputError: it has none, or we cannot reproduce it exactly.
    """
    if self.place is None:
      tokenizer = load_tokenizer(self.path)
    else:
      tokenizer = read_tokenizer(self.place)
    # Rows are checked against it, since a tokenizer may know more tokens.
    tokenizer.base_vocab = self.shape.vocab
    return tokenizer

  def weights(
    self,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    stacked: bool = False,
    quantize: str = "none",
    devices: Sequence[jax.Device] = (),
  ) -> Llama:
    """Loads the weights straight onto their devices; see `load_base`.

    Args:
      dtype: float32 or bfloat16.
      mesh: the devices that hold the weights; one device by default.
      stacked: the layout: stacked layers for training, a list for decoding.
      quantize: `none` (kept in `dtype`), `int8` or `nf4`.
      devices: those to decode on, instead of a mesh: the weights are split
        between as many of them as divide every array.

    Raises:
      InputError: a tensor is invalid, or the shape does not allow this
        quantisation or sharding.
    """
    check_choice("base.dtype", dtype, ("float32", "bfloat16"))
    check_choice("base.quantize", quantize, QUANTIZERS)
    if len(devices) > 1:
      mesh = decoding_mesh(self.shape, devices, quantize)
    elif mesh is not None:
      check_heads(self.shape, mesh)
    check_blocks(self.shape, quantize)
    if self.reader is None:
      read = functools.partial(_draw, self.shape)
    else:
      read = functools.partial(_read, self.reader)
    make = _Factory(read, dtype, mesh, quantize)
    prints = self.identity.fingerprint, self.identity.fingerprint_1
    return Llama(self.shape, make, stacked, *prints)


def load_base(
  path: str,
  dtype: str = "bfloat16",
  mesh: Mesh | None = None,
  stacked: bool = False,
  quantize: str = "none",
) -> Llama:
  """Loads a frozen Llama, tensor by tensor, straight onto its devices.

  Each device reads only its own shard of a tensor. Host memory never holds a
  second copy of the model, nor do devices hold one that is not quantised yet.

  Args:
    path: a Hugging Face folder, a .gguf file, a hub id, `package:NAME` or
      `random:PRESET` (seeded random weights).
    dtype: float32 or bfloat16.
    mesh: the devices that hold the weights; one device by default.
    stacked: the layout: stacked layers for training, a list for decoding.
    quantize: quantisation of the layers' kernels: `none` (kept in `dtype`),
      `int8` or `nf4`. The fingerprint is that of the file's weights in any case.

  Returns:
    A `Llama`.

  Raises:
    InputError: there is no base at the path, its config or a tensor is invalid,
      or its shape does not allow this quantisation.

  Example:
    >>> load_base("random:tiny").config.layers
    2
  """
  return Base.open(path).weights(dtype, mesh, stacked, quantize)


def base_shape(path: str) -> LlamaConfig:
  """Returns the shape of the base at a path, without its weights.

  Args:
    path: as for `load_base`; well-known hub ids need no download.

  Raises:
    InputError: there is no base at the path.

  Example:
    >>> base_shape("meta-llama/Llama-2-7b-hf").layers
    32
  """
  if path in HUB_PRESETS and not Path(path).exists():
    return PRESETS[HUB_PRESETS[path]]
  return Base.open(path).shape


def identify_base(path: str) -> BaseIdentity:
  """Returns the identity of the base at a path, without loading its weights.

  Args:
    path: as for `load_base`.

  Raises:
    InputError: there is no base at the path.

  Example:
    >>> identify_base("random:tiny").fingerprint
    'random:tiny'
  """
  return Base.open(path).identity


def _preset(path: str) -> LlamaConfig:
  """Returns the shape of `random:PRESET`."""
  preset = path.removeprefix("random:")
  check_choice("base.path random:", preset, tuple(PRESETS))
  return PRESETS[preset]


@dataclasses.dataclass(frozen=True)
class _Factory:
  """Makes a Llama's parameters on their devices, in either layout.

  Attributes:
    read: (name, shape, dtype, sharding) -> a parameter of one layer, or one
      outside the layers.
    dtype: dtype of parameters that are not quantised.
    mesh: the devices.
    quantize: quantisation of the kernels.
  """

  read: Callable[..., jax.Array]
  dtype: str
  mesh: Mesh | None
  quantize: str

  def __call__(self, name: str, shape: tuple[int, ...]) -> Kernel:
    if ".*." not in name:
      kernel = self._one(name, shape)
      _trim()
      return kernel
    stack = None
    for i in range(shape[0]):
      layer = self._one(name.replace("*", str(i)), shape[1:])
      if stack is None:
        shapes = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct((shape[0], *x.shape), x.dtype), layer
        )
        places = _shardings(name, shapes, self.mesh)
        stack = jax.tree.map(
          lambda x, place: jnp.zeros(x.shape, x.dtype, device=place),
          shapes,
          places,
        )
      # Waits, so that the layers read do not pile up in host memory.
      stack = jax.block_until_ready(_inserter(places)(stack, layer, i))
      _trim()
    return stack

  def _one(self, name, shape):
    struct = jax.ShapeDtypeStruct(shape, self.dtype)
    place = _shardings(name, struct, self.mesh)
    x = self.read(name, shape, self.dtype, place)
    if self.quantize == "none" or not name.endswith(".kernel"):
      return x
    # All layers have one shape, so this compiles once.
    name = re.sub(r"\.\d+\.", ".*.", name)
    quantizer = _quantizer(self.quantize, name, struct, self.mesh)
    return jax.block_until_ready(quantizer(x))


@functools.cache
def _quantizer(kind, name, struct, mesh):
  quantize = get_quantizer(kind, name)
  places = _shardings(name, jax.eval_shape(quantize, struct), mesh)
  return jax.jit(quantize, out_shardings=places)


@functools.cache
def _inserter(places):
  """Puts a layer into stacked layers, in place."""

  def insert(stack, layer, i):
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, y: put(x, y, i, 0), stack, layer)

  return jax.jit(insert, donate_argnums=0, out_shardings=places)


def _trim():
  """Returns freed memory to the system: glibc keeps tens of MB per thread."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)


def _shardings(name, tree, mesh):
  """Returns the shardings of a parameter's arrays, a tree like `tree`."""
  if mesh is None:
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: place, tree)
  return tree_shardings({name: tree}, mesh)[name]


# -----------------------------------------------------------------------------
# Random weights.


def _draw(config: LlamaConfig, name, shape, dtype, sharding: Sharding):
  """Returns random normal weights of variance 1 / fan-in; norms are ones."""
  if "norm" in name:
    return jnp.ones(shape, dtype, device=sharding)
  # A parameter's name seeds it, so that both layouts are the same model.
  names, shapes = [name], [shape]
  if ".qkv." in name:
    names = [name.replace("qkv", p) for p in "qkv"]
    shapes = [config.projection_shapes[p] for p in "qkv"]
  seeds = np.array([zlib.crc32(n.encode()) for n in names], np.uint32)
  scale = 0.02 if name == "embedding" else 1 / math.sqrt(shapes[0][-2])
  drawer = _drawer(config, tuple(shapes), scale, dtype, sharding)
  return jax.block_until_ready(drawer(seeds))


@functools.cache
def _drawer(config, shapes, scale, dtype, sharding):
  """Returns a program that is compiled once for all tensors of one shape."""

  def draw(seeds):
    parts = [
      (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)
      for seed, shape in zip(seeds, shapes, strict=True)
    ]
    return parts[0] if len(parts) == 1 else join_heads(config, parts)

  return jax.jit(draw, out_shardings=sharding)


# -----------------------------------------------------------------------------
# Weights in a file.


def _read(reader: BaseReader, name, shape, dtype, sharding: Sharding):
  """Reads a parameter, one device's shard at a time."""
  devices = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    ends = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    devices.setdefault(tuple(ends), []).append(device)
  arrays = []
  for ends, alike in devices.items():
    part = _aligned([stop - start for start, stop in ends], jnp.dtype(dtype))
    _fill(part, reader, name, tuple(slice(*pair) for pair in ends))
    arrays += [jax.device_put(part, device) for device in alike]
    jax.block_until_ready(arrays)
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _aligned(shape, dtype):
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + _ALIGNMENT, np.uint8)
  start = -room.ctypes.data % _ALIGNMENT
  return room[start : start + size].view(dtype).reshape(shape)


def _fill(out, reader, name, index):
  """Fills `out` with part of a parameter; joins q, k and v by kv head."""
  if ".qkv." not in name:
    reader.fill(out, name, index)
    return
  config = reader.config
  group = config.heads // config.kv_heads
  ends = np.cumsum([group, 1, 1]) * config.head_width
  *inputs, features = index
  # A shard has whole kv heads: see sharding.check_heads.
  kv_heads = range(features.start // ends[-1], features.stop // ends[-1])
  for kv_head, part in zip(
    kv_heads, np.split(out, len(kv_heads), axis=-1), strict=True
  ):
    for p, own in zip("qkv", np.split(part, ends[:2], axis=-1), strict=True):
      size = own.shape[-1]
      rows = slice(kv_head * size, (kv_head + 1) * size)
      reader.fill(own, name.replace("qkv", p), (*inputs, rows))
