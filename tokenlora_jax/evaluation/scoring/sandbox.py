"""Runs programs that a model wrote, guarded against accidents.

  run("assert 1 + 1 == 3, 'a sum'", Limits())  # "AssertionError: a sum"

A program runs in its own process: `python -I` (no user packages, no current
folder on the path) with an empty environment, without input, its output
dropped, in a new empty folder that is removed afterwards.

- `Limits` bound time, CPU time, memory, the size of a file, and the number of
  processes and threads; the kernel enforces all but the first (`setrlimit`).
- An audit hook of Python (PEP 578), which a program cannot remove, refuses
  sockets, new processes, signals, native code by ctypes, and all writing,
  renaming and removing outside the folder. Inside it, the hook counts them.
- If the kernel allows it (Linux, as superuser or with user namespaces), the
  process has an empty network namespace.

This is no container. It does NOT protect from:

- A hostile program. The hook sees what Python does, but not native code in an
  installed package, nor a folder's descriptor as `dir_fd`. A program that looks
  for it can report its own success.
- Reading. The program may read any file that you may.
- Missing limits. macOS has no network namespaces and no limit of memory, and
  the superuser has no limit of processes; there the hook is the only guard.
- Noise. A busy machine can make a slow but correct program late. CPU time does
  not depend on that, so its limit is the narrower one.

Run programs of an untrusted model in a virtual machine, and not as superuser.
Chen et al., 2021, arXiv 2107.03374, section 2.3, introduced such scoring and
describe their guards.
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
  """Limits of one program.

  Attributes:
    seconds: wall time from start to end.
    cpu_seconds: CPU time, a whole number of seconds.
    memory: bytes of address space, Python's own included.
    file_size: bytes of each file it writes.
    writes: the most files it may open to write, create, rename or remove.
    processes: the most processes and threads; without a user namespace this
      counts all of the user's.
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
      its last line is a failure. It does not run as `__main__`.
    limits: the program's limits.

  Returns:
    The error in one line; "" if the program reached its end.

  Raises:
    InputError: this system has no such limits (Windows).
    RuntimeError: the process did not start, which is not the program's fault.

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
    # Files instead of pipes, since the size of files is limited.
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
