"""What a child process of a test is started with."""

import os


def devices(count: int) -> dict[str, str]:
  """Returns the tests' environment, but with so many devices.

  The flags that make compiling fast stay (see conftest.py), and of a flag that
  is given twice XLA takes the last.
  """
  flag = f"--xla_force_host_platform_device_count={count}"
  return os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
