"""What train.py and infer.py refuse in one line: too little memory."""

import jax
import pytest

import infer
from tokenlora_jax.commands import generate, training, wiring
from tokenlora_jax.config import InputError
import train

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."


def run(program, *argv):
  program.main([*argv, "--config", "tiny", "--compilation-cache", ""])


@pytest.mark.parametrize(
  "error", [jax.errors.JaxRuntimeError(f"{EXHAUSTED}\nmore"), MemoryError("x")]
)
@pytest.mark.parametrize(
  ("program", "argv", "fails", "flag"),
  [
    (train, (), (training, "set_up"), "--data.rows"),
    (train, ("--fit-router", "x-lora"), (training, "get_fit"), "--data.rows"),
    (infer, (), (generate, "load"), "--decode.batch"),
    (infer, ("evaluate",), (wiring, "load"), "--base.quantize int8"),
  ],
)
def test_too_little_memory_is_a_line_with_the_flags(
  program, argv, fails, flag, error, monkeypatch
):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(*fails, fail)
  if program is infer and not argv:
    argv = ("--prompt", "hi")
  with pytest.raises(InputError, match=r"^too little memory \(") as refused:
    run(program, *argv)
  assert flag in str(refused.value)
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")])
def test_other_errors_stay_what_they_are(error, monkeypatch):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(training, "set_up", fail)
  with pytest.raises(type(error), match=r"^a bug$"):
    run(train)
