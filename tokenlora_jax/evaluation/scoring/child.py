"""Runs one program under guards, in a process that `sandbox.py` starts.

This script imports only the standard library, and is run by its path. It reads
a JSON object from standard input: the program and its limits. It writes
`STARTED` to standard output once all guards are set, then how the program
ended. Importing it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import json
import os
import resource
import sys
import traceback
import types
from typing import Any

STARTED = "started\n"

# linux/sched.h
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000

# Names of Python's audit events that are always refused; a name that ends with
# a full stop stands for all that begin with it.
_REFUSED = (
  "ctypes.", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg",
  "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "resource.",
  "socket.", "subprocess.Popen", "syslog.",
)  # fmt: skip
# Events that are allowed in the program's own folder; all writing causes one.
_WRITES = (
  "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename",
  "os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime",
  "shutil.rmtree", "sqlite3.connect",
)  # fmt: skip
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> bool:
  """Moves this process into an empty network namespace.

  Linux allows it to the superuser, and to others if user namespaces are on.

  Returns:
    Whether the kernel did.
  """
  unshare = getattr(ctypes.CDLL(None), "unshare", lambda flags: -1)
  return not (unshare(_NEW_NETWORK) and unshare(_NEW_USER | _NEW_NETWORK))


def limit(kind: int, most: int) -> None:
  """Lowers a resource limit of this process, if the system can.

  Args:
    kind: a RLIMIT_ constant of `resource`.
    most: the limit, in its own unit; a lower existing limit stays.
  """
  _, hard = resource.getrlimit(kind)
  if hard == resource.RLIM_INFINITY or hard > most:
    # macOS defines a limit of memory but refuses to set it.
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(kind, (most, most))


def guard(folder: str, writes: int) -> Callable[[str, tuple[Any, ...]], None]:
  """Returns an audit hook (PEP 578) that refuses forbidden events.

  Args:
    folder: a real path; the program may write only inside it.
    writes: the most writes, renames, creations and removals.
  """
  inside, real, left = os.path.join(folder, ""), os.path.realpath, writes

  def hook(event: str, args: tuple[Any, ...]) -> None:
    nonlocal left
    if event == "open":
      path, _, flags = args
      if isinstance(path, int) or not flags & _OPEN_TO_WRITE:
        return
      paths = (path,)
    elif event in _WRITES:
      paths = [a for a in args if isinstance(a, str | bytes | os.PathLike)]
    elif event in _REFUSED or f"{event.partition('.')[0]}." in _REFUSED:
      # asyncio wakes its loop through a pair of sockets without a name.
      if event == "socket.__new__" and args[1] == 1:
        return
      raise PermissionError(f"{event} is not allowed")
    else:
      return
    for path in map(os.fsdecode, paths):
      if path != os.devnull and not real(path).startswith(inside):
        raise PermissionError(f"{event} of {path!r} is not allowed")
    left -= 1
    if left < 0:
      raise PermissionError(f"more than {writes} writes are not allowed")

  return hook


def run(program: str) -> str:
  """Runs a program as a module and returns the error it ended with, or "".

  The module is not `__main__`, so the program's script part does not run.

  Args:
    program: the source.

  Example:
    >>> run("assert 1 + 1 == 3, 'a sum'")
    'AssertionError: a sum'
    >>> run("x = 1 + 1")
    ''
  """
  module = types.ModuleType("program")
  sys.modules["program"] = module  # dataclasses look their module up
  try:
    # Not under this file's __future__.
    source = compile(program, "program", "exec", dont_inherit=True)
    exec(source, module.__dict__)
  except BaseException as error:  # SystemExit too: the tests were not reached
    lines = traceback.format_exception_only(error)
    return lines[-1].strip()[:200] or "an error without a name"
  finally:
    sys.modules.pop("program", None)
  return ""


def main() -> None:
  """Reads the program, sets the guards, runs it, reports, and ends."""
  given = json.load(sys.stdin)
  report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
  leave_network()
  # A library that starts one thread per core would need memory for each.
  os.environ["OPENBLAS_NUM_THREADS"] = "1"
  for name, most in given["limits"].items():
    limit(getattr(resource, name), most)
  sys.addaudithook(guard(os.path.realpath(os.curdir), given["writes"]))
  os.write(report, STARTED.encode())
  for stream in (0, 1, 2):
    os.dup2(nothing, stream)
  # Kept now, since the program may replace them.
  end, write, dumps = os._exit, os.write, json.dumps
  write(report, dumps(run(given["program"])).encode())
  end(0)  # at once: neither threads nor exit handlers go on


if __name__ == "__main__":
  main()
