"""The mesh, and the one table that says how every array lies on it.

A parameter's path matches exactly one row, which names its axes; a second table
maps those names to axes of the mesh. Experts are split over `expert` and never
communicate; rows over `data` and `fsdp`; the frozen weights and the adapters
over `fsdp` and `tensor`.

The training step says itself what is sent over `expert`, `data` and `fsdp`: it
runs under `shard_map`, and `whole` puts a layer together where it is used. Left
to itself XLA sends activations instead, which are much larger. What `tensor`
splits, XLA finds out from the weights' shardings, and does well.
"""

from __future__ import annotations

from collections.abc import Sequence
import itertools
import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenlora_jax.config import InputError, MeshConfig
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.quantize import GROUP

MESH_AXES = ("expert", "data", "fsdp", "tensor")

# Path -> names of the last axes. Axes in front of them (stacked layers) are not
# split. `None` is an axis that is never split.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embedding", ("vocab", "width")),
  (r"head", ("width", "vocab")),
  (r"norm", (None,)),
  (r"layers\.(.+\.)?(attention|mlp)_norm", (None,)),
  # Kernels [in, out], or in few bits: int8 `values` with a scale an output, or
  # blocks of inputs, `steps` [blocks, out] and `codes` [blocks, bytes, out].
  (
    r"layers\.(.+\.)?(qkv|gate|up)\.kernel(\.values|\.steps)?",
    ("width", "features"),
  ),
  (
    r"layers\.(.+\.)?(o|down)\.kernel(\.values|\.steps)?",
    ("features", "width"),
  ),
  (
    r"layers\.(.+\.)?(qkv|gate|up)\.kernel\.codes",
    ("width", None, "features"),
  ),
  (r"layers\.(.+\.)?(o|down)\.kernel\.codes", ("features", None, "width")),
  (r"layers\.(.+\.)?(qkv|gate|up)\.(bias|kernel\.scales)", ("features",)),
  (r"layers\.(.+\.)?(o|down)\.kernel\.scales", ("width",)),
  (r"layers\.(.+\.)?(o|down)\.bias", (None,)),
  # Adapters and their optimizer moments, [E, L, R, in or out].
  (r"(.+\.)?(q|k|v|gate|up)\.a", ("expert", None, None, "width")),
  (r"(.+\.)?(q|k|v|gate|up)\.b", ("expert", None, None, "lora_features")),
  (r"(.+\.)?(o|down)\.a", ("expert", None, None, "lora_features")),
  (r"(.+\.)?(o|down)\.b", ("expert", None, None, "width")),
  (r"(.+\.)?scaling", ("expert", None)),
  # The optimizer counts each expert's steps.
  (r"(.+\.)?count", ("expert",)),
  (r"step", ()),
)

# What splits an axis of that name.
MESH_AXIS_OF = {
  "expert": "expert",
  "vocab": "tensor",
  "features": "tensor",
  # Adapters have an optimizer state too, so that no part of them is kept twice.
  "lora_features": ("fsdp", "tensor"),
  "width": "fsdp",
}

# The axes over which the training step says itself what is sent.
MANUAL_AXES = frozenset({"expert", "data", "fsdp"})

# A batch, [E, B, T].
BATCH_SPEC = P("expert", ("data", "fsdp"), None)


def make_mesh(
  config: MeshConfig, rows: int = 0, devices: Sequence | None = None
) -> Mesh:
  """Returns the mesh of a run.

  Args:
    config: devices an axis.
    rows: B, the rows an expert a step that the mesh has to split; 0 is none.
    devices: all devices that exist by default.

  Raises:
    InputError: the mesh takes more or fewer devices, or cannot split the rows.

  Example:
    >>> dict(make_mesh(MeshConfig(), devices=jax.devices()[:1]).shape)
    {'expert': 1, 'data': 1, 'fsdp': 1, 'tensor': 1}
  """
  devices = jax.devices() if devices is None else devices
  others = config.expert * config.data * config.tensor
  fsdp = config.fsdp or max(1, len(devices) // others)
  if others * fsdp != len(devices):
    raise InputError(
      f"mesh: expert {config.expert} x data {config.data} x fsdp {fsdp} x"
      f" tensor {config.tensor} takes {others * fsdp} devices, but there are"
      f" {len(devices)}; set --mesh.data or --mesh.fsdp so that they agree"
    )
  if rows % (config.data * fsdp):
    raise InputError(
      f"data.rows: {rows} is not a multiple of mesh data {config.data} x fsdp"
      f" {fsdp}, which split them"
    )
  # An axis of the chips' torus may have to be split among axes of the mesh,
  # which jax.make_mesh refuses.
  grid = mesh_utils.create_device_mesh(
    (config.expert, config.data, fsdp, config.tensor),
    devices,
    allow_split_physical_axes=True,
  )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def decoding_mesh(
  shape: LlamaConfig, devices: Sequence, quantize: str = "none"
) -> Mesh:
  """Returns a mesh for decoding, on as many devices as divide every array.

  Heads, the MLP and the vocabulary are split over its `tensor`.

  Args:
    shape: of the base.
    devices: that may be used; the first ones are.
    quantize: what kernels are kept in; groups of nf4 are not cut either.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> decoding_mesh(PRESETS["tiny"], jax.devices()[:1]).size
    1
  """
  # The kv heads divide all that heads split.
  parts = [shape.kv_heads, shape.mlp_width, shape.vocab]
  if quantize == "nf4":
    # The inputs of these two are split; those of the others are not.
    inputs = [shape.projection_shapes[name][0] for name in ("o", "down")]
    parts += [size // GROUP for size in inputs]
  tensor = math.gcd(len(devices), *parts)
  return make_mesh(MeshConfig(tensor=tensor), devices=devices[:tensor])


def check_heads(shape: LlamaConfig, mesh: Mesh) -> None:
  """Raises `InputError` unless the mesh splits a base between its kv heads."""
  if shape.kv_heads % mesh.shape["tensor"]:
    raise InputError(
      f"mesh.tensor: {mesh.shape['tensor']} does not divide the base's"
      f" {shape.kv_heads} kv heads"
    )


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Returns how the parameter of a path is split.

  Args:
    path: dotted, as in "layers.*.q.kernel" or "opt.mu.q.a".
    shape: of the parameter.
    mesh: the mesh.

  Raises:
    ValueError: no row or several match the path (a bug in the table).
    InputError: an axis cannot be split evenly.
  """
  spec = _spec(path, len(shape))
  for size, axes in zip(shape, spec, strict=True):
    parts = math.prod(mesh.shape[axis] for axis in _names(axes))
    if size % parts:
      raise InputError(
        f"mesh.{' x mesh.'.join(_names(axes))}: {parts} does not divide an axis"
        f" of {path}, which is {size} long"
      )
  return spec


def _spec(path: str, ndim: int) -> P:
  """The last `ndim` axes of a path's row."""
  rows = [axes for regex, axes in PARAMETER_AXES if re.fullmatch(regex, path)]
  if len(rows) != 1:
    raise ValueError(f"{path}: {len(rows)} sharding rules match; want one")
  spec = [MESH_AXIS_OF.get(axis) for axis in rows[0]]
  return P(*[None] * (ndim - len(spec)), *spec[max(len(spec) - ndim, 0) :])


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes that split one axis of an array."""
  return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def tree_shardings(tree, mesh: Mesh):
  """Returns the tree of `NamedSharding`s of a tree of arrays or shapes."""

  def one(path, leaf):
    return NamedSharding(mesh, parameter_spec(_dotted(path), leaf.shape, mesh))

  return jax.tree.map_with_path(one, tree)


def described(tree, mesh: Mesh):
  """Returns the shapes of a tree with their shardings, for compiling."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    tree_shardings(tree, mesh),
  )


def _dotted(path) -> str:
  names = [
    str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
    for key in path
  ]
  # What a Flax parameter holds is named value.
  return ".".join(name for name in names if name != "value")


def manual_specs(tree, mesh: Mesh):
  """Returns the specs of a tree's arrays over the axes of `MANUAL_AXES`."""

  def manual(sharding):
    return P(
      *(
        tuple(axis for axis in _names(axes) if axis in MANUAL_AXES) or None
        for axes in sharding.spec
      )
    )

  return jax.tree.map(manual, tree_shardings(tree, mesh))


def whole(tree, prefix: str = ""):
  """Puts together what `fsdp` splits, inside a `shard_map`.

  The gradient goes the way back: summed over the devices, each keeps its part.

  Args:
    tree: of this device's parts. Axes in front that a scan or a vmap took away
      may be missing.
    prefix: of the paths, as in "layers.".
  """

  return jax.tree.map_with_path(
    lambda path, x: _whole(prefix + _dotted(path), x), tree
  )


def whole_ends(base):
  """Returns a base, put together as `whole` does, but for its layers."""

  def one(path, x):
    name = _dotted(path)
    return x if name.startswith("layers.") else _whole(name, x)

  return jax.tree.map_with_path(one, base)


def _whole(name, x):
  for i, axes in enumerate(_spec(name, x.ndim)):
    if "fsdp" in _names(axes):
      # A name by which a compiled program is read: see plan/program.py.
      with jax.named_scope("whole"):
        x = jax.lax.all_gather(x, "fsdp", axis=i, tiled=True)
  return x


def process_block(
  mesh: Mesh, experts: int, rows: int
) -> tuple[list[int], list[int]]:
  """Returns which part of a batch [E, B, T] this process's devices hold.

  Args:
    mesh: the mesh.
    experts: E.
    rows: B.

  Returns:
    (experts, rows): the process holds each of these rows of each of these
    experts, and nothing else.

  Raises:
    InputError: some process does not hold such a block, or two hold parts of
      the same experts or rows.

  Example:
    >>> process_block(make_mesh(MeshConfig(), devices=jax.devices()[:1]), 2, 3)
    ([0, 1], [0, 1, 2])
  """
  sharding = NamedSharding(mesh, BATCH_SPEC)
  held: dict[int, set[tuple[int, int]]] = {}
  for device, index in sharding.devices_indices_map((experts, rows, 1)).items():
    cells = itertools.product(range(experts)[index[0]], range(rows)[index[1]])
    held.setdefault(device.process_index, set()).update(cells)
  blocks = {
    process: tuple(sorted(set(axis)) for axis in zip(*cells, strict=True))
    for process, cells in held.items()
  }
  # All processes look at all blocks, so that all refuse the same mesh.
  whole = all(
    len(held[process]) == len(block[0]) * len(block[1])
    for process, block in blocks.items()
  )
  for axis, size in enumerate((experts, rows)):
    parts = {tuple(block[axis]) for block in blocks.values()}
    whole &= sum(map(len, parts)) == size and len(set(map(len, parts))) == 1
  if not whole:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    raise InputError(
      f"mesh: {axes} cuts experts and rows across {len(blocks)} processes;"
      " choose axes so that each process holds the same rows of all its experts"
    )
  return blocks[jax.process_index()]
