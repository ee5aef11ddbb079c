"""A base from any path: a folder, a .gguf file, a hub id or `random:PRESET`."""

from __future__ import annotations

import functools
import math
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
import numpy as np

from tokenlora_jax.config import check_choice
from tokenlora_jax.interop.base import BaseReader, open_base
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.sharding import parameter_spec


def load_base(
  path: str,
  dtype: str = "bfloat16",
  mesh: Mesh | None = None,
  stacked: bool = False,
) -> Llama:
  """Loads a frozen Llama, tensor by tensor, straight onto its devices.

  A device reads only its own part of each tensor; host memory never holds a
  second copy of the model.

  Args:
    path: a Hugging Face folder, a .gguf file, a hub id, `package:NAME` or
      `random:PRESET` (seeded random weights).
    dtype: float32 or bfloat16.
    mesh: where the weights go; one device by default.
    stacked: the layout: stacked layers for training, a list for decoding.

  Returns:
    A `Llama`.

  Raises:
    InputError: the path, its config or a tensor is not what it should be.

  Example:
    >>> load_base("random:tiny").config.layers
    2
  """
  check_choice("base.dtype", dtype, ("float32", "bfloat16"))
  if path.startswith("random:"):
    preset = path.removeprefix("random:")
    check_choice("base.path random:", preset, tuple(PRESETS))
    make = functools.partial(_random, dtype=dtype, mesh=mesh)
    return Llama(PRESETS[preset], make, stacked, fingerprint=path)
  reader = open_base(path)
  make = functools.partial(_load, reader, dtype=dtype, mesh=mesh)
  return Llama(reader.config, make, stacked, reader.fingerprint())


def _sharding(name, shape, mesh):
  if mesh is None:
    return SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(mesh, parameter_spec(name, shape, mesh))


def _random(name, shape, *, dtype, mesh):
  """Normal weights of variance 1 / fan-in; norms are ones."""
  sharding = _sharding(name, shape, mesh)
  if "norm" in name:
    return jnp.ones(shape, dtype, device=sharding)
  stacked = ".*." in name
  # A layer draws from its own name, so that both layouts are one model.
  names = [name]
  if stacked:
    names = [name.replace("*", str(i)) for i in range(shape[0])]
  seeds = np.array([zlib.crc32(n.encode()) for n in names], np.uint32)
  scale = 0.02 if name == "embedding" else 1 / math.sqrt(shape[-2])
  return _drawer(shape, scale, dtype, sharding, stacked)(seeds)


@functools.cache
def _drawer(shape, scale, dtype, sharding, stacked):
  """Compiles once for all tensors that are alike."""

  def one(seed):
    normal = jax.random.normal(jax.random.key(seed), shape[stacked:])
    return (scale * normal).astype(dtype)

  def draw(seeds):
    return jax.lax.map(one, seeds) if stacked else one(seeds[0])

  return jax.jit(draw, out_shardings=sharding)


def _load(reader: BaseReader, name, shape, *, dtype, mesh):
  def read(index):
    if ".*." not in name:
      return reader.read(name, index).astype(dtype)
    layers = range(shape[0])[index[0]]
    parts = (name.replace("*", str(i)) for i in layers)
    # Filled layer by layer, so that only one more layer's tensor exists.
    sizes = [len(range(n)[s]) for n, s in zip(shape, index, strict=True)]
    out = np.empty(sizes, jnp.dtype(dtype))
    for i, part in enumerate(parts):
      out[i] = reader.read(part, index[1:])
    return out

  return jax.make_array_from_callback(shape, _sharding(name, shape, mesh), read)
