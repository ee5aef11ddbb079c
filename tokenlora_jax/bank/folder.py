"""How a bank's folder is written, so that a kill at any moment leaves a bank.

A writer puts new files into a scratch folder inside the bank, and then replaces
bank.json, in one step, by one that names the scratch folder (`moving`). From
then on the edit is decided: readers look there first. What remains is to move
the files to their places, to remove what is gone, and to write bank.json
without `moving`. The next writer finishes what a killed one had decided, and
removes what it had not. Files that stay are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import logging
import os
from pathlib import Path
import shutil
import tempfile

from tokenlora_jax.bank.record import (
  BANK,
  ROUTERS,
  SCRATCH,
  BankRecord,
  Moving,
  read_record,
)
from tokenlora_jax.config import InputError
from tokenlora_jax.files import NO_LOCKS, lock, write_atomically

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def drafting(folder: Path) -> Iterator[Path]:
  """Holds a bank's folder, and yields a scratch folder in it for new files.

  Args:
    folder: a bank, or a folder that is empty or not there yet.

  Yields:
    The scratch folder, for `publish`; removed at the end.

  Raises:
    InputError: the folder holds something that is no bank, or another process
      writes to it.
  """
  _check_bank(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    try:
      _tidy(folder)
      yield Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    finally:
      _tidy(folder)
      if not any(folder.iterdir()):
        folder.rmdir()


def publish(
  folder: Path, scratch: Path, record: BankRecord, gone: Sequence[str] = ()
) -> None:
  """Makes a draft the bank.

  Args:
    folder: the bank's.
    scratch: from `drafting`, with the files that are new, at their paths in the
      bank.
    record: of the bank as it is to be.
    gone: experts' folders and routers' files to remove.
  """
  for path in sorted(scratch.rglob("*")):
    _sync(path)
  decided = dataclasses.replace(
    record, moving=Moving(scratch.name, tuple(gone))
  )
  _write(folder, decided)
  _sync(folder)  # Before anything is removed.
  _settle(folder, decided)


def _settle(folder: Path, record: BankRecord) -> None:
  """Does what was decided; may be stopped and begun again anywhere."""
  scratch = folder / record.moving.scratch
  for new in sorted(scratch.iterdir()) if scratch.is_dir() else ():
    if new.name == ROUTERS:
      (folder / ROUTERS).mkdir(exist_ok=True)
      for file in sorted(new.iterdir()):
        file.replace(folder / ROUTERS / file.name)
      continue
    if new.is_dir():
      _remove(folder / new.name)  # Readers have the new one already.
    new.replace(folder / new.name)
  for path in record.moving.gone:
    _remove(folder / path)
  _remove(scratch)
  with contextlib.suppress(OSError):  # It is not there, or not empty.
    (folder / ROUTERS).rmdir()
  _write(folder, dataclasses.replace(record, moving=None))


def _write(folder: Path, record: BankRecord) -> None:
  write_atomically(folder / BANK, record.to_json())


def _tidy(folder: Path) -> None:
  """Finishes what an edit had decided, and removes what it had not."""
  with contextlib.suppress(InputError):  # No bank.json yet, or a damaged one.
    record = read_record(folder)
    if record.moving is not None:
      _settle(folder, record)
  for pattern in (f"{SCRATCH}*", f".{BANK}.*"):
    for path in folder.glob(pattern):
      _remove(path)


def _check_bank(folder: Path) -> None:
  if not folder.exists() or (folder / BANK).is_file():
    return
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else [""]
  if not all(name.startswith((SCRATCH, f".{BANK}.")) for name in names):
    raise InputError(f"{folder}: exists and is not a bank; choose another")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Keeps other writers out; the lock dies with the process."""
  place = os.open(folder, os.O_RDONLY)
  try:
    lock(place)
  except BlockingIOError:
    os.close(place)
    raise InputError(
      f"{folder}: another process writes to this bank; wait for its end"
    ) from None
  except OSError as error:
    if error.errno not in NO_LOCKS:
      os.close(place)
      raise
    _log.warning(
      "%s: its disk has no locks (%s); let no other process write to this bank",
      folder, error.strerror,
    )  # fmt: skip
  try:
    yield
  finally:
    os.close(place)


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
  """Waits until it is on the disk, which may lose power."""
  place = os.open(path, os.O_RDONLY)
  try:
    os.fsync(place)
  finally:
    os.close(place)
