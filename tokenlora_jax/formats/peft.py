"""Adapters in PEFT's folders, read and written.

A folder holds adapter_config.json and adapter_model.safetensors. Folders are
foreign: nothing in them is trusted, and a tensor that has no place, or a place
that has no tensor, is an error.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
from pathlib import Path
import re
import shutil
import tempfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tokenlora_jax.config import PROJECTIONS, InputError, nearest
from tokenlora_jax.formats.peft_config import PeftConfig, describe
from tokenlora_jax.model.lora import Adapters, Lora

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

# Our linear maps and PEFT's modules inside a layer.
_MODULES = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
_PROJECTION_OF = {module: name for name, module in _MODULES.items()}

_LORA_KEY = "base_model.model.{}.lora_{}.weight"
# Layer numbers have at most three digits, so that a made-up one cannot make the
# bank endlessly deep.
_LORA_KEY_REGEX = re.compile(
  r"base_model\.model\.(model\.layers\.(0|[1-9][0-9]{0,2})"
  rf"\.({'|'.join(map(re.escape, _PROJECTION_OF))}))\.lora_(A|B)\.weight"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


class Factors(NamedTuple):
  """One expert's adapter of one linear map, x -> scaling (x a^T) b.

  Attributes:
    a: float32[R, in].
    b: float32[R, out].
    scaling: alpha / R.
  """

  a: np.ndarray
  b: np.ndarray
  scaling: float


def load_adapters(
  folders: Sequence[str | Path], names: Sequence[str] | None = None
) -> Adapters:
  """Reads PEFT LoRA folders into one bank, in the decoding layout.

  Ranks that differ are padded with zero rows to the largest of that map. A map
  that only some experts adapt is zero for the others.

  Args:
    folders: one an expert, each with adapter_config.json and
      adapter_model.safetensors.
    names: of the experts; the folders' names by default.

  Returns:
    `Adapters`, a float32[E, R, in], b float32[E, R, out], scaling float32[E].

  Raises:
    InputError: a folder or file is missing or damaged, a config field asks for
      what is not done here, tensors and config disagree, experts of different
      bases, or two experts of one name.
  """
  if isinstance(folders, (str, Path)):
    raise InputError(f"adapters: {str(folders)!r} is one folder; want a list")
  folders = [Path(folder) for folder in folders]
  if not folders:
    raise InputError("adapters: no folder is given; want at least one")
  if names is None:
    names = [folder.resolve().name for folder in folders]
  if len(names) != len(folders):
    raise InputError(f"adapters: {len(names)} names for {len(folders)} folders")
  for name, count in collections.Counter(names).items():
    if count > 1:
      raise InputError(
        f"adapters: {count} experts are named {name!r}; want each name once"
      )
  experts = [_read_folder(folder) for folder in folders]
  depth = 1 + max(layer for expert in experts for layer, _ in expert)
  layers = []
  for layer in range(depth):
    loras = {}
    for name in PROJECTIONS:
      maps = [expert.get((layer, name)) for expert in experts]
      if any(m is not None for m in maps):
        loras[name] = _stack(f"layer {layer} {name}", maps, names)
    layers.append(loras)
  return Adapters(tuple(names), tuple(layers))


def save_adapter(
  adapters: Adapters,
  expert: str | int,
  folder: str | Path,
  base_name: str = "",
) -> None:
  """Writes one expert as a PEFT folder, all of it or nothing.

  Rows that only pad a rank, and maps that are all zero, are not written.
  An adapter that is there already is replaced; other files beside it stay.

  Args:
    adapters: the bank.
    expert: the expert's name or place.
    folder: where to, made if need be.
    base_name: the base's path or hub id, where PEFT looks for the base when it
      is asked for both.

  Raises:
    InputError: there is no such expert, all of it is zero, or the folder holds
      something else.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_adapter(adapters, "e1", f"{folder}/mine")
    ...   load_adapters([f"{folder}/mine"]).layers[0]["q"].a.shape
    (1, 4, 64)
  """
  maps = expert_maps(adapters, expert)
  if not maps:
    name = adapters.names[adapters.index(expert)]
    raise InputError(f"expert {name!r}: all of it is zero; nothing to save")
  write_adapter(folder, maps, base_name)


def expert_maps(
  adapters: Adapters, expert: str | int
) -> dict[tuple[int, str], Factors]:
  """Returns one expert's maps by layer and projection, without padding.

  Args:
    adapters: the bank.
    expert: the expert's name or place.
  """
  index = adapters.index(expert)
  maps = {}
  for layer, loras in enumerate(adapters.layers):
    for name, lora in loras.items():
      a, b = (
        np.asarray(np.asarray(x)[index], np.float32) for x in (lora.a, lora.b)
      )
      used = np.flatnonzero(a.any(axis=1) | b.any(axis=1))
      if used.size:
        rank = int(used[-1]) + 1
        scaling = float(np.asarray(lora.scaling)[index])
        maps[layer, name] = Factors(a[:rank], b[:rank], scaling)
  return maps


def write_adapter(
  folder: str | Path,
  maps: Mapping[tuple[int, str], Factors],
  base_name: str = "",
) -> None:
  """Writes the maps of one adapter as a PEFT folder, as `save_adapter` does.

  Args:
    folder: where to, made if need be.
    maps: by layer and projection, at least one.
    base_name: the base's path or hub id.

  Raises:
    InputError: the folder holds something else.
  """
  folder = Path(folder).resolve()
  _check_replaceable(folder)
  tensors, modules = {}, {}
  for (layer, name), (a, b, scaling) in maps.items():
    path = f"model.layers.{layer}.{_MODULES[name]}"
    tensors[_LORA_KEY.format(path, "A")] = np.ascontiguousarray(a)
    tensors[_LORA_KEY.format(path, "B")] = np.ascontiguousarray(b.T)
    modules[path] = len(a), scaling
  _replace_folder(folder, tensors, describe(modules, base_name))


def adapter_base(folder: str | Path) -> str:
  """Returns the base that an adapter's config names, or "".

  Args:
    folder: a PEFT folder.

  Raises:
    InputError: there is no such folder or config, or it is not obeyed here.
  """
  return PeftConfig.read(_file(Path(folder), _CONFIG)).base_model_name_or_path


def adapter_shapes(
  folder: str | Path,
) -> dict[tuple[int, str], tuple[int, int]]:
  """Returns [in, out] of an adapter's maps from its file's header alone.

  Args:
    folder: a PEFT folder.

  Raises:
    InputError: there is no such folder or file, or it is damaged.
  """
  path = _file(Path(folder), _WEIGHTS)
  sizes: dict[tuple[int, str], dict[str, int]] = {}
  with _opened(path) as file:
    for key in file.keys():  # noqa: SIM118 (it is no mapping)
      match = _LORA_KEY_REGEX.fullmatch(key)
      shape = file.get_slice(key).get_shape()
      if match is not None and len(shape) == 2:
        place = int(match[2]), _PROJECTION_OF[match[3]]
        size = shape[1] if match[4] == "A" else shape[0]
        sizes.setdefault(place, {})[match[4]] = size
  return {
    place: (halves["A"], halves["B"])
    for place, halves in sizes.items()
    if len(halves) == 2
  }


def _read_folder(folder: Path) -> dict[tuple[int, str], Factors]:
  """Returns the maps of one adapter, by layer and projection."""
  config = PeftConfig.read(_file(folder, _CONFIG))
  path = _file(folder, _WEIGHTS)
  tensors, problems = _read_tensors(path, config)
  maps = {}
  depth = 1 + max((layer for layer, _ in tensors), default=-1)
  for layer in range(depth):
    for name, module in _MODULES.items():
      target = f"model.layers.{layer}.{module}"
      if not config.is_target(target):
        continue
      halves = tensors.get((layer, name), {})
      missing = [half for half in "AB" if half not in halves]
      if missing:
        problems += [
          f"{_LORA_KEY.format(target, x)!r} is missing" for x in missing
        ]
        continue
      rank, scaling = config.rank_and_scaling(target)
      a, b = halves["A"], halves["B"]
      if not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == rank):
        problems.append(
          f"{target!r} has A {list(a.shape)} and B {list(b.shape)}, but"
          f" {_CONFIG} gives it rank {rank}: want [{rank}, in], [out, {rank}]"
        )
        continue
      maps[layer, name] = Factors(a, b.T, scaling)
  if not (maps or problems):
    problems.append("it has no tensors")
  if problems:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise InputError(f"{path}: {'; '.join(problems[:8])}{more}")
  return maps


def _read_tensors(path: Path, config: PeftConfig):
  """Returns {(layer, projection): {"A" or "B": tensor}} and what is wrong."""
  tensors, problems = {}, []
  with _opened(path) as file:
    for key in file.keys():  # noqa: SIM118 (it is no mapping)
      dtype = file.get_slice(key).get_dtype()
      match = _LORA_KEY_REGEX.fullmatch(key)
      if match is None:
        problems.append(f"{key!r} is no LoRA tensor of a layer's linear map")
      elif not config.is_target(match[1]):
        problems.append(f"{key!r} is not a target in {_CONFIG}")
      elif dtype not in _FLOATS:
        problems.append(f"{key!r} is {dtype}, not one of {', '.join(_FLOATS)}")
      else:
        place = int(match[2]), _PROJECTION_OF[match[3]]
        tensor = np.asarray(file.get_tensor(key), np.float32)
        tensors.setdefault(place, {})[match[4]] = tensor
  return tensors, problems


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """Opens a safetensors file; what is wrong with it is one line."""
  import safetensors

  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      yield file
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(
      f"{path}: not a whole safetensors file ({error})"
    ) from error


def _stack(
  place: str, maps: Sequence[Factors | None], names: Sequence[str]
) -> Lora:
  """Stacks one map of all experts; `None` is an expert that lacks it."""
  there = {
    i: lora_map for i, lora_map in enumerate(maps) if lora_map is not None
  }
  sizes = {i: (a.shape[1], b.shape[1]) for i, (a, b, _) in there.items()}
  if len(set(sizes.values())) > 1:
    made = ", ".join(f"{names[i]!r} {list(size)}" for i, size in sizes.items())
    raise InputError(
      f"adapters: {place} has different [in, out]: {made}; were they trained on"
      " one base?"
    )
  fan_in, fan_out = next(iter(sizes.values()))
  rank = max(a.shape[0] for a, _, _ in there.values())
  a = np.zeros((len(maps), rank, fan_in), np.float32)
  b = np.zeros((len(maps), rank, fan_out), np.float32)
  scaling = np.zeros(len(maps), np.float32)
  for i, (one_a, one_b, one_scaling) in there.items():
    a[i, : len(one_a)], b[i, : len(one_b)], scaling[i] = (
      one_a,
      one_b,
      one_scaling,
    )
  return Lora(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scaling))


def _file(folder: Path, name: str) -> Path:
  """Returns the path of a folder's file, or says what is there instead."""
  if not folder.is_dir():
    parent = folder.parent
    beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    raise InputError(
      f"{folder}: there is no such folder{nearest(folder.name, beside)}"
    )
  path = folder / name
  if path.is_file():
    return path
  inside = sorted(p.name for p in folder.iterdir())
  if name == _WEIGHTS and "adapter_model.bin" in inside:
    raise InputError(
      f"{folder}: adapter_model.bin is a pickle, which is never opened; convert"
      " it with PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
    )
  raise InputError(f"{folder}: there is no {name}{nearest(name, inside)}")


def _check_replaceable(folder: Path) -> None:
  if folder.exists() and not folder.is_dir():
    raise InputError(f"{folder}: is a file; want a folder")
  is_free = not folder.exists() or not any(folder.iterdir())
  if not (is_free or (folder / _CONFIG).is_file()):
    raise InputError(
      f"{folder}: holds something other than a PEFT adapter; want a new or empty"
      " folder"
    )


def _replace_folder(
  folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
  """Makes the folder beside its place, then renames it into it."""
  from safetensors.numpy import save_file

  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=folder.parent, prefix=f".{folder.name}."
  ) as temporary:
    new, old = Path(temporary, "new"), Path(temporary, "old")
    if folder.is_dir():
      stale = shutil.ignore_patterns("adapter_model.*")
      shutil.copytree(folder, new, symlinks=True, ignore=stale)
    else:
      new.mkdir()
    save_file(tensors, new / _WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (new / _CONFIG).write_text(text + "\n", encoding="utf-8")
    try:
      if folder.is_dir():
        folder.rename(old)
      new.rename(folder)
    except BaseException:
      # Also at an interrupt: the old adapter must not go with `temporary`.
      if old.is_dir() and not folder.exists():
        old.rename(folder)
      raise
