"""Runs programs that a model wrote, so that little can go wrong by accident.

A program runs in a process of its own: `python -I` (no environment, no user
packages, no current folder on the path) with an empty environment, in a fresh
empty folder that is removed afterwards, without input, its output dropped.

- Time, CPU time, memory, the size of a file and the number of processes and
  threads are limited (`Limits`), all but the first by the kernel (`setrlimit`).
- An audit hook of Python (PEP 578), which a program cannot take away, refuses
  sockets, new processes, signals, native code by ctypes, and all writing,
  renaming and removing outside the folder; inside it, it counts them.
- Where the kernel allows it (Linux, as superuser or with user namespaces), the
  process has a network namespace of its own, in which nobody else is.

What this does NOT protect from, since it is no container:

- A program that wants to get out: the hook sees what Python does, not what
  native code in an installed package does, nor a descriptor of a folder as
  `dir_fd`; and a program that looks for it can report its own success.
- Reading: it may read any file that you may.
- macOS has no network namespaces and no limit of memory, and the superuser no
  limit of processes: there the hook alone stands in their place.
- Noise: a machine that is very busy can turn a slow right program into a late
  one. CPU time does not depend on that, so its limit is the narrower one.

Run programs of a model that you do not trust in a virtual machine, and not as
superuser. The idea of running such programs at all, and what was guarded
there: Chen et al., 2021, arXiv 2107.03374, section 2.3.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile

from tokenlora_jax.config import InputError, check
from tokenlora_jax.evaluation.scoring.child import STARTED

_CHILD = str(Path(__file__).with_name("child.py"))


@dataclasses.dataclass(frozen=True)
class Limits:
  """The most that a program may take.

  Attributes:
    seconds: from start to end.
    cpu_seconds: of its own work, whole.
    memory: bytes of address space, those of Python included.
    file_size: bytes of each file it writes.
    writes: how often it may open a file to write, or make, rename or remove.
    processes: and threads; of all its user's, where it has no user namespace.
  """

  seconds: float = 15.0
  cpu_seconds: int = 3
  memory: int = 1 << 30
  file_size: int = 1 << 20
  writes: int = 100
  processes: int = 16

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      check(value > 0, f"limits.{field.name}", value, "more than 0")


def run(program: str, limits: Limits) -> str:
  """Runs a Python program and returns the error that it ended with.

  Several threads may run programs at the same time.

  Args:
    program: the source, tests included; an error, `sys.exit` or a limit before
      its last line is a failure. It is not run as `__main__`.
    limits: the most it may take.

  Returns:
    What went wrong, in one line; "" if it came to its end.

  Raises:
    InputError: this system has no such limits (Windows).
    RuntimeError: the process did not start, which says nothing of the program.

  Example:
    >>> run("assert 1 + 1 == 2", Limits())
    ''
    >>> run("import os; os.remove('/etc/hosts')", Limits())
    "PermissionError: os.remove of '/etc/hosts' is not allowed"
  """
  if os.name != "posix":
    raise InputError("run_code: programs can be run on Linux and macOS alone")
  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    # Files, not pipes: what a program can write into them is limited.
    tempfile.TemporaryFile("w+") as given,
    tempfile.TemporaryFile() as report,
  ):
    json.dump(_given(program, limits), given)
    given.seek(0)
    child = subprocess.Popen(
      [sys.executable, "-I", "-B", _CHILD],
      stdin=given, stdout=report, stderr=report,
      cwd=folder, env={}, start_new_session=True,
    )  # fmt: skip
    try:
      status = child.wait(limits.seconds)
    except subprocess.TimeoutExpired:
      status = None
    finally:
      if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    report.seek(0)
    said = report.read(1 << 16).decode(errors="replace")
  before, started, after = said.partition(STARTED)
  if not started:
    why = f"status {status}" if status is not None else "too late"
    last = before.strip().splitlines()[-1:] or ["it said nothing"]
    raise RuntimeError(f"sandbox: Python did not start ({why}): {last[0]}")
  return _error(status, after, limits)


def _given(program: str, limits: Limits) -> dict[str, object]:
  return {
    "program": program,
    "writes": limits.writes,
    "limits": {
      "RLIMIT_AS": limits.memory,
      "RLIMIT_CORE": 0,
      "RLIMIT_CPU": limits.cpu_seconds,
      "RLIMIT_FSIZE": limits.file_size,
      "RLIMIT_NPROC": limits.processes,
    },
  }


def _error(status: int | None, said: str, limits: Limits) -> str:
  if status is None:
    return f"took more than {limits.seconds:g} s"
  if status < 0:
    return f"ended by {signal.Signals(-status).name}"
  try:
    return str(json.loads(said))
  except ValueError:
    return f"ended before its last line (status {status})"
