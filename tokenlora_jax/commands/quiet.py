"""Silences libraries, and handles errors that Python cannot raise."""

from __future__ import annotations

import _thread
import inspect
import logging
import os
import sys
import threading
import traceback
from typing import Any
import warnings


def quiet() -> None:
  """Silences the libraries' messages; shows our own warnings in one line."""
  for name in ("jax", "huggingface_hub", "matplotlib"):
    logging.getLogger(name).setLevel(logging.ERROR)
  # It sets its own logger's level when it is imported, as this says.
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  # Orbax also raises the errors that it logs.
  for name in ("absl", "orbax", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  logging.basicConfig(
    format="%(levelname)s: %(message)s",
    stream=sys.stderr,
    force=True,  # A library may have configured logging during its import.
  )


def _unraisable(error: Any) -> None:
  """Handles errors that Python cannot raise where they occur.

  A Ctrl-C there, as in JAX's callback of the garbage collector, comes again a
  moment later; Python would only print it.

  What a failed save of Orbax leaves behind is ignored. Orbax writes arrays
  together and closes the event loop once one fails. Its threads then find the
  loop closed, and Python collects unawaited coroutines at any time, even at
  exit. Orbax gives its caller neither loop nor tasks.
  """
  if error.exc_type is KeyboardInterrupt:
    # Not at once: this function is such a place, too.
    again = threading.Timer(0.05, _thread.interrupt_main)
    again.daemon = True
    again.start()
    return
  last = [frame for frame, _ in traceback.walk_tb(error.exc_traceback)][-1:]
  for frame in last:
    where = frame.f_globals.get("__name__"), frame.f_code.co_name
    if where == ("asyncio.base_events", "_check_closed"):
      return
  module = str(getattr(error.object, "__module__", None) or "")
  if not (
    inspect.iscoroutine(error.object)
    or module.partition(".")[0] in ("asyncio", "orbax")
  ):
    sys.__unraisablehook__(error)
