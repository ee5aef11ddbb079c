"""Atomic file writes, folder locks, and reading of text lines."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
from io import FileIO, TextIOBase
import logging
import os
from pathlib import Path
import re
import socket

from tokenlora_jax.config import InputError

try:
  import fcntl
except ModuleNotFoundError:  # Windows.
  fcntl = None

# Error numbers of a file system that does not support locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

_log = logging.getLogger(__name__)


def lock(place: int) -> None:
  """Locks an open file or folder until it is closed or the process dies.

  Args:
    place: its file descriptor.

  Raises:
    BlockingIOError: another process holds the lock.
    OSError: it cannot be locked; `errno` is one of `NO_LOCKS` if the disk or
      the operating system does not support locks.
  """
  if fcntl is None:
    raise OSError(errno.ENOSYS, "this system has no flock")
  fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path, flag: str, does: str) -> Iterator[None]:
  """Locks a folder; the lock file names the process, whose end frees it.

  Args:
    folder: an existing folder.
    flag: the flag that errors name.
    does: a verb for errors: what the owner does in the folder.

  Raises:
    InputError: another process holds the lock.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   with locked(Path(folder), "--workdir", "train"):
    ...     print("only this process")
    only this process
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
  then: str = "the same command resumes from its newest checkpoint",
) -> Iterator[None]:
  """Turns disk errors while writing to a folder into a one-line `InputError`.

  Args:
    folder: the folder that is written to.
    then: the end of the error: what works again once the disk does.

  Raises:
    InputError: the disk is full or fails.

  Example:
    >>> with writing(Path("runs/a")):
    ...   raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    tokenlora_jax.config.errors.InputError: runs/a: cannot be written to (No space left on device); make room there, and the same command resumes from its newest checkpoint
  """
  try:
    yield
  except BrokenPipeError:  # The reader of our output left: no disk error.
    raise
  # Orbax and safetensors raise errors of the disk as types of their own.
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
  """Returns an error's `errno`, or 0 if it has none."""
  if isinstance(error, OSError):
    return error.errno or 0
  # Native code of Orbax and safetensors puts it into other errors' messages.
  found = re.search(r"\bos[_ ]error(?:_code='| )(\d+)", str(error))
  return int(found[1]) if found else 0


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a file atomically: the whole file or nothing; text as UTF-8.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_atomically(Path(folder, "a.json"), "{}")
    ...   Path(folder, "a.json").read_text()
    '{}'
  """
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


class NewLines:
  """A new file to which whole lines are added; a context manager.

  A line is on the disk once `add` returns, so a killed process leaves whole
  lines. A file without lines is removed.

  Args:
    flag: the flag that errors name.
    path: the file's path; "" writes nothing.

  Attributes:
    count: number of lines added.

  Raises:
    InputError: the file exists already, or its disk is full or fails.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   with NewLines("--output", f"{folder}/texts.jsonl") as lines:
    ...     lines.add("{}")
    ...   Path(folder, "texts.jsonl").read_text()
    '{}\\n'
  """

  def __init__(self, flag: str, path: str):
    self._flag, self._path = flag, Path(path)
    self._file: FileIO | None = None
    self.count = 0
    if not path:
      return
    check_new_file(flag, path)
    with self._said():
      # Unbuffered: a line is one write. Another process may have been faster.
      self._file = self._path.open("xb", buffering=0)

  @contextlib.contextmanager
  def _said(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise InputError(
        f"{self._flag} {self._path}: cannot be written to ({error.strerror});"
        " choose another file"
      ) from None

  def add(self, line: str) -> None:
    """Writes a line, whole or not at all."""
    if self._file is None:
      return
    data = memoryview(f"{line}\n".encode())
    start = self._file.tell()
    try:
      with self._said():
        while data:
          data = data[self._file.write(data) :]
    except BaseException:  # Ctrl-C, too: no half of a line stays.
      self._file.truncate(start)
      self._file.seek(start)
      raise
    self.count += 1

  def __enter__(self) -> NewLines:
    return self

  def __exit__(self, *_: object) -> None:
    if self._file is not None:
      self._file.close()
      if not self.count:
        self._path.unlink(missing_ok=True)


def check_new_file(flag: str, path: str) -> None:
  """Raises `InputError` if a file exists already or its folder does not.

  Args:
    flag: the flag that errors name.
    path: the file's path; "" means that no file is written.
  """
  file = Path(path)
  if path and file.exists():
    raise InputError(f"{flag} {file}: exists; choose a new file")
  if not file.parent.is_dir():
    raise InputError(f"{flag} {file}: there is no folder {file.parent}")


def read_lines(source: Path | TextIOBase, name: str, what: str) -> list[str]:
  """Returns the lines of `numbered_lines` without their numbers.

  Example:
    >>> from io import StringIO
    >>> read_lines(StringIO("one\\n\\ntwo\\n"), "stdin", "prompt")
    ['one', 'two']
  """
  return [line for _, line in numbered_lines(source, name, what)]


def numbered_lines(
  source: Path | TextIOBase, name: str, what: str
) -> list[tuple[int, str]]:
  """Returns the lines of a UTF-8 text file that are not blank, numbered from 1.

  Lines end at LF or CRLF only; a byte order mark at the start is dropped.

  Args:
    source: a file's path, or an open file.
    name: the file's name in errors.
    what: what a line holds, for errors.

  Raises:
    InputError: the file cannot be read, is not UTF-8, or has only blank lines.

  Example:
    >>> from io import StringIO
    >>> numbered_lines(StringIO("one\\n\\ntwo\\n"), "stdin", "prompt")
    [(1, 'one'), (3, 'two')]
  """
  try:
    if isinstance(source, Path):
      text = source.read_bytes()
    else:
      # Reads bytes: an open text file uses the locale and also splits at CR.
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
  lines = [
    (number, line.removesuffix("\r"))
    for number, line in enumerate(lines, 1)
    if line.strip()
  ]
  if not lines:
    raise InputError(f"{name}: holds no {what}")
  return lines
