"""A run's folder: whose it is, and what happens when its disk fails."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils
import numpy as np

from tokenlora_jax.config import Config, InputError, differences
from tokenlora_jax.files import locked, write_atomically, writing

# Settings that may change between two starts of one run.
MAY_CHANGE = (
  "workdir", "mesh", "router", "decode", "remat", "accumulate",
  "eval_every", "save_every", "keep", "resume",
  "compilation_cache",
)  # fmt: skip


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
