"""The questions of an experiment, which are held-out rows as tokens."""

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
    name: the row's place in the data, the same on any machine.
    example: the row's tokens.
    fields: the row in its task's schema, for scorers.
  """

  name: str
  example: Example
  fields: Any = None


def questions(
  rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig
) -> list[Question]:
  """Returns one task's first `config.eval_rows` rows that fit.

  Args:
    rows: the rows of one task.
    tokenizer: the base's tokenizer.
    config: settings of the data.

  Raises:
    InputError: no row is left.
  """
  folder = f"{Path(config.dir)}/"
  found = []
  for i, example in held_out(rows, tokenizer, config).items():
    # A row that is cut before its answer has nothing to score.
    if len(example.tokens) > example.prompt_length:
      name = rows[i].origin.removeprefix(folder)
      found.append(Question(name, example, rows[i].fields))
  return found


def digest_questions(questions: Sequence[Question]) -> str:
  """Hashes the questions' names, tokens and prompt lengths.

  Args:
    questions: the questions of one task.

  Example:
    >>> len(digest_questions([]))
    16
  """
  return digest(
    part
    for one in questions
    for part in (
      one.name.encode(errors="replace"),
      one.example.tokens.tobytes(),
      str(one.example.prompt_length).encode(),
    )
  )
