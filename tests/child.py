"""What a child process of a test is started with."""

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[1]


def devices(count: int) -> dict[str, str]:
  """Returns the tests' environment, but with so many devices.

  The flags that make compiling fast stay (see conftest.py), and of a flag that
  is given twice XLA takes the last.
  """
  flag = f"--xla_force_host_platform_device_count={count}"
  return os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}


def python(code, *argv, cwd=None, **environment):
  """Runs code in a process that JAX was not imported in yet."""
  return subprocess.run(
    [sys.executable, "-c", code, *argv],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
  )
