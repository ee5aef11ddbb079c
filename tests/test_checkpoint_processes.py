"""Checkpoints of several processes: what one meets, all of them say."""

import errno
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import cut, saved
from tiny import one_device

from tokenlora_jax.config import InputError
from tokenlora_jax.training import checkpoint
from tokenlora_jax.training.checkpoint import Checkpoints

IO = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("met_by", [0, 1])
@pytest.mark.parametrize(
  ("error", "raised"),
  [
    (IO, r"^InputError: .*/3: cannot be read now \(.*Input/output error\); it"),
    ("2 arrays, not 3", r"^2 arrays, not 3$"),
    (KeyError("bug"), r"^(KeyError|RuntimeError: process \d failed): 'bug'$"),
  ],
)
def test_what_one_process_meets_all_say(
  error, raised, met_by, tmp_path, monkeypatch
):
  """Two processes, one after the other; each hears what the other gathers."""
  checkpoints = Checkpoints(tmp_path, keep=3)
  gathered = {}

  def gather(process, mine):
    gathered[process] = mine
    both = [gathered.get(i, mine) for i in range(2)]
    return [np.stack(parts) for parts in zip(*both, strict=True)]

  def part(process):
    monkeypatch.setattr(
      checkpoint.multihost_utils,
      "process_allgather",
      functools.partial(gather, process),
    )
    try:
      with checkpoint._agreed() as found, checkpoints._reading(3):
        if process == met_by:
          if isinstance(error, Exception):
            raise error
          found.damage = error
    except Exception as met:
      return f"{type(met).__name__}: {met}"
    return found.damage

  part(1 - met_by)  # What it gathers is there when the other asks.
  said = [part(met_by), part(1 - met_by)]
  for line in said:
    assert re.search(raised, line)
  assert len(set(said)) == (2 if isinstance(error, KeyError) else 1)


def test_damaged_ones_that_cannot_be_moved_stay_and_are_one_line(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
  state = {"q": {"a": jnp.ones((1, 2, 16, 64))}}
  for step in (1, 2):
    checkpoints.save(step, state, {})
  checkpoints.newest()
  cut(tmp_path / "checkpoints/2")
  (tmp_path / "damaged").write_text("in the way")
  with pytest.raises(
    InputError, match=r"/damaged: cannot be written to \(File exists\); make"
  ):
    checkpoints.restore(state, one_device())
  checkpoints.close()
  assert saved(tmp_path) == [1, 2]
