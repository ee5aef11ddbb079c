"""Rows of the tasks, from any source, as batches for all experts at once.

Axes: E experts (tasks), B rows an expert, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import importlib
import itertools
import logging
from pathlib import Path
import sys
from types import ModuleType
from typing import Any, NamedTuple
import zlib

import grain
import numpy as np

from tokenlora_jax.config import (
  DataConfig,
  InputError,
  check_choice,
  nearest,
)
from tokenlora_jax.tasks import Task, get_task
from tokenlora_jax.text import encode_prompt

# How many rows the built-in generators give.
BUILTIN_ROWS = {"train": 4096, "test": 512}

# Batches are padded to a multiple of this, so that few shapes compile.
LENGTH_STEP = 64

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
  """One text of a task.

  Attributes:
    prompt: what the model is given.
    answer: what it is to say; `prompt + answer` is the training text.
    origin: where the row came from: "FILE:LINE" or "SOURCE:SPLIT:INDEX".
  """

  prompt: str
  answer: str
  origin: str


class Example(NamedTuple):
  """One row as tokens.

  Attributes:
    tokens: int32[T], prompt, answer and end token.
    loss_mask: float32[T], 1 where a token is a target of the loss.
    prompt_length: how many tokens are the prompt's.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  prompt_length: int


# -----------------------------------------------------------------------------
# Sources: each yields (origin, unchecked row).


def load_rows(config: DataConfig, task_name: str, split: str) -> list[Row]:
  """Returns the rows of one task.

  Args:
    config: the source, its folder, the caps and what to do with bad rows.
    task_name: a name of `tasks.TASKS`.
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
  cap = config.train_rows if split == "train" else 0
  rows: list[Row] = []
  skipped: list[InputError] = []
  for origin, raw in _SOURCES[config.source](config, task, split):
    if cap and len(rows) == cap:
      break
    try:
      rows.append(Row(task.prompt(raw), task.answer(raw), origin))
    except InputError as error:
      located = InputError(f"{origin}: {error}")
      if config.bad_rows == "fatal":
        raise located from None
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
  except Exception as error:  # whatever the network or the hub's client raises
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
  except Exception as error:  # whatever the network or the library raises
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
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return InputError(
    f"data.source {config.source!r}: {dataset} cannot be loaded: {reason}"
  )


def _decoded(value: Any) -> Any:
  """Returns a value of TensorFlow Datasets with its bytes as text."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {key: _decoded(item) for key, item in value.items()}
  if isinstance(value, list | np.ndarray):
    return [_decoded(item) for item in value]
  return value


# -----------------------------------------------------------------------------
# Tokens.


def tokenize(row: Row, tokenizer: Any, config: DataConfig) -> Example | None:
  """Returns a row's tokens: prompt, answer and end token.

  The answer's tokens are those it has after the prompt. Encoded alone, a
  SentencePiece tokenizer would put a second space before it.

  Args:
    row: the text.
    tokenizer: a transformers-style tokenizer with an end token.
    config: which tokens are targets, the longest row, and what to do with a
      longer one.

  Returns:
    The example, or None for a row to leave out: too long under `skip`, or no
    target left under `truncate`.

  Raises:
    InputError: the tokenizer has no end token, or the row is too long under
      `fatal`.
  """
  if tokenizer.eos_token_id is None:
    raise InputError("tokenizer: it has no end token, which answers need")
  prompt = encode_prompt(row.prompt, tokenizer)
  both = encode_prompt(row.prompt + row.answer, tokenizer)
  if both[: len(prompt)] == prompt:
    answer = both[len(prompt) :]
  else:  # a token spans the boundary; the prompt's tokens must stay
    answer = tokenizer.encode(row.answer, add_special_tokens=False)
  tokens = np.array([*prompt, *answer, tokenizer.eos_token_id], np.int32)
  loss_mask = np.ones(len(tokens), np.float32)
  # Nothing predicts the first token, so it is never a target.
  loss_mask[: len(prompt) if config.loss_on == "answer" else 1] = 0
  if len(tokens) > config.length:
    if config.too_long == "fatal":
      raise InputError(
        f"{row.origin}: {len(tokens)} tokens are more than data.length "
        f"{config.length}; raise it or set data.too-long to skip or truncate"
      )
    if config.too_long == "skip":
      return None
    tokens, loss_mask = tokens[: config.length], loss_mask[: config.length]
    if not loss_mask.any():
      return None
  return Example(tokens, loss_mask, min(len(prompt), len(tokens)))


def held_out(
  rows: Sequence[Row], tokenizer: Any, config: DataConfig
) -> list[Example]:
  """Returns one task's first `config.eval_rows` rows that fit, as tokens.

  Args:
    rows: of one task.
    tokenizer: a transformers-style tokenizer.
    config: see `tokenize`.

  Raises:
    InputError: no row is left.
  """
  found = _examples(rows, tokenizer, config, config.eval_rows)
  return [example for _, example in found]


def _examples(
  rows: Sequence[Row],
  tokenizer: Any,
  config: DataConfig,
  most: int = sys.maxsize,
) -> list[tuple[int, Example]]:
  """Returns (index in rows, example) of the first `most` rows that fit."""
  examples = []
  for i, row in enumerate(rows):
    if len(examples) == most:
      break
    example = tokenize(row, tokenizer, config)
    if example is not None:
      examples.append((i, example))
  if not examples:
    raise InputError(
      f"data.length: {config.length} tokens hold none of {len(rows)} rows"
      + (f", the first from {rows[0].origin}" if rows else "")
    )
  seen = examples[-1][0] + 1 if len(examples) == most else len(rows)
  if len(examples) < seen:
    _log.warning(
      "left out %d of %d rows that data.length %d does not hold (first row: %s)",
      seen - len(examples), seen, config.length, rows[0].origin,
    )  # fmt: skip
  return examples


# -----------------------------------------------------------------------------
# Batches.


def batches(
  rows_by_task: Mapping[str, Sequence[Row]],
  tokenizer: Any,
  config: DataConfig,
) -> grain.IterDataset:
  """Returns an endless data set of batches, one element an optimizer step.

  Step i is a function of the rows and `config` alone. Each task is shuffled
  anew every pass, in an order that does not depend on the other tasks, and
  starts over when its rows are used up. The iterator's `get_state` and
  `set_state` are the position, for checkpoints.

  Args:
    rows_by_task: the training rows of each task of `config.tasks`.
    tokenizer: a transformers-style tokenizer.
    config: the experts' order, B, the longest T and the seed.

  Returns:
    Batches as dicts of arrays, experts in the order of `config.tasks`; T is
    the smallest multiple of 64 that holds the longest row, at most
    `config.length`:
      tokens: int32[E, B, T], 0 in the padding.
      positions: int32[E, B, T].
      segment_ids: int32[E, B, T], 1 for tokens and 0 for padding.
      loss_mask: float32[E, B, T], 1 where a token is a target (not shifted).
      rows: int32[E, B], each row's index in `rows_by_task[task]`.

  Raises:
    InputError: no row of a task fits.
  """
  streams = [
    grain.MapDataset.source(_examples(rows_by_task[task], tokenizer, config))
    .shuffle(zlib.crc32(f"{config.seed}:{task}".encode()))
    .repeat()
    for task in config.tasks
  ]

  def batch(step: int) -> dict[str, np.ndarray]:
    start = step * config.rows
    picked = [
      [stream[i] for i in range(start, start + config.rows)]
      for stream in streams
    ]
    return _stack(picked, config.rows, _length(picked, config))

  steps = grain.MapDataset.range(sys.maxsize // config.rows).map(batch)
  return steps.to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  )


def held_out_batches(
  rows_by_task: Mapping[str, Sequence[Row]], tokenizer: Any, config: DataConfig
) -> list[dict[str, np.ndarray]]:
  """Returns the rows of `held_out`, in batches as `batches` gives them.

  Rows go by length, so that little is padding. Where a task has fewer rows than
  another, empty ones fill up, without tokens or targets.

  Args:
    rows_by_task: the held-out rows of each task of `config.tasks`.
    tokenizer: a transformers-style tokenizer.
    config: the experts' order, B and the longest T.
  """
  examples = [
    sorted(
      _examples(rows_by_task[task], tokenizer, config, config.eval_rows),
      key=lambda pair: len(pair[1].tokens),
    )
    for task in config.tasks
  ]
  starts = range(0, max(map(len, examples)), config.rows)
  picked = [[e[i : i + config.rows] for e in examples] for i in starts]
  return [_stack(p, config.rows, _length(p, config)) for p in picked]


def _length(picked: list[list[tuple[int, Example]]], config: DataConfig) -> int:
  """The padded T of a batch."""
  longest = max(len(e.tokens) for _, e in itertools.chain(*picked))
  return min(-(-longest // LENGTH_STEP) * LENGTH_STEP, config.length)


def _stack(
  experts: list[list[tuple[int, Example]]], rows: int, length: int
) -> dict[str, np.ndarray]:
  shape = (len(experts), rows, length)
  batch = {
    "tokens": np.zeros(shape, np.int32),
    "positions": np.broadcast_to(
      np.arange(length, dtype=np.int32), shape
    ).copy(),
    "segment_ids": np.zeros(shape, np.int32),
    "loss_mask": np.zeros(shape, np.float32),
    "rows": np.zeros(shape[:2], np.int32),
  }
  for e, examples in enumerate(experts):
    for b, (row, example) in enumerate(examples):
      size = len(example.tokens)
      batch["tokens"][e, b, :size] = example.tokens
      batch["segment_ids"][e, b, :size] = 1
      batch["loss_mask"][e, b, :size] = example.loss_mask
      batch["rows"][e, b] = row
  return batch
