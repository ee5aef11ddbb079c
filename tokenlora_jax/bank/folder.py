"""Atomic edits of a bank's folder: a kill at any moment leaves a whole bank.

  with drafting(folder) as scratch:  # Locks the bank; write new files here.
    publish(folder, scratch, record)

1. The writer puts new files into a scratch folder inside the bank.
2. It replaces bank.json, atomically, by one that names the scratch folder
   (`moving`). This commits the edit: readers look there first from now on.
3. It moves the files to their places, removes the old ones, and writes
   bank.json without `moving`.

After a kill the next writer finishes a committed edit, and removes the files of
one that was not. Unchanged files are not touched.
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

# Windows opens folders neither to lock them nor to wait until they are written.
_OPENS_FOLDERS = os.name != "nt"


@contextlib.contextmanager
def drafting(folder: Path) -> Iterator[Path]:
  """Locks a bank's folder, and yields a scratch folder in it for new files.

  Args:
    folder: a bank's folder, or one that is empty or does not exist yet.

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
  """Commits a draft: moves its files into the bank and writes bank.json.

  Args:
    folder: the bank's folder.
    scratch: the folder from `drafting`, with the new files at their paths in
      the bank.
    record: the new bank.json.
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
  """Finishes a committed edit; may be killed and started again anywhere."""
  scratch = folder / record.moving.scratch
  for new in sorted(scratch.iterdir()) if scratch.is_dir() else ():
    if new.name == ROUTERS:
      (folder / ROUTERS).mkdir(exist_ok=True)
      for file in sorted(new.iterdir()):
        file.replace(folder / ROUTERS / file.name)
      continue
    if new.is_dir():
      _remove(folder / new.name)  # Readers use the new one already.
    new.replace(folder / new.name)
  for path in record.moving.gone:
    _remove(folder / path)
  _remove(scratch)
  with contextlib.suppress(OSError):  # It does not exist, or is not empty.
    (folder / ROUTERS).rmdir()
  _write(folder, dataclasses.replace(record, moving=None))


def _write(folder: Path, record: BankRecord) -> None:
  write_atomically(folder / BANK, record.to_json())


def _tidy(folder: Path) -> None:
  """Finishes a committed edit, and removes the files of any other."""
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
  """Locks out other writers; the end of the process frees the lock."""
  if not _OPENS_FOLDERS:
    _log.warning(
      "%s: this system locks no folders; let no other process write to this"
      " bank",
      folder,
    )
    yield
    return
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
  """Flushes a path to the disk, so that it survives a power cut."""
  if not _OPENS_FOLDERS:  # Windows flushes no file opened to read.
    return
  place = os.open(path, os.O_RDONLY)
  try:
    os.fsync(place)
  finally:
    os.close(place)
