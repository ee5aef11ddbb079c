"""Out of memory as one line that names the flags to change."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib

from tokenlora_jax.config import InputError, first_line

# How XLA begins to say that a device, or the host, has no memory left.
_EXHAUSTED = "RESOURCE_EXHAUSTED"


@contextlib.contextmanager
def needing_memory(remedy: str) -> Iterator[None]:
  """Turns running out of memory into a one-line `InputError`.

  Args:
    remedy: what to do, by flags.

  Raises:
    InputError: host or device has too little memory.

  Example:
    >>> with needing_memory("choose a smaller --decode.batch"):
    ...   raise RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate 9 bytes")
    Traceback (most recent call last):
    tokenlora_jax.config.errors.InputError: too little memory (RESOURCE_EXHAUSTED: Failed to allocate 9 bytes); choose a smaller --decode.batch
  """
  try:
    yield
  # XLA's errors are RuntimeErrors, or ValueErrors while a program is compiled.
  except (MemoryError, RuntimeError, ValueError) as error:
    if not isinstance(error, MemoryError) and _EXHAUSTED not in str(error):
      raise
    if isinstance(error, InputError):
      raise
    raise InputError(
      f"too little memory ({first_line(error)}); {remedy}"
    ) from error
