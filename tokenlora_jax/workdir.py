"""A run's folder: whose it is, and what happens when its disk fails."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import logging
import os
from pathlib import Path
import re
import socket

import jax
from jax.experimental import multihost_utils
import numpy as np

from tokenlora_jax.config import Config, InputError, differences

# Settings that may change between two starts of one run.
MAY_CHANGE = (
  "workdir", "mesh", "router", "decode", "remat", "accumulate",
  "eval_every", "save_every", "keep", "resume",
)  # fmt: skip

# What a file system answers that cannot lock files.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claim_workdir(config: Config) -> Iterator[Path]:
  """Holds the run's folder, which is new or holds this very run.

  A lock that dies with the process keeps a second trainer out. Only process 0
  looks and writes; all processes start, or none.

  Yields:
    The folder, with the resolved config in `config.json`.

  Raises:
    InputError: another process trains in it, it holds a run of another config,
      or `resume` is off and it holds any; or it cannot be written to, now or
      while it is held.
  """
  workdir = Path(config.workdir)
  with contextlib.ExitStack() as stack:
    refusal = None
    if jax.process_index() == 0:
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(workdir, "--workdir", "train"))
        _check(workdir, config)
        text = json.dumps(config.to_json(), indent=2) + "\n"
        write_atomically(workdir / "config.json", text)
      except InputError as error:
        refusal = error
      except OSError as error:
        refusal = InputError(
          f"--workdir {workdir}: cannot be written to ({error.strerror})"
        )
    if multihost_utils.broadcast_one_to_all(np.array(refusal is not None)):
      raise refusal or InputError(f"--workdir {workdir}: see process 0's error")
    with writing(workdir):
      yield workdir


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
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _check(workdir: Path, config: Config) -> None:
  """Raises `InputError` unless the folder is this run's or no run's."""
  file = workdir / "config.json"
  if file.exists():
    try:
      old = json.loads(file.read_text())
      changed = differences(old, config.to_json(), MAY_CHANGE)
    except (ValueError, AttributeError) as error:
      raise InputError(f"{file}: not a run's config ({error})") from None
    if changed:
      raise InputError(
        f"--workdir {workdir}: holds a run with {changed[0]}; choose another"
        " --workdir, or go back to its settings to go on with it"
      )
    if not config.resume:
      raise InputError(
        f"--workdir {workdir}: holds this run already; choose another, or"
        " leave out --no-resume to go on with it"
      )
  elif (workdir / "checkpoints").exists():
    raise InputError(
      f"--workdir {workdir}: holds checkpoints, but no config.json that says of"
      " which run; choose another --workdir"
    )


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
