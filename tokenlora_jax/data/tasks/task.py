"""The interface of a task, and checked reading of untrusted rows."""

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

# One in this many built-in prompts is held out, for every seed.
_HELD_OUT_ONE_IN = 8


class Task(abc.ABC):
  """A task that an expert learns: the sources of its rows and their texts.

  The text of a training row is `prompt + answer`: a prompt ends with "Answer:"
  and an answer starts with a space. A task for evaluation alone has the texts
  of its paper. A row is a dict in the schema of the dataset's hub version; a
  field that breaks it raises an `InputError` that names it.

  Attributes:
    name: its name in settings, folders and reports.
    template: the form of its prompts, the rows' fields in braces.
    suffix: file ending of its local files, `train.SUFFIX` and `test.SUFFIX`.
    hub: the arguments of `datasets.load_dataset`: id and, if any, config.
    tfds: its name in TensorFlow Datasets; "" if it is not there.
    splits: names of `train` and `test` on the hub and in tfds; without `train`
      if it is for evaluation alone.
  """

  name: ClassVar[str]
  template: ClassVar[str]
  suffix: ClassVar[str] = "jsonl"
  hub: ClassVar[tuple[str, ...]]
  tfds: ClassVar[str] = ""
  splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}

  @abc.abstractmethod
  def prompt(self, row: Any) -> str:
    """Returns a row's prompt, the model's input.

    Args:
      row: an unchecked row.

    Raises:
      InputError: the row breaks the schema; names the field.
    """

  @abc.abstractmethod
  def answer(self, row: Any) -> str:
    """Returns a row's answer, the target text.

    Args:
      row: an unchecked row.

    Raises:
      InputError: the row breaks the schema; names the field.
    """

  @abc.abstractmethod
  def invent(self, rng: random.Random) -> dict[str, Any]:
    """Returns one random built-in row.

    Args:
      rng: draws the row.

    Returns:
      A row in the schema of the dataset's hub version.
    """

  def read(self, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of a file in the dataset's original format.

    Args:
      path: the file: JSON lines or, unless its name ends in .jsonl, a JSON list
        of rows.

    Yields:
      The line (or the path inside the JSON document) and the unchecked row.

    Raises:
      InputError: the file cannot be read, or has neither format.
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
    """Returns whether a file holds JSON lines; its name does not matter.

    It does if its first line is a row: an object with a field of the prompt.

    Args:
      path: the file.
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
    """Converts a TensorFlow Datasets row (texts decoded) to our schema.

    Args:
      row: a row of TensorFlow Datasets, its texts decoded.
    """
    return row

  def generate(
    self, seed: int, count: int, split: str = "train"
  ) -> list[dict[str, Any]]:
    """Returns built-in rows, all different.

    A prompt's hash decides its split, so training and held-out rows never
    overlap, not even under different seeds.

    Args:
      seed: seeds the rows; a larger `count` starts with the same rows.
      count: number of rows.
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
  """Parses JSON; bytes that are not UTF-8 become halves of surrogate pairs.

  So they spoil only their own row, which `_text` refuses.
  """
  return json.loads(raw.decode(json.detect_encoding(raw), "surrogateescape"))


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
  """Yields (line number, row) of JSON lines.

  Args:
    path: the file.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    ...   _ = Path(file.name).write_text('{"question": "a"}\\n')
    ...   list(read_lines(Path(file.name)))
    [('1', {'question': 'a'})]
  """
  with reading(path) as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        row = _loads(line)
      except (ValueError, RecursionError):
        row = line.decode(errors="replace").strip()  # the check names the fault
      yield str(number), row


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
  """Opens a file of rows; if that fails, raises an `InputError`.

  Args:
    path: the file.

  Raises:
    InputError: the file cannot be read.
  """
  try:
    with path.open("rb") as file:
      yield file
  except OSError as error:
    raise InputError(
      f"{path}: cannot be read ({error.strerror}); want a file of rows"
    ) from None


def read_json(path: Path) -> Any:
  """Reads a JSON file, or raises an `InputError` that names the line.

  Args:
    path: the file.

  Raises:
    InputError: the file cannot be read, or is not JSON in UTF-8.
  """
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
    row: an unchecked row, of any type.
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
  """Returns the list at `lookup(row, *keys)`.

  Args:
    row: an unchecked row, of any type.
    *keys: names of nested fields.

  Example:
    >>> items({"choices": {"label": ["A", "B"]}}, "choices", "label")
    ['A', 'B']
  """
  value = lookup(row, *keys)
  if not isinstance(value, list):
    field = ".".join(keys)
    raise InputError(f"field {field!r}: want a list, got {_brief(value)}")
  return value


def text(row: Any, *keys: str, empty: bool = False) -> str:
  """Returns the text at `lookup(row, *keys)`.

  Args:
    row: an unchecked row, of any type.
    keys: names of nested fields.
    empty: whether a text may be empty or only white space.

  Example:
    >>> text({"question": "What is 2 + 2?"}, "question")
    'What is 2 + 2?'
  """
  return _text(lookup(row, *keys), ".".join(keys), empty)


def texts(row: Any, *keys: str) -> list[str]:
  """Returns the list of texts at `lookup(row, *keys)`, at least one.

  Args:
    row: an unchecked row, of any type.
    *keys: names of nested fields.

  Example:
    >>> texts({"answers": {"text": ["4", "four"]}}, "answers", "text")
    ['4', 'four']
  """
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
