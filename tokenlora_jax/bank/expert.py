"""An expert of a bank: its task and template, and its record in bank.json."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from pathlib import Path

from tokenlora_jax.bank.record import (
  ADAPTER_FILES,
  BANK,
  ExpertRecord,
  sha256,
)
from tokenlora_jax.config import PROJECTIONS, InputError
from tokenlora_jax.formats.peft import expert_maps
from tokenlora_jax.formats.peft_read import Factors
from tokenlora_jax.model.lora import Adapters


@dataclasses.dataclass(frozen=True)
class Expert:
  """An expert's task and prompt template; either may be unknown, "".

  Attributes:
    task: the task whose rows it was trained on.
    template: the form of that task's prompts, its fields in braces.

  Example:
    >>> Expert("arc", "Question: {question}").task
    'arc'
  """

  task: str = ""
  template: str = ""


def describe_expert(
  maps: Mapping[tuple[int, str], Factors],
  name: str,
  folder: Path,
  about: Expert,
) -> ExpertRecord:
  """Returns an expert's record for bank.json.

  Args:
    maps: the expert's maps, without padding.
    name: the expert's name.
    folder: the folder with the expert's files.
    about: the expert's task and template.
  """
  digests = {file: sha256(folder / file) for file in ADAPTER_FILES}
  return ExpertRecord(name, about.task, about.template, *figures(maps), digests)


def figures(
  maps: Mapping[tuple[int, str], Factors],
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[str, ...]]:
  """Returns an expert's ranks, scalings and projections, each value once.

  Args:
    maps: its own, without padding.

  Example:
    >>> import numpy as np
    >>> q = Factors(np.ones((4, 8)), np.ones((4, 8)), 2.0)
    >>> figures({(0, "q"): q, (1, "q"): q})
    ((4,), (2.0,), ('q',))
  """
  return (
    tuple(sorted({len(a) for a, _, _ in maps.values()})),
    tuple(sorted({scaling for *_, scaling in maps.values()})),
    tuple(p for p in PROJECTIONS if any(p == name for _, name in maps)),
  )


def check_described(
  adapters: Adapters, name: str, place: Path, expert: ExpertRecord
) -> None:
  """Checks that an adapter matches its record in bank.json.

  Args:
    adapters: the bank's adapters.
    name: the expert's name.
    place: the expert's folder, for errors.
    expert: its record.

  Raises:
    InputError: ranks, scalings or projections differ.
  """
  if not expert.sha256:  # Format 1 has no figures.
    return
  said = expert.ranks, expert.scalings, expert.targets
  found = figures(expert_maps(adapters, name))
  if found != said:
    raise InputError(
      f"{place}: has ranks, scalings and targets {found}, but {BANK} says"
      f" {said}"
    )
