"""The bank: a folder of PEFT adapters and what a router needs of them.

bank/
  bank.json             format, base, experts, encoders
  centroids.safetensors a [E, D_enc] table an encoder
  <expert>/             a PEFT folder each
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import tempfile

import numpy as np

from tokenlora_jax.config import InputError, RouterConfig, nearest
from tokenlora_jax.interop.minilm import load_minilm
from tokenlora_jax.interop.peft import load_adapters, save_adapter
from tokenlora_jax.mixing.routers import Router, make_router
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Bank:
  """Adapters trained on one base, with their centroids.

  Attributes:
    adapters: the experts.
    base: the path of the base, as it was given.
    fingerprint: of the base's weights.
    centroids: float32[E, D_enc] by encoder, `minilm` or `hidden`.
  """

  adapters: Adapters
  base: str
  fingerprint: str
  centroids: Mapping[str, np.ndarray]

  def router(self, config: RouterConfig) -> Router:
    """Returns the router of these settings, for this bank's experts.

    Raises:
      InputError: the router does not exist, or the bank lacks its centroids.
    """
    settings = {}
    if config.name == "centroid":
      if config.encoder not in self.centroids:
        raise InputError(
          f"router.encoder: the bank has no centroids of {config.encoder!r},"
          f" only of {', '.join(sorted(self.centroids))}"
        )
      settings["centroids"] = self.centroids[config.encoder]
      settings["sharpen"] = config.sharpen
      settings["encoder"] = (
        "hidden" if config.encoder == "hidden" else load_minilm(config.minilm)
      )
    elif config.name == "one-hot":
      settings["expert"] = config.expert
    elif config.name == "fixed":
      settings["gates"] = config.gates
    return make_router(config.name, **settings).bind(self.adapters.names)


def save_bank(folder: str | Path, bank: Bank) -> None:
  """Writes a bank; an older bank there is replaced once the new one is whole.

  Args:
    folder: where; made if need be.
    bank: what.

  Raises:
    InputError: the folder holds something that is not a bank.
  """
  from safetensors.numpy import save_file

  folder = Path(folder)
  if folder.exists() and not (folder / "bank.json").is_file():
    raise InputError(f"{folder}: exists and is not a bank; choose another")
  folder.parent.mkdir(parents=True, exist_ok=True)
  names = bank.adapters.names
  with tempfile.TemporaryDirectory(
    prefix=f".{folder.name}-", dir=folder.parent
  ) as scratch:
    new = Path(scratch) / "new"
    new.mkdir()
    for name in names:
      save_adapter(bank.adapters, name, new / name, base_name=bank.base)
    save_file(dict(bank.centroids), new / "centroids.safetensors")
    about = {
      "format": FORMAT,
      "base": {"path": bank.base, "fingerprint": bank.fingerprint},
      "experts": list(names),
      "encoders": sorted(bank.centroids),
    }
    (new / "bank.json").write_text(json.dumps(about, indent=2) + "\n")
    if folder.exists():
      folder.rename(Path(scratch) / "old")
    new.rename(folder)
    # Leaving the block removes what is old.


def load_bank(folder: str | Path, base: Llama | None = None) -> Bank:
  """Reads a bank.

  Args:
    folder: what `save_bank` wrote.
    base: checked to be the base the bank was trained on.

  Returns:
    The bank, in the decoding layout.

  Raises:
    InputError: no bank there, a part of it missing or damaged, or another base.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  folder = Path(folder)
  file = folder / "bank.json"
  if not file.is_file():
    names = []
    if folder.parent.is_dir():
      names = [str(p) for p in folder.parent.iterdir() if p.is_dir()]
    raise InputError(
      f"--bank {folder}: holds no bank.json{nearest(str(folder), names)};"
      " train.py writes a bank at the end of a run"
    )
  try:
    about = json.loads(file.read_text())
    version = about["format"]
    path, fingerprint = (
      str(about["base"][name]) for name in ("path", "fingerprint")
    )
    experts = [str(name) for name in about["experts"]]
    encoders = [str(name) for name in about["encoders"]]
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f"{file}: is not a bank's ({error!r})") from None
  if version != FORMAT:
    raise InputError(f"{file}: format {version!r}; this version reads {FORMAT}")
  if base is not None and fingerprint != base.fingerprint:
    raise InputError(
      f"{file}: the bank was trained on {path} (fingerprint"
      f" {fingerprint[:12]}), not on this base ({base.fingerprint[:12]});"
      " give --base that one"
    )
  for name in experts:
    if Path(name).name != name or name in ("", ".", ".."):
      raise InputError(f"{file}: experts: {name!r} is no folder's name")
  adapters = load_adapters([folder / name for name in experts], experts)
  if base is not None:
    adapters.check(base.config)
  try:
    centroids = load_file(folder / "centroids.safetensors")
  except (OSError, SafetensorError) as error:
    raise InputError(
      f"{folder / 'centroids.safetensors'}: cannot be read ({error})"
    ) from None
  for name in encoders:
    table = centroids.get(name)
    if table is None or table.ndim != 2 or len(table) != len(experts):
      raise InputError(
        f"{folder / 'centroids.safetensors'}: {name}: want a table of"
        f" {len(experts)} centroids"
      )
  return Bank(adapters, path, fingerprint, centroids)
