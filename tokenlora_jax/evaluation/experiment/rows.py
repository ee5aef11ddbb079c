"""The rows of an experiment, one line per arm and held-out row.

FOLDER/experiment.json  the settings that all rows share
FOLDER/rows.jsonl       one scored row per line, appended at once
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from tokenlora_jax.config import InputError, differences
from tokenlora_jax.evaluation.experiment.arms import Arm
from tokenlora_jax.files import locked, write_atomically, writing

FORMAT = 1

# The remedy in errors of the disk and after Ctrl-C.
AGAIN = "the same command resumes where it stopped"

# The fields of a row; `scores` and `gates` may be empty. Generated or chosen
# answers add fields (see `answers.Judge.judge`).
FIELDS = {
  "variant": str, "router": str, "rule": str, "cache": str, "task": str,
  "row": str, "loss": float, "tokens": int, "seconds": float, "gates": dict,
  "lead": str, "scores": dict,
}  # fmt: skip


def arm_of(row: Mapping[str, Any]) -> Arm:
  """Returns the arm of a row.

  Args:
    row: a scored row.

  Example:
    >>> arm_of({"variant": "base", "router": "", "rule": "", "cache": ""})
    Arm(variant='base', router='', rule='', cache='')
  """
  return Arm(*(row[field] for field in Arm._fields))


class RowLog:
  """The scored rows, in a file or in memory alone.

  Attributes:
    rows: all scored rows.

  Args:
    rows: the rows scored before.
    file: open for appending; None keeps rows in memory.

  Example:
    >>> row = {"variant": "base", "router": "", "rule": "", "cache": ""}
    >>> log = RowLog()
    >>> log.add([row | {"task": "gsm8k", "row": "1"}])
    >>> log.has(Arm("base"), "gsm8k", "1"), log.has(Arm("base"), "gsm8k", "2")
    (True, False)
  """

  def __init__(self, rows: Sequence[dict] = (), file: TextIO | None = None):
    self.rows = list(rows)
    self._file = file
    self._done = {self._key(row) for row in self.rows}

  @staticmethod
  def _key(row: Mapping[str, Any]) -> tuple:
    return arm_of(row), row["task"], row["row"]

  def has(self, arm: Arm, task: str, row: str) -> bool:
    """Returns whether a row of a cell is scored.

    Args:
      arm: the cell's arm.
      task: the cell's task.
      row: the question's name.
    """
    return (arm, task, row) in self._done

  def add(self, rows: Sequence[dict]) -> None:
    """Appends scored rows, and waits until they are on the disk.

    Args:
      rows: the rows, with the fields `FIELDS`.

    Raises:
      InputError: the disk is full or fails.
    """
    if self._file is not None:
      lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
      with writing(Path(self._file.name).parent, AGAIN):
        self._file.write("".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
    self.rows += rows
    self._done |= {self._key(row) for row in rows}


@contextlib.contextmanager
def open_rows(folder: Path, about: Mapping[str, Any]) -> Iterator[RowLog]:
  """Locks the folder of an experiment, and opens its rows to append more.

  Args:
    folder: a new folder, or one of this very experiment.
    about: settings and digests that all rows share, nested dicts of JSON
      values. Its `rows`, {task: digest}, may name other tasks than the
      folder's.

  Yields:
    The scored rows. An incomplete last line is dropped.

  Raises:
    InputError: another process works in the folder, or it holds something else:
      an experiment with other settings, another bank or other rows.
    KeyboardInterrupt: on Ctrl-C; says that the same command resumes.
  """
  file = folder / "experiment.json"
  with writing(folder, AGAIN):
    folder.mkdir(parents=True, exist_ok=True)
  with locked(folder, "--output", "evaluate"):
    # Converted as JSON will be read again: lists, not tuples.
    about = json.loads(json.dumps({"format": FORMAT, **about}))
    if file.exists():
      about = _same(file, about)
    elif (folder / "rows.jsonl").exists():
      raise InputError(
        f"--output {folder}: holds rows.jsonl, but no experiment.json that says"
        " of what; choose another --output"
      )
    with writing(folder, AGAIN):
      write_atomically(file, json.dumps(about, indent=2) + "\n")
    rows = read_rows(folder / "rows.jsonl", drop_torn=True)
    with (folder / "rows.jsonl").open("a") as lines:
      try:
        yield RowLog(rows, lines)
      except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {AGAIN}") from None


def _same(file: Path, about: dict[str, Any]) -> dict[str, Any]:
  """Returns the values to write; raises `InputError` if they differ."""
  try:
    old = json.loads(file.read_text())
    rows = dict(old["rows"])
    new = {**about, "rows": {**rows, **about["rows"]}}
    # A task that is missing on one side is no difference.
    old["rows"] = {**new["rows"], **rows}
    changed = differences(old, new)
    if ("generate" in old) != ("generate" in new):
      changed = [f"{'' if 'generate' in old else 'no '}--generate"]
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise InputError(f"{file}: not an experiment's ({error!r})") from None
  if changed:
    raise InputError(
      f"--output {file.parent}: holds an experiment with {changed[0]}; choose"
      " another --output, or restore its settings to resume it"
    )
  return new


def read_rows(file: Path, drop_torn: bool = False) -> list[dict[str, Any]]:
  """Reads the rows of an experiment.

  Args:
    file: rows.jsonl; a missing file has no rows.
    drop_torn: cut an incomplete last line off the file.

  Raises:
    InputError: a line is not a row; names it.
  """
  if not file.exists():
    return []
  content = file.read_bytes()
  whole = content.rfind(b"\n") + 1
  if drop_torn and whole < len(content):
    with file.open("r+b") as rest:
      rest.truncate(whole)
  rows = []
  for number, line in enumerate(content[:whole].splitlines(), 1):
    try:
      row = json.loads(line)
      wrong = [f for f, kind in FIELDS.items() if type(row[f]) is not kind]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
      wrong = [repr(error)]
    if wrong:
      raise InputError(f"{file}:{number}: is no row ({wrong[0]}); delete it")
    rows.append(row)
  return rows


def digest(parts: Iterable[bytes]) -> str:
  """Hashes parts of bytes and where each ends: 16 hex digits of SHA-256.

  Args:
    parts: the bytes.

  Example:
    >>> digest([b"a", b"b"]) == digest([b"ab"])
    False
  """
  found = hashlib.sha256()
  for part in parts:
    found.update(len(part).to_bytes(8, "little"))
    found.update(part)
  return found.hexdigest()[:16]


def digest_bank(folder: Path) -> str:
  """Hashes the JSON and safetensors files of a bank's folder.

  Args:
    folder: the bank's folder.
  """
  files = sorted(
    path.relative_to(folder).as_posix()
    for kind in ("json", "safetensors")
    for path in folder.rglob(f"*.{kind}")
  )
  pairs = ((name.encode(), (folder / name).read_bytes()) for name in files)
  return digest(part for pair in pairs for part in pair)
