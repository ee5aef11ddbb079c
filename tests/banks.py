"""A bank of three random experts, and its files, for the tests of banks."""

import functools
import json
from pathlib import Path
import shutil

import jax.numpy as jnp
import numpy as np
from refusals import refusal

from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import Bank, load_bank
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, random_adapters

NAMES = ("alpha", "beta", "gamma")


@functools.cache
def make_base() -> Llama:
  return Llama(
    PRESETS["tiny"], lambda _, shape: jnp.ones(shape), fingerprint="f" * 64
  )


@functools.cache
def make_bank() -> Bank:
  adapters = random_adapters(make_base(), experts=3, rank=4)
  rng = np.random.default_rng(0)
  tables = {"hidden": rng.normal(size=(3, 64)).astype(np.float32)}
  return Bank(
    Adapters(NAMES, adapters.layers), "some/base", "f" * 64, tables,
    {"beta": Expert("squad", "Question: {question}\n\nAnswer:")},
    {"second": Fitted({"top": 2}, {"order": np.array([1, 0, 2])}, NAMES)},
  )  # fmt: skip


def to_format_1(folder: Path) -> Path:
  """Makes the bank one of format 1, as version 0.1.0 wrote it."""
  about = {
    "format": 1,
    "base": {"path": "some/base", "fingerprint": "f" * 64},
    "experts": list(NAMES),
    "encoders": ["hidden"],
  }
  (folder / "bank.json").write_text(json.dumps(about, indent=2) + "\n")
  shutil.rmtree(folder / "routers")
  return folder


def edit_about(folder: Path, *keys: str | int, **changes) -> None:
  """Changes the fields of what the keys lead to in bank.json."""
  file = folder / "bank.json"
  about = part = json.loads(file.read_text())
  for key in keys:
    part = part[key]
  part.update(changes)
  file.write_text(json.dumps(about))


def refused(folder, base, *told: str) -> None:
  """Loading is refused in one line that tells all of this."""
  message = refusal(load_bank, folder, base)
  for part in told:
    assert part in message, message


def contents(folder: Path) -> dict[str, bytes]:
  """The files under a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }
