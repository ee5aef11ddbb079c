"""Loads the tasks' rows from any source: built-in, local, hub or TFDS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tokenlora_jax.config import (
  DataConfig,
  InputError,
  check_choice,
  first_line,
  nearest,
)
from tokenlora_jax.data.tasks import Task, get_task
from tokenlora_jax.data.tokens import check_text

# Number of rows that the built-in generators return.
BUILTIN_ROWS = {"train": 4096, "test": 512}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a task: a prompt and its answer.

  Attributes:
    prompt: the model's input.
    answer: the target text.
    origin: the row's place: "FILE:LINE" or "SOURCE:SPLIT:INDEX".
    fields: the whole row in its task's schema, for scorers; None for training
      rows, which are not scored.

  Example:
    >>> Row("What is 2 + 2?\\nAnswer:", " 4", "mine.jsonl:1").text
    'What is 2 + 2?\\nAnswer: 4'
  """

  prompt: str
  answer: str
  origin: str
  fields: Any = dataclasses.field(default=None, repr=False, compare=False)

  @property
  def text(self) -> str:
    """The training text: prompt, then answer."""
    return self.prompt + self.answer


# -----------------------------------------------------------------------------
# Sources: each yields (origin, unchecked row).


def load_rows(config: DataConfig, task_name: str, split: str) -> list[Row]:
  """Returns the rows of one task.

  Args:
    config: the source, its folder, the most rows, and `bad_rows`.
    task_name: a name of `tasks.TASKS` or `tasks.EVALUATION_TASKS`.
    split: `train`, at most `config.train_rows` rows (0 is all), or `test`.

  Raises:
    InputError: a file or package is missing, a row breaks its schema (and
      `config.bad_rows` is `fatal`), or no row is left; names file and field.

  Example:
    >>> rows = load_rows(DataConfig(train_rows=2), "gsm8k", "train")
    >>> [row.origin for row in rows]
    ['builtin:train:0', 'builtin:train:1']
  """
  check_choice("split", split, ("train", "test"))
  task = get_task(task_name)
  if split not in task.splits:
    raise InputError(
      f"data.tasks: {task.name} has no {split} rows; it is only evaluated"
    )
  cap = config.train_rows if split == "train" else 0
  rows: list[Row] = []
  skipped: list[InputError] = []
  for origin, raw in _SOURCES[config.source](config, task, split):
    if cap and len(rows) == cap:
      break
    try:
      fields = raw if split == "test" else None
      row = Row(task.prompt(raw), task.answer(raw), origin, fields)
      check_text(row.prompt)
      check_text(row.answer)
      rows.append(row)
    except InputError as error:
      located = InputError(f"{origin}: {error}")
      if config.bad_rows == "fatal":
        raise InputError(
          f"{located}; --data.bad-rows skip leaves such rows out"
        ) from None
      skipped.append(located)
  if skipped:
    _log.warning(
      "%s %s: skipped %d bad rows, the first is %s",
      task.name, split, len(skipped), skipped[0],
    )  # fmt: skip
  if not rows:
    raise InputError(
      f"data.source {config.source!r}: {task.name} {split} has no usable row"
    )
  return rows


def _builtin(
  config: DataConfig, task: Task, split: str
) -> Iterator[tuple[str, Any]]:
  rows = task.generate(config.seed, BUILTIN_ROWS[split], split)
  for i, row in enumerate(rows):
    yield f"builtin:{split}:{i}", row


def _local(
  config: DataConfig, task: Task, split: str
) -> Iterator[tuple[str, Any]]:
  folder = Path(config.dir)
  folder = _child(_child(folder.parent, folder.name), task.name)
  path = _child(folder, f"{split}.{task.suffix}")
  for place, row in task.read(path):
    yield f"{path}:{place}", row


def _child(folder: Path, name: str) -> Path:
  path = folder / name
  if not path.exists():
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise InputError(
      f"data.dir: {name!r} does not exist in {str(folder)!r}"
      f"{nearest(name, names)}"
    )
  return path


def _hub(
  config: DataConfig, task: Task, split: str
) -> Iterator[tuple[str, Any]]:
  datasets = _package("datasets", config)
  try:
    rows = datasets.load_dataset(*task.hub, split=task.splits[split])
  # datasets raises its HTTP libraries' errors and, for bad data, many own ones.
  except Exception as error:
    raise _unavailable(config, task.hub[0], error) from error
  for i, row in enumerate(rows):
    yield f"{task.hub[0]}:{task.splits[split]}:{i}", row


def _tfds(
  config: DataConfig, task: Task, split: str
) -> Iterator[tuple[str, Any]]:
  if not task.tfds:
    raise InputError(
      f"data.source: {task.name} is not in TensorFlow Datasets; use 'hub', "
      "'local' or 'builtin'"
    )
  tfds = _package("tensorflow_datasets", config)
  importlib.import_module("tensorflow_datasets.text")  # registers gsm8k
  try:
    rows = tfds.data_source(
      task.tfds,
      split=task.splits[split],
      data_dir=config.dir or None,
      # The format that is read by index, and without TensorFlow.
      builder_kwargs={"file_format": "array_record"},
    )
  # The library raises its HTTP library's errors and, for bad data, own ones.
  except Exception as error:
    raise _unavailable(config, task.tfds, error) from error
  for i, row in enumerate(rows):
    yield (
      f"{task.tfds}:{task.splits[split]}:{i}",
      task.from_tfds(_decoded(row)),
    )


_SOURCES = {"builtin": _builtin, "local": _local, "hub": _hub, "tfds": _tfds}


def _package(name: str, config: DataConfig) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(
      f"data.source {config.source!r}: needs the package {name}: {error}"
    ) from None


def _unavailable(
  config: DataConfig, dataset: str, error: Exception
) -> InputError:
  return InputError(
    f"data.source {config.source!r}: {dataset} cannot be loaded:"
    f" {first_line(error)}"
  )


def _decoded(value: Any) -> Any:
  """Returns a TensorFlow Datasets value with its bytes decoded to text."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {key: _decoded(item) for key, item in value.items()}
  if isinstance(value, list | np.ndarray):
    return [_decoded(item) for item in value]
  return value


def sample_rows(rows: Sequence[Row], count: int) -> list[Row]:
  """Returns at most `count` rows, evenly spaced over all rows.

  Sample n is row floor(n len(rows) / count). The first rows alone would not do:
  files are sorted, and SQuAD's first rows share one article.

  Args:
    rows: the rows, in the order of their file.
    count: the most rows to take, at least 1.

  Example:
    >>> rows = [Row(letter, "", "") for letter in "abcde"]
    >>> [row.text for row in sample_rows(rows, 3)]
    ['a', 'b', 'd']
    >>> sample_rows(rows[:2], 3) == rows[:2]
    True
  """
  count = min(count, len(rows))
  return [rows[n * len(rows) // count] for n in range(count)]
