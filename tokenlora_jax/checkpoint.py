"""Checkpoints of a run: adapters, optimizer, step and data position, by Orbax.

Orbax writes in the background and renames a checkpoint into place only when it
is whole, so that a killed run leaves whole checkpoints or none.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from tokenlora_jax.config import Config, InputError, differences
from tokenlora_jax.sharding import described

# Settings that may change between two starts of one run.
MAY_CHANGE = (
  "workdir", "mesh", "router", "decode", "remat", "accumulate",
  "eval_every", "save_every", "keep", "resume",
)  # fmt: skip


class Checkpoints:
  """The checkpoints in a folder, the newest few kept.

  Args:
    folder: where they go; made if need be.
    keep: how many stay.
  """

  def __init__(self, folder: str | Path, keep: int):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(
      Path(folder).absolute(),
      options=options,
      item_names=("state", "data"),
    )

  def save(self, step: int, state: Any, data_state: Any) -> None:
    """Starts to write a checkpoint; waits only for one still being written.

    Args:
      step: optimizer steps done.
      state: a pytree of arrays.
      data_state: the data iterator's position, JSON.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
      ),
    )

  def newest(self) -> int | None:
    """Returns the newest checkpoint's step once it is whole, or None."""
    self._manager.wait_until_finished()
    return self._manager.latest_step()

  def restore(self, like: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns (state, data_state) of the newest checkpoint, or None.

    Args:
      like: a pytree of arrays or shapes as the state's.
      mesh: where the state goes, which need not be the mesh it was saved from.
    """
    step = self.newest()
    if step is None:
      return None
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(described(like, mesh)), data=ocp.args.JsonRestore()
      ),
    )
    return restored.state, restored.data

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()


def claim_workdir(config: Config) -> Path:
  """Makes the run's folder, or checks that it holds this very run.

  Returns:
    The folder, with the resolved config in `config.json`.

  Raises:
    InputError: it holds a run of another config, or `resume` is off and it
      holds any, or it cannot be written to.
  """
  workdir = Path(config.workdir)
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
  # No process may write before all have looked.
  multihost_utils.sync_global_devices("claim_workdir")
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      write_atomically(file, json.dumps(config.to_json(), indent=2) + "\n")
    except OSError as error:
      raise InputError(
        f"--workdir {workdir}: cannot be written to ({error.strerror})"
      ) from None
  return workdir


def write_atomically(path: Path, text: str) -> None:
  """Writes a text file so that it is there whole or not at all."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    temporary.write_text(text)
    temporary.replace(path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      temporary.unlink()
