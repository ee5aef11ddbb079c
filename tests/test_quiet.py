"""Libraries are not heard, and Ctrl-C always is."""

from child import python
import pytest


def test_ctrl_c_is_not_lost_where_python_cannot_raise_it(tmp_path):
  # As in JAX's callback of the garbage collector.
  code = """
import time
from tokenlora_jax.commands import cli

class Interrupted:
  def __del__(self):
    raise KeyboardInterrupt

def main(argv):
  Interrupted()
  end = time.monotonic() + 20
  while time.monotonic() < end:
    time.sleep(0.01)

cli.run(main)
"""
  done = python(code, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_a_library_without_torch_is_not_heard(tmp_path):
  # The tests have torch; a person need not.
  code = """
import importlib.util
from tokenlora_jax.commands import cli

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *at: (
  None if name == "torch" else find(name, *at)
)

def main(argv):
  import transformers
  print(transformers.utils.is_torch_available())

cli.run(main)
"""
  done = python(code, cwd=tmp_path)
  assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_plugin_without_its_accelerator_is_not_heard(tmp_path):
  # libtpu, which a test needs, prints where there is no TPU.
  code = """
import sys
from tokenlora_jax.commands import cli

def main(argv):
  import jax
  print(jax.devices()[0].platform)

cli.run(main)
"""
  done = python(code, cwd=tmp_path, JAX_PLATFORMS="")
  assert done.stderr == ""
  assert done.stdout.strip() in ("cpu", "gpu", "tpu")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character_ends_no_program(encoding, tmp_path):
  code = """
from tokenlora_jax.commands import cli

def main(argv):
  print("\\u25a0 gsm8k")

cli.run(main)
"""
  done = python(code, cwd=tmp_path, PYTHONIOENCODING=encoding)
  assert (done.returncode, done.stderr) == (0, "")
  square = "\u25a0" if encoding == "utf-8" else "?"
  assert done.stdout == f"{square} gsm8k\n"
