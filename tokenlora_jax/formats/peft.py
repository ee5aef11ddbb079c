"""Loads PEFT adapter folders into a bank, and writes experts as such folders.

  adapters = load_adapters(["adapters/gsm8k", "adapters/squad"])
  save_adapter(adapters, "gsm8k", "adapters/copy")

A folder holds adapter_config.json and adapter_model.safetensors. Nothing in it
is trusted: an unexpected tensor and a missing one are errors.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokenlora_jax.config import PROJECTIONS, InputError
from tokenlora_jax.formats.peft_config import describe
from tokenlora_jax.formats.peft_keys import MODULES
from tokenlora_jax.formats.peft_read import (
  CONFIG,
  LORA_KEY,
  WEIGHTS,
  Factors,
  StoredAdapter,
  read_adapter,
)
from tokenlora_jax.model.lora import Adapters, Lora


def load_adapters(
  folders: Sequence[str | Path], names: Sequence[str] | None = None
) -> Adapters:
  """Reads PEFT LoRA folders into one bank, in the decoding layout.

  Smaller ranks are padded with zero rows to the largest rank of the map. A map
  that only some experts adapt is zero for the others.

  Args:
    folders: one folder per expert, each with adapter_config.json and
      adapter_model.safetensors.
    names: the experts' names; the folders' names by default.

  Returns:
    `Adapters`, a float32[E, R, in], b float32[E, R, out], scaling float32[E].

  Raises:
    InputError: a folder or file is missing or damaged, a config field is not
      supported, tensors and config disagree, or experts have different bases
      or the same name.

  Example: see `save_adapter`.
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
  return stack_adapters([read_adapter(f) for f in folders], names)


def stack_adapters(
  adapters: Sequence[StoredAdapter], names: Sequence[str]
) -> Adapters:
  """Stacks adapters in memory into one bank, as `load_adapters` does.

  Args:
    adapters: E adapters.
    names: the experts' names.

  Raises:
    InputError: two adapters of one map have different [in, out].

  Example:
    >>> one = Factors(np.ones((4, 8)), np.ones((4, 16)), 2.0)
    >>> two = Factors(np.ones((2, 8)), np.ones((2, 16)), 1.0)
    >>> stored = [StoredAdapter("", {(0, "q"): maps}) for maps in (one, two)]
    >>> stack_adapters(stored, ["a", "b"]).layers[0]["q"].a.shape
    (2, 4, 8)
  """
  experts = [adapter.maps for adapter in adapters]
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
  """Writes one expert as a PEFT folder, atomically.

  Rows that pad a rank, and maps that are all zero, are not written. An adapter
  in the folder is replaced; other files in it stay.

  Args:
    adapters: the bank's adapters.
    expert: the expert's name or index.
    folder: the folder to write; made if need be.
    base_name: the base's path or hub id, from which PEFT can load the base.

  Raises:
    InputError: there is no such expert, all its maps are zero, or the folder
      holds something else.

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
    adapters: the bank's adapters.
    expert: the expert's name or index.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> sorted(expert_maps(adapters, "e1"))
    [(0, 'q'), (0, 'v'), (1, 'q'), (1, 'v')]
  """
  index = adapters.index(expert)
  maps = {}
  for layer, loras in enumerate(adapters.layers):
    for name, lora in loras.items():
      parts = lora.a, lora.b, lora.scaling
      maps[layer, name] = Factors(*(np.asarray(x)[index] for x in parts))
  return trim(maps)


def trim(
  maps: Mapping[tuple[int, str], Factors],
) -> dict[tuple[int, str], Factors]:
  """Returns maps in float32 without padding: no zero rows, no zero maps.

  Args:
    maps: the maps by layer and projection.

  Example:
    >>> one = Factors(np.eye(3)[:2] * [[1], [0]], np.zeros((2, 4)), 2)
    >>> {at: x.a.shape for at, x in trim({(0, "q"): one}).items()}
    {(0, 'q'): (1, 3)}
  """
  trimmed = {}
  for place, (a, b, scaling) in maps.items():
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    used = np.flatnonzero(a.any(axis=1) | b.any(axis=1))
    if used.size:
      rank = int(used[-1]) + 1
      trimmed[place] = Factors(a[:rank], b[:rank], float(np.float32(scaling)))
  return trimmed


def write_adapter(
  folder: str | Path,
  maps: Mapping[tuple[int, str], Factors],
  base_name: str = "",
) -> None:
  """Writes the maps of one adapter as a PEFT folder, as `save_adapter` does.

  Args:
    folder: the folder to write; made if need be.
    maps: at least one map, by layer and projection.
    base_name: the base's path or hub id.

  Raises:
    InputError: a map is not finite, or the folder holds something else.
  """
  folder = Path(folder).resolve()
  _check_replaceable(folder)
  tensors, modules = {}, {}
  for (layer, name), (a, b, scaling) in maps.items():
    path = f"model.layers.{layer}.{MODULES[name]}"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise InputError(f"adapter: layer {layer} {name} holds NaN or infinity")
    tensors[LORA_KEY.format(path, "A")] = np.ascontiguousarray(a)
    tensors[LORA_KEY.format(path, "B")] = np.ascontiguousarray(b.T)
    modules[path] = len(a), scaling
  _replace_folder(folder, tensors, describe(modules, base_name))


def _stack(
  place: str, maps: Sequence[Factors | None], names: Sequence[str]
) -> Lora:
  """Stacks one map of all experts; `None` is an expert without it."""
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


def _check_replaceable(folder: Path) -> None:
  if folder.exists() and not folder.is_dir():
    raise InputError(f"{folder}: is a file; want a folder")
  is_free = not folder.exists() or not any(folder.iterdir())
  if not (is_free or (folder / CONFIG).is_file()):
    raise InputError(
      f"{folder}: holds something other than a PEFT adapter; want a new or empty"
      " folder"
    )


def _replace_folder(
  folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
  """Writes a temporary folder beside the target, then renames it."""
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
    save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (new / CONFIG).write_text(text + "\n", encoding="utf-8")
    try:
      if folder.is_dir():
        folder.rename(old)
      new.rename(folder)
    except BaseException:
      # Also at an interrupt: the old adapter must not go with `temporary`.
      if old.is_dir() and not folder.exists():
        old.rename(folder)
      raise
