"""Reads one adapter from a folder of PEFT or mlx-lm."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenlora_jax.config import InputError, nearest
from tokenlora_jax.formats.peft_config import PeftConfig, read_mlx
from tokenlora_jax.formats.peft_keys import (
  MODULES,
  Place,
  parse_key,
  tell,
  why_unknown,
)
from tokenlora_jax.formats.tensors import (
  TensorFile,
  check_fetched,
  is_finite,
  open_tensors,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# mlx-lm's.
_MLX_WEIGHTS = "adapters.safetensors"

LORA_KEY = "base_model.model.{}.lora_{}.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
# The most frequent reason for an empty tensor.
_EMPTY = (
  "is empty, as DeepSpeed ZeRO-3 leaves a tensor that it did not gather; save"
  " with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py"
)


class Factors(NamedTuple):
  """One expert's adapter of one linear map: adds scaling (x a^T) b.

  Attributes:
    a: float32[R, in].
    b: float32[R, out].
    scaling: alpha / R.

  Example:
    >>> one = Factors(np.ones((4, 64)), np.ones((4, 32)), scaling=2.0)
    >>> one.a.shape, one.b.shape
    ((4, 64), (4, 32))
  """

  a: np.ndarray
  b: np.ndarray
  scaling: float


class StoredAdapter(NamedTuple):
  """One adapter, read from a folder.

  Attributes:
    base: the path or hub id of the base in its config, or "".
    maps: its maps, by layer and projection.
  """

  base: str
  maps: Mapping[tuple[int, str], Factors]


def adapter_shapes(
  folder: str | Path,
) -> dict[tuple[int, str], tuple[int, int]]:
  """Returns [in, out] of an adapter's maps; reads only the file's header.

  Args:
    folder: a PEFT folder.

  Raises:
    InputError: the folder or file is missing or damaged.
  """
  sizes: dict[tuple[int, str], dict[str, int]] = {}
  with open_tensors(_file(Path(folder), WEIGHTS)) as file:
    for key in file.keys():  # noqa: SIM118 (it is no mapping)
      place = parse_key(key)
      shape = file.get_slice(key).get_shape()
      if place is not None and len(shape) == 2:
        size = shape[(place.half == "A") != place.is_mlx]
        sizes.setdefault((place.layer, place.projection), {})[place.half] = size
  return {
    place: (halves["A"], halves["B"])
    for place, halves in sizes.items()
    if len(halves) == 2
  }


def read_adapter(folder: str | Path) -> StoredAdapter:
  """Reads one adapter from a folder of PEFT or mlx-lm.

  Tensor names may also be those of wrappers (torch.compile, FSDP), a state_dict
  or AutoModel.

  Args:
    folder: a folder with adapter_config.json and adapter_model.safetensors, or
      mlx-lm's adapters.safetensors.

  Raises:
    InputError: as in `load_adapters`.

  Example:
    >>> import tempfile
    >>> from tokenlora_jax import load_base, random_adapters, save_adapter
    >>> adapters = random_adapters(load_base("random:tiny"), experts=1, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_adapter(adapters, "e0", folder)
    ...   len(read_adapter(folder).maps), adapter_shapes(folder)[0, "v"]
    (4, (64, 32))
  """
  folder = Path(folder)
  config_file = _file(folder, CONFIG)
  is_mlx = not (folder / WEIGHTS).exists() and (folder / _MLX_WEIGHTS).exists()
  path = _file(folder, _MLX_WEIGHTS if is_mlx else WEIGHTS)
  with open_tensors(path) as file:
    keys = list(file.keys())
    places = {key: parse_key(key) for key in keys}
    problems: dict[str, list[str]] = collections.defaultdict(list)
    roots = {place.root for place in places.values() if place is not None}
    if len(roots) > 1:
      raise InputError(
        f"{path}: some names have `model.` before `layers.` and others have"
        " not; want one of the two"
      )
    root = roots.pop() if roots else "model."
    if is_mlx:
      config = read_mlx(config_file, {
        _path(root, place.layer, place.projection)
        for place in places.values() if place is not None
      })  # fmt: skip
    else:
      config = PeftConfig.read(config_file)
    halves = _read_halves(file, places, config, problems)
  maps = _read_maps(halves, root, config, problems)
  if not (maps or problems):
    raise InputError(f"{path}: it has no tensors")
  if problems:
    raise InputError(f"{path}: {tell(problems)}")
  return StoredAdapter(config.base_model_name_or_path, maps)


def _path(root: str, layer: int, projection: str) -> str:
  return f"{root}layers.{layer}.{MODULES[projection]}"


def _read_halves(
  file: TensorFile,
  places: Mapping[str, Place | None],
  config: PeftConfig,
  problems: Mapping[str, list[str]],
) -> dict[tuple[int, str], dict[str, np.ndarray]]:
  """Returns {"A": [R, in], "B": [out, R]} of each map; adds to `problems`."""
  halves: dict[tuple[int, str], dict[str, np.ndarray]] = {}
  for key, place in places.items():
    stored = file.get_slice(key)
    dtype, shape = stored.get_dtype(), stored.get_shape()
    if place is None:
      problems[why_unknown(key)].append(key)
    elif not config.is_target(_path(*place[:3])):
      problems[f"is not a target in {CONFIG}"].append(key)
    elif dtype not in _FLOATS:
      problems[f"is {dtype}, not one of {', '.join(_FLOATS)}"].append(key)
    elif 0 in shape:
      problems[_EMPTY].append(key)
    elif place.half in halves.setdefault((place.layer, place.projection), {}):
      problems[
        "is of a map that another tensor is of, too; want one adapter a file"
      ].append(key)
    else:
      tensor = np.asarray(file.get_tensor(key), np.float32)
      if not is_finite(tensor):
        # An error even if its gate is 0, since 0 x NaN is NaN.
        problems["holds NaN or infinity, which spoils every mixture"].append(
          key
        )
      tensor = tensor.T if place.is_mlx else tensor
      halves[place.layer, place.projection][place.half] = tensor
  return halves


def _read_maps(
  halves: Mapping[tuple[int, str], Mapping[str, np.ndarray]],
  root: str,
  config: PeftConfig,
  problems: Mapping[str, list[str]],
) -> dict[tuple[int, str], Factors]:
  """Returns the maps on which config and tensors agree; adds to `problems`."""
  maps = {}
  told = {name for names in problems.values() for name in names}
  depth = 1 + max((layer for layer, _ in halves), default=-1)
  for layer in range(depth):
    for name in MODULES:
      target = _path(root, layer, name)
      if not config.is_target(target):
        continue
      found = halves.get((layer, name), {})
      if missing := [half for half in "AB" if half not in found]:
        keys = [LORA_KEY.format(target, half) for half in missing]
        problems["is missing"] += [key for key in keys if key not in told]
        continue
      rank, scaling = config.rank_and_scaling(target)
      a, b = found["A"], found["B"]
      if not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == rank):
        problems[
          f"has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives it"
          f" rank {rank}: want [{rank}, in], [out, {rank}]"
        ].append(target)
        continue
      maps[layer, name] = Factors(a, b.T, scaling)
  return maps


def _file(folder: Path, name: str) -> Path:
  """Returns the path of a folder's file, or raises `InputError`."""
  if not folder.is_dir():
    parent = folder.parent
    beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    raise InputError(
      f"{folder}: there is no such folder{nearest(folder.name, beside)}"
    )
  path = folder / name
  if path.exists():
    check_fetched(path)
    return path
  inside = sorted(p.name for p in folder.iterdir())
  if name == WEIGHTS and "adapter_model.bin" in inside:
    raise InputError(
      f"{folder}: adapter_model.bin is a pickle, which is never opened; convert"
      " it with PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
    )
  raise InputError(f"{folder}: there is no {name}{nearest(name, inside)}")
