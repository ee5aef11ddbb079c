"""What a task is, and how fields of untrusted rows are read."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
import contextlib
import json
from pathlib import Path
import random
from typing import Any, BinaryIO, ClassVar
import zlib

from tokenlora_jax.config import InputError, nearest

# One of this many built-in prompts is held out, whatever the seed.
_HELD_OUT_ONE_IN = 8


class Task(abc.ABC):
  """One skill an expert learns: where its rows are and what they say.

  The text of a training row is `prompt + answer`: a prompt ends with "Answer:"
  and an answer starts with a space. A task that is only evaluated has the texts
  of its paper. A row is a dict in the schema of the data set's hub version; a
  field that breaks it raises an `InputError` that names it.

  Attributes:
    name: in settings, folders and reports.
    template: the form of its prompts, the rows' fields in braces.
    suffix: of its local files, `train.SUFFIX` and `test.SUFFIX`.
    hub: the arguments of `datasets.load_dataset`: id and, if any, config.
    tfds: its name in TensorFlow Datasets; "" is not there.
    splits: our `train` and `test` in the words of the hub and of tfds; no
      `train` if it is only evaluated.
  """

  name: ClassVar[str]
  template: ClassVar[str]
  suffix: ClassVar[str] = "jsonl"
  hub: ClassVar[tuple[str, ...]]
  tfds: ClassVar[str] = ""
  splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}

  @abc.abstractmethod
  def prompt(self, row: Any) -> str:
    """Returns what the model is given."""

  @abc.abstractmethod
  def answer(self, row: Any) -> str:
    """Returns what the model is to say."""

  @abc.abstractmethod
  def invent(self, rng: random.Random) -> dict[str, Any]:
    """Returns one built-in row, drawn with `rng`."""

  def read(self, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of a file in the data set's original format.

    Args:
      path: the file: JSON lines or, unless its name ends in .jsonl, a JSON list
        of rows.

    Yields:
      The line (or the path inside the JSON document) and the unchecked row.

    Raises:
      InputError: the file cannot be read, or is neither.
    """
    if not self.in_lines(path):
      document = read_json(path)
      if not isinstance(document, list):
        raise InputError(f"{path}: want a JSON list of rows")
      for i, row in enumerate(document):
        yield f"[{i}]", row
      return
    yield from read_lines(path)

  def in_lines(self, path: Path) -> bool:
    """Returns whether a file is JSON lines, whatever its name says.

    It is where its first line is a row by itself: an object that has a field of
    the prompt.
    """
    if path.suffix == ".jsonl":
      return True
    with reading(path) as lines:
      first = next((line for line in lines if line.strip()), b"")
    try:
      row = _loads(first)
    except (ValueError, RecursionError):
      return False
    return isinstance(row, dict) and any(
      f"{{{field}}}" in self.template for field in row
    )

  def from_tfds(self, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of TensorFlow Datasets (texts decoded) in our schema."""
    return row

  def generate(
    self, seed: int, count: int, split: str = "train"
  ) -> list[dict[str, Any]]:
    """Returns built-in rows, all different.

    A prompt's own hash says which split it is in, so training and held-out
    rows never meet, not even under different seeds.

    Args:
      seed: of the draw; more rows of one seed begin with the same ones.
      count: how many rows.
      split: `train` or `test`.

    Example:
      >>> from tokenlora_jax.data.tasks import get_task
      >>> len(get_task("squad").generate(seed=0, count=3))
      3
    """
    rng = random.Random(f"{self.name}:{split}:{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
      row = self.invent(rng)
      prompt = self.prompt(row)
      held_out = zlib.crc32(prompt.encode()) % _HELD_OUT_ONE_IN == 0
      if held_out == (split == "test"):
        rows.setdefault(prompt, row)
    return list(rows.values())


def _loads(raw: bytes) -> Any:
  """Parses JSON; of bytes that are no UTF-8 it makes halves of surrogate pairs.

  So they break no more than the row that they are in: `_text` refuses it.
  """
  return json.loads(raw.decode(json.detect_encoding(raw), "surrogateescape"))


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
  """Yields (line number, row) of JSON lines."""
  with reading(path) as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        row = _loads(line)
      except (ValueError, RecursionError):
        row = line.decode(errors="replace").strip()  # the check will name it
      yield str(number), row


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
  """Opens a file of rows; a folder, or one that may not be read, is a line."""
  try:
    with path.open("rb") as file:
      yield file
  except OSError as error:
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); want a file of rows"
    ) from None


def read_json(path: Path) -> Any:
  """Returns a file's JSON document, or raises an `InputError` naming the line."""
  with reading(path) as file:
    raw = file.read()
  try:
    return _loads(raw)
  except json.JSONDecodeError as error:
    raise InputError(
      f"{path}:{error.lineno}: malformed JSON at column {error.colno}: "
      f"{error.msg}"
    ) from None
  except (UnicodeDecodeError, RecursionError) as error:
    raise InputError(f"{path}: not JSON in UTF-8: {error}") from None


def lookup(row: Any, *keys: str) -> Any:
  """Returns row[keys[0]][keys[1]]..., or raises an `InputError` naming it.

  Args:
    row: what a file held, of any type.
    keys: names of nested fields.

  Example:
    >>> lookup({"choices": {"label": ["A", "B"]}}, "choices", "label")
    ['A', 'B']
  """
  for depth, key in enumerate(keys):
    if not isinstance(row, dict):
      field = f"field {'.'.join(keys[:depth])!r}: " if depth else ""
      raise InputError(f"{field}want a JSON object, got {_brief(row)}")
    if key not in row:
      field = ".".join(keys[: depth + 1])
      raise InputError(f"field {field!r} is missing{nearest(key, row)}")
    row = row[key]
  return row


def items(row: Any, *keys: str) -> list[Any]:
  """Returns the list at `lookup(row, *keys)`."""
  value = lookup(row, *keys)
  if not isinstance(value, list):
    field = ".".join(keys)
    raise InputError(f"field {field!r}: want a list, got {_brief(value)}")
  return value


def text(row: Any, *keys: str, empty: bool = False) -> str:
  """Returns the text at `lookup(row, *keys)`.

  Args:
    row: what a file held, of any type.
    keys: names of nested fields.
    empty: whether a text of nothing but white space will do.
  """
  return _text(lookup(row, *keys), ".".join(keys), empty)


def texts(row: Any, *keys: str) -> list[str]:
  """Returns the list of texts at `lookup(row, *keys)`, at least one."""
  values = items(row, *keys)
  field = ".".join(keys)
  if not values:
    raise InputError(f"field {field!r} is empty")
  return [_text(value, f"{field}[{i}]") for i, value in enumerate(values)]


def _text(value: Any, field: str, empty: bool = False) -> str:
  if not isinstance(value, str):
    raise InputError(f"field {field!r}: want text, got {_brief(value)}")
  if not empty and not value.strip():
    raise InputError(f"field {field!r} is empty")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f"field {field!r}: character {error.start + 1} is no text in UTF-8 but"
      f" {value[error.start]!a}, a stray byte or half a surrogate pair"
    ) from None
  return value


def _brief(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 40 else f"{shown[:37]}..."
