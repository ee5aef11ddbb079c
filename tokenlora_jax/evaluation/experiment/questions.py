"""The questions of an experiment: a task's held-out rows as tokens."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

from tokenlora_jax.config import DataConfig
from tokenlora_jax.data.examples import Example, held_out
from tokenlora_jax.data.rows import Row
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.evaluation.experiment.rows import digest


@dataclasses.dataclass(frozen=True)
class Question:
  """One held-out row.

  Attributes:
    name: its place in the data, the same on any machine.
    example: its tokens.
    fields: the row itself, for scorers.
  """

  name: str
  example: Example
  fields: Any = None


def questions(
  rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig
) -> list[Question]:
  """Returns one task's first `config.eval_rows` rows that fit.

  Args:
    rows: of one task.
    tokenizer: a transformers-style tokenizer.
    config: of the data.

  Raises:
    InputError: no row is left.
  """
  folder = f"{Path(config.dir)}/"
  found = []
  for i, example in held_out(rows, tokenizer, config).items():
    # Cut before its answer, there is nothing to score.
    if len(example.tokens) > example.prompt_length:
      name = rows[i].origin.removeprefix(folder)
      found.append(Question(name, example, rows[i].fields))
  return found


def digest_questions(questions: Sequence[Question]) -> str:
  """Returns a fingerprint of names and tokens, and of where answers start."""
  return digest(
    part
    for one in questions
    for part in (
      one.name.encode(errors="replace"),
      one.example.tokens.tobytes(),
      str(one.example.prompt_length).encode(),
    )
  )
