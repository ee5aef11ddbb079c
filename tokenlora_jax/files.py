"""Files: writes that survive kills, locks, new files, lines."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import logging
import os
from pathlib import Path
import re
import socket
from typing import TextIO

from tokenlora_jax.config import InputError

try:
  import fcntl
except ModuleNotFoundError:  # Windows.
  fcntl = None

# What a file system answers that cannot lock files.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

_log = logging.getLogger(__name__)


def lock(place: int) -> None:
  """Locks an open file or folder until it is closed or the process dies.

  Args:
    place: its file descriptor.

  Raises:
    BlockingIOError: another process holds the lock.
    OSError: it cannot be locked; `errno` is one of `NO_LOCKS` where nothing on
      this disk, or in this system, can be.
  """
  if fcntl is None:
    raise OSError(errno.ENOSYS, "this system has no flock")
  fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path, flag: str, does: str) -> Iterator[None]:
  """Holds a folder's lock, which says who has it and dies with the process.

  Args:
    folder: which is there.
    flag: that names it in errors.
    does: what its owner does in it, a verb.

  Raises:
    InputError: another process holds it.
  """
  with (folder / ".lock").open("a+") as file:
    try:
      lock(file.fileno())
    except BlockingIOError:
      file.seek(0)
      owner = file.read().strip() or "another process"
      raise InputError(
        f"{flag} {folder}: {owner} {does}s in it; wait for its end, stop it,"
        f" or choose another {flag}"
      ) from None
    except OSError as error:
      if error.errno not in NO_LOCKS:
        raise
      _log.warning(
        "%s %s: its disk has no locks (%s); let no other process %s in it",
        flag, folder, error.strerror, does,
      )  # fmt: skip
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    try:
      yield
    finally:
      file.truncate(0)


@contextlib.contextmanager
def writing(
  folder: Path,
  then: str = "the same command goes on from its newest checkpoint",
) -> Iterator[None]:
  """Puts an error of the disk that a folder is on into one line.

  Args:
    folder: what is written to.
    then: what follows once the disk is well again.

  Raises:
    InputError: the disk is full or fails.

  Example:
    >>> with writing(Path("runs/a")):
    ...   raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    tokenlora_jax.config.errors.InputError: runs/a: cannot be written to (No space left on device); make room there, and the same command goes on from its newest checkpoint
  """
  try:
    yield
  except BrokenPipeError:  # Of whoever reads what is printed.
    raise
  except Exception as error:
    number = _error_number(error)
    if not number:
      raise
    full = number in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room there" if full else "make it writable"
    raise InputError(
      f"{folder}: cannot be written to ({os.strerror(number)}); {remedy},"
      f" and {then}"
    ) from error


def _error_number(error: Exception) -> int:
  """Returns the `errno` of an error of the operating system, else 0."""
  if isinstance(error, OSError):
    return error.errno or 0
  # Orbax's and safetensors' native code say it in the text of other types.
  found = re.search(r"\bos[_ ]error(?:_code='| )(\d+)", str(error))
  return int(found[1]) if found else 0


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a file, text as UTF-8, so that it is there whole or not at all."""
  data = content.encode() if isinstance(content, str) else content
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # The disk may lose power, too.
    temporary.replace(path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      temporary.unlink()


def check_new_file(flag: str, path: str) -> None:
  """Raises `InputError` unless a file can be written there and none is there.

  Args:
    flag: names the file in errors.
    path: of the file; nothing is to be written where it is empty.
  """
  file = Path(path)
  if path and file.exists():
    raise InputError(f"{flag} {file}: exists; choose a new file")
  if not file.parent.is_dir():
    raise InputError(f"{flag} {file}: there is no folder {file.parent}")


def read_lines(source: Path | TextIO, name: str, what: str) -> list[str]:
  """Returns the lines that are not blank.

  Lines end at LF or CRLF alone, and a byte order mark in front is dropped.

  Args:
    source: a file's path, or an open one.
    name: names it in errors.
    what: a line holds.

  Raises:
    InputError: it cannot be read, is no UTF-8, or holds no such line.
  """
  try:
    if isinstance(source, Path):
      text = source.read_bytes()
    else:
      # Text files were decoded in the machine's own way, and cut at CR too.
      text = getattr(source, "buffer", source).read()
    if isinstance(text, bytes):
      text = text.decode()
  except UnicodeDecodeError as error:
    raise InputError(
      f"{name} cannot be read: byte {error.start} is no UTF-8; save it as UTF-8"
    ) from None
  except OSError as error:
    raise InputError(f"{name} cannot be read: {error}") from None
  lines = text.removeprefix("\ufeff").split("\n")
  lines = [line.removesuffix("\r") for line in lines]
  lines = [line for line in lines if line.strip()]
  if not lines:
    raise InputError(f"{name}: holds no {what}")
  return lines
