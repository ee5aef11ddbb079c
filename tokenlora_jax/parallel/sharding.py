"""The device mesh, and the table of every array's sharding.

  parameter_spec("layers.*.q.a", shape, mesh)  # -> a PartitionSpec

A parameter's path matches exactly one row of the table, which names its axes; a
second table maps those names to axes of the mesh. Experts are sharded over
`expert` and never communicate; rows over `data` and `fsdp`; the frozen weights
and the adapters over `fsdp` and `tensor`.

The training step runs under `shard_map` and does its own communication over
`expert`, `data` and `fsdp`: `whole` gathers a layer where it is used. XLA on
its own would send activations, which are much larger. Over `tensor` XLA derives
the communication from the weights' shardings, and does it well.
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

# Path -> names of the last axes. Axes before them (stacked layers), and those
# that are `None`, are never sharded.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embedding", ("vocab", "width")),
  (r"head", ("width", "vocab")),
  (r"norm", (None,)),
  (r"layers\.(.+\.)?(attention|mlp)_norm", (None,)),
  # Kernels [in, out], or quantised: int8 `values` with a scale per output, or
  # nf4 `steps` [blocks, out] and `codes` [blocks, bytes, out].
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
  # The optimizer's step count of each expert.
  (r"(.+\.)?count", ("expert",)),
  (r"step", ()),
)

# Name of an axis -> the mesh axes that shard it.
MESH_AXIS_OF = {
  "expert": "expert",
  "vocab": "tensor",
  "features": "tensor",
  # Adapters are sharded over both axes, since they have an optimizer state too.
  "lora_features": ("fsdp", "tensor"),
  "width": "fsdp",
}

# The axes over which the training step does its own communication.
MANUAL_AXES = frozenset({"expert", "data", "fsdp"})

# The sharding of a batch, [E, B, T].
BATCH_SPEC = P("expert", ("data", "fsdp"), None)


def make_mesh(
  config: MeshConfig, rows: int = 0, devices: Sequence | None = None
) -> Mesh:
  """Returns the mesh of a run.

  Args:
    config: number of devices per axis.
    rows: B, rows per expert and step, which the mesh must divide; 0 is none.
    devices: the devices; all by default.

  Raises:
    InputError: the mesh takes more or fewer devices, or cannot divide the rows.

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
  # One axis of the chips' torus may have to serve several axes of the mesh;
  # jax.make_mesh refuses that.
  grid = mesh_utils.create_device_mesh(
    (config.expert, config.data, fsdp, config.tensor),
    devices,
    allow_split_physical_axes=True,
  )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def decoding_mesh(
  shape: LlamaConfig, devices: Sequence, quantize: str = "none"
) -> Mesh:
  """Returns a mesh for decoding, on the most devices that divide every array.

  Heads, the MLP and the vocabulary are sharded over its `tensor` axis.

  Args:
    shape: the base's shape.
    devices: the available devices; the first ones are used.
    quantize: quantisation of the kernels; groups of nf4 are not cut.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> decoding_mesh(PRESETS["tiny"], jax.devices()[:1]).size
    1
  """
  # A divisor of the kv heads divides every axis of heads.
  parts = [shape.kv_heads, shape.mlp_width, shape.vocab]
  if quantize == "nf4":
    # Only these two are sharded along their inputs.
    inputs = [shape.projection_shapes[name][0] for name in ("o", "down")]
    parts += [size // GROUP for size in inputs]
  tensor = math.gcd(len(devices), *parts)
  return make_mesh(MeshConfig(tensor=tensor), devices=devices[:tensor])


def check_heads(shape: LlamaConfig, mesh: Mesh) -> None:
  """Raises `InputError` unless `tensor` divides the base's kv heads.

  Args:
    shape: the base's shape.
    mesh: the mesh.

  Raises:
    InputError: the axis `tensor` cannot divide the heads.
  """
  if shape.kv_heads % mesh.shape["tensor"]:
    raise InputError(
      f"mesh.tensor: {mesh.shape['tensor']} does not divide the base's"
      f" {shape.kv_heads} kv heads"
    )


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Returns the `PartitionSpec` of a parameter.

  Args:
    path: dotted, as in "layers.*.q.kernel" or "opt.mu.q.a".
    shape: the parameter's shape.
    mesh: the mesh.

  Raises:
    ValueError: no row of the table or several match the path (a bug).
    InputError: an axis cannot be divided evenly.

  Example:
    >>> mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    >>> tuple(parameter_spec("layers.*.q.a", (2, 4, 16, 64), mesh))
    ('expert', None, None, 'fsdp')
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
  """Returns the last `ndim` axes of a path's row."""
  rows = [axes for regex, axes in PARAMETER_AXES if re.fullmatch(regex, path)]
  if len(rows) != 1:
    raise ValueError(f"{path}: {len(rows)} sharding rules match; want one")
  spec = [MESH_AXIS_OF.get(axis) for axis in rows[0]]
  return P(*[None] * (ndim - len(spec)), *spec[max(len(spec) - ndim, 0) :])


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes that shard one axis of an array, as a tuple."""
  return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def tree_shardings(tree, mesh: Mesh):
  """Returns a tree's `NamedSharding`s; leaves are arrays or shapes.

  Args:
    tree: a pytree of arrays, or of shapes.
    mesh: the mesh.
  """

  def one(path, leaf):
    return NamedSharding(mesh, parameter_spec(_dotted(path), leaf.shape, mesh))

  return jax.tree.map_with_path(one, tree)


def described(tree, mesh: Mesh):
  """Returns a tree's shapes with shardings, to compile without arrays.

  Args:
    tree: a pytree of arrays, or of shapes.
    mesh: the mesh.

  Example:
    >>> mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    >>> norm = jax.ShapeDtypeStruct((64,), "float32")
    >>> described({"norm": norm}, mesh)["norm"].shape
    (64,)
  """
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
  # The array inside a Flax parameter has the key "value".
  return ".".join(name for name in names if name != "value")


def manual_specs(tree, mesh: Mesh):
  """Returns a tree's `PartitionSpec`s over `MANUAL_AXES` alone.

  Args:
    tree: a pytree of arrays, or of shapes.
    mesh: the mesh.
  """

  def manual(sharding):
    return P(
      *(
        tuple(axis for axis in _names(axes) if axis in MANUAL_AXES) or None
        for axes in sharding.spec
      )
    )

  return jax.tree.map(manual, tree_shardings(tree, mesh))


def whole(tree, prefix: str = ""):
  """Gathers arrays that are sharded over `fsdp`, inside a `shard_map`.

  The backward pass sums the gradient over the devices and scatters it.

  Args:
    tree: this device's shards. Leading axes that a scan or vmap removed may be
      missing.
    prefix: prefix of the paths, such as "layers.".
  """

  return jax.tree.map_with_path(
    lambda path, x: _whole(prefix + _dotted(path), x), tree
  )


def whole_ends(base):
  """Gathers all arrays of a base except its layers, as `whole` does.

  Args:
    base: a `Llama`, inside a `shard_map`.
  """

  def one(path, x):
    name = _dotted(path)
    return x if name.startswith("layers.") else _whole(name, x)

  return jax.tree.map_with_path(one, base)


def _whole(name, x):
  for i, axes in enumerate(_spec(name, x.ndim)):
    if "fsdp" in _names(axes):
      # plan/program.py finds this name in the compiled program.
      with jax.named_scope("whole"):
        x = jax.lax.all_gather(x, "fsdp", axis=i, tiled=True)
  return x


def process_block(
  mesh: Mesh, experts: int, rows: int
) -> tuple[list[int], list[int]]:
  """Returns the block of a batch [E, B, T] that this process's devices hold.

  Args:
    mesh: the mesh.
    experts: E.
    rows: B.

  Returns:
    (experts, rows), indices: the process holds all these rows of all these
    experts, and nothing else.

  Raises:
    InputError: a process's shard is not such a block, or two blocks overlap in
      part.

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
  # Every process checks every block, so that all refuse the same mesh.
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
