"""The rows of an experiment: a line a held-out row and arm, as they come.

FOLDER/experiment.json  what all rows have in common
FOLDER/rows.jsonl       a row each
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

# What follows, in an error, when a disk is well again, or after Ctrl-C.
AGAIN = "the same command resumes where it stopped"

# What a row must have; `scores` and `gates` may be empty. Where answers were
# generated or chosen, there is more (see `answers.Judge.judge`).
FIELDS = {
  "variant": str, "router": str, "rule": str, "cache": str, "task": str,
  "row": str, "loss": float, "tokens": int, "seconds": float, "gates": dict,
  "lead": str, "scores": dict,
}  # fmt: skip


def arm_of(row: Mapping[str, Any]) -> Arm:
  """Returns the arm of a row.

  Example:
    >>> arm_of({"variant": "base", "router": "", "rule": "", "cache": ""})
    Arm(variant='base', router='', rule='', cache='')
  """
  return Arm(*(row[field] for field in Arm._fields))


class RowLog:
  """The rows that are done, in a file or in memory alone.

  Attributes:
    rows: all of them.

  Args:
    rows: those that were done before.
    file: open for more; None keeps them in memory.
  """

  def __init__(self, rows: Sequence[dict] = (), file: TextIO | None = None):
    self.rows = list(rows)
    self._file = file
    self._done = {self._key(row) for row in self.rows}

  @staticmethod
  def _key(row: Mapping[str, Any]) -> tuple:
    return arm_of(row), row["task"], row["row"]

  def has(self, arm: Arm, task: str, row: str) -> bool:
    """Returns whether a row of a cell is done."""
    return (arm, task, row) in self._done

  def add(self, rows: Sequence[dict]) -> None:
    """Adds rows that are done; when it returns they are on the disk.

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
  """Holds the folder of an experiment, which is new or holds this very one.

  Args:
    folder: made if need be.
    about: settings and digests that all rows have in common, nested dicts of
      JSON values. Those of `rows`, {task: digest}, may be of other tasks.

  Yields:
    The rows that are done. A last line that was not written to its end is
    dropped.

  Raises:
    InputError: another process works in it, or it holds an experiment with
      other settings, another bank or other rows, or something else.
    KeyboardInterrupt: with Ctrl-C; says that the same command resumes.
  """
  file = folder / "experiment.json"
  with writing(folder, AGAIN):
    folder.mkdir(parents=True, exist_ok=True)
  with locked(folder, "--output", "evaluate"):
    # As it is when it is read again: lists, not tuples.
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
  """Returns the text to write, or raises `InputError` if it is another's."""
  try:
    old = json.loads(file.read_text())
    rows = dict(old["rows"])
    new = {**about, "rows": {**rows, **about["rows"]}}
    # A task that is not there yet is none that differs.
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
    file: rows.jsonl; none is no rows.
    drop_torn: cut a last line that was not written to its end off the file.

  Raises:
    InputError: a line is no row; names it.
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
  """Returns a short fingerprint of some bytes and of where each part ends.

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
  """Returns a fingerprint of a bank's folder: settings and arrays."""
  files = sorted(
    path.relative_to(folder).as_posix()
    for kind in ("json", "safetensors")
    for path in folder.rglob(f"*.{kind}")
  )
  pairs = ((name.encode(), (folder / name).read_bytes()) for name in files)
  return digest(part for pair in pairs for part in pair)
