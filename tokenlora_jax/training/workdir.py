"""Locks a run folder and checks that it holds this run.

Files of a run folder:
  config.json   the resolved settings
  run.json      {"the base": digest, "the train rows of TASK": digest, ...}
  checkpoints/  of Orbax; metrics.jsonl, tensorboard/ and bank/ beside it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils
import numpy as np

from tokenlora_jax.config import Config, InputError, differences
from tokenlora_jax.data.rows import Row
from tokenlora_jax.files import locked, write_atomically, writing

# Settings that may change between two starts of one run.
MAY_CHANGE = (
  "workdir", "mesh", "router", "decode", "remat", "accumulate",
  "eval_every", "save_every", "keep", "resume",
  "compilation_cache",
)  # fmt: skip

# Paths, which may change too where run.json has digests of their contents.
PLACES = ("base.path", "data.dir")


def contents(
  base: str, **splits: Mapping[str, Sequence[Row]]
) -> dict[str, str]:
  """Returns digests of a run's base and rows, which do not depend on paths.

  Args:
    base: the base's fingerprint.
    **splits: by split the rows of each task. Their order, prompts and answers
      count, not their files.

  Returns:
    {name: digest}, as written to run.json.

  Example:
    >>> row = Row("1 + 1 =", " 2", "here:1")
    >>> sorted(contents("f", train={"sums": [row]}))
    ['the base', 'the train rows of sums']
  """
  digests = {"the base": base}
  for split, tasks in splits.items():
    for task, rows in tasks.items():
      text = json.dumps([[row.prompt, row.answer] for row in rows])
      digest = hashlib.sha256(text.encode()).hexdigest()
      digests[f"the {split} rows of {task}"] = digest
  return digests


@contextlib.contextmanager
def claim_workdir(
  config: Config, made_of: Mapping[str, str] | None = None
) -> Iterator[Path]:
  """Locks the run's folder, which must be new or hold this very run.

  The lock ends with the process. Only process 0 checks and writes; either all
  processes start or none.

  Args:
    config: of the run.
    made_of: its `contents`. With them, a resumed run may find its base and rows
      under other paths.

  Yields:
    The folder, with the resolved config in `config.json` and `made_of` in
    `run.json`.

  Raises:
    InputError: another process trains in it; it holds a run of another config
      or other contents; it holds a run and `resume` is off; or it cannot be
      written to, now or while it is locked.
  """
  workdir = Path(config.workdir)
  with contextlib.ExitStack() as stack:
    refusal = None
    if jax.process_index() == 0:
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(workdir, "--workdir", "train"))
        _check(workdir, config, made_of)
        text = json.dumps(config.to_json(), indent=2) + "\n"
        write_atomically(workdir / "config.json", text)
        if made_of is not None:
          text = json.dumps(made_of, indent=2) + "\n"
          write_atomically(workdir / "run.json", text)
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


def _check(
  workdir: Path, config: Config, made_of: Mapping[str, str] | None
) -> None:
  """Raises `InputError` unless the folder is new or holds this run."""
  file = workdir / "config.json"
  if file.exists():
    try:
      old = json.loads(file.read_text())
      changed = differences(old, config.to_json(), MAY_CHANGE)
    except (ValueError, AttributeError) as error:
      raise InputError(f"{file}: not a run's config ({error})") from None
    if made_of is not None and (workdir / "run.json").exists():
      # A run from before run.json existed must keep its paths.
      changed = [line for line in changed if line.split(" ")[0] not in PLACES]
    if changed:
      raise InputError(
        f"--workdir {workdir}: holds a run with {changed[0]}; choose another"
        " --workdir, or restore its settings to resume it"
      )
    if made_of is not None and (workdir / "run.json").exists():
      _check_contents(workdir, made_of)
    if not config.resume:
      raise InputError(
        f"--workdir {workdir}: holds this run already; choose another, or"
        " leave out --no-resume to resume it"
      )
  elif (workdir / "checkpoints").exists():
    raise InputError(
      f"--workdir {workdir}: holds checkpoints of an unknown run (no"
      " config.json); choose another --workdir"
    )


def _check_contents(workdir: Path, made_of: Mapping[str, str]) -> None:
  """Raises `InputError` unless run.json has these contents."""
  file = workdir / "run.json"
  try:
    old = json.loads(file.read_text())
    names = sorted(old.keys() | made_of.keys())
  except (ValueError, AttributeError) as error:
    raise InputError(f"{file}: not a run's contents ({error})") from None
  for name in names:
    if old.get(name) != made_of.get(name):
      raise InputError(
        f"--workdir {workdir}: holds a run started with another version of"
        f" {name}; choose another --workdir, or restore that version"
      )
