"""Stopping a run, going on with it, and whose folder is whose."""

import dataclasses
import io
import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny import (
  assert_identical,
  first_batches,
  make_base,
  make_batches,
  make_config,
  make_step,
  one_device,
  random_state,
  run_steps,
  train,
)

from tokenlora_jax import checkpoint
from tokenlora_jax.checkpoint import Checkpoints, claim_workdir
from tokenlora_jax.config import (
  InputError,
  MeshConfig,
  OptimConfig,
  RouterConfig,
)

# Dropout shows that the random numbers go on where they stood, too.
CONFIG = make_config(
  ("squad",), dropout=0.1, steps=12, save_every=3, eval_every=6, keep=2
)


def lines(workdir, *names) -> list:
  """These values of each line of metrics.jsonl that has them."""
  text = (workdir / "metrics.jsonl").read_text()
  values = [json.loads(line) for line in text.splitlines()]
  return [[v[n] for n in names] for v in values if names[-1] in v]


def saved(workdir) -> list[int]:
  """The steps of the checkpoints on disk."""
  names = [path.name for path in (workdir / "checkpoints").iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


class Stops:
  """The run's batches, with something that happens at one of them."""

  def __init__(self, stop_at, happens):
    self._batches = make_batches(CONFIG)
    self._stop_at, self._happens = stop_at, happens

  def __iter__(self):
    self._data = iter(self._batches)
    self._count = 0
    return self

  def __next__(self):
    self._count += 1
    batch = next(self._data)
    return self._happens(batch) if self._count == self._stop_at else batch

  def get_state(self):
    return self._data.get_state()

  def set_state(self, state):
    self._data.set_state(state)


def interrupt(batch):
  raise KeyboardInterrupt


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of 12 steps that nothing stops: (folder, last state)."""
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, train(CONFIG, workdir)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A run that Ctrl-C stopped while it took the batch of step 8."""
  workdir = tmp_path_factory.mktemp("stopped")
  out = io.StringIO()
  with pytest.raises(KeyboardInterrupt) as stop:
    train(
      CONFIG,
      workdir,
      Stops(8, interrupt),
      console=Console(file=out, force_terminal=True, width=100),
    )
  return workdir, str(stop.value), out.getvalue()


@pytest.fixture
def workdir(stopped, tmp_path):
  """A copy of the stopped run's folder."""
  return shutil.copytree(stopped[0], tmp_path / "run")


# -----------------------------------------------------------------------------
# Going on.


def test_ctrl_c_says_where_the_run_goes_on_and_closes_the_bar(stopped):
  workdir, message, shown = stopped
  assert message == "stopped; the same command goes on from step 6"
  assert saved(workdir) == [3, 6]
  assert [step for step, _ in lines(workdir, "step", "mfu")] == [*range(1, 8)]
  assert "7/12" in shown
  # The cursor, which a live bar hides, is back.
  assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_ctrl_c_before_any_checkpoint_starts_again(tmp_path):
  with pytest.raises(KeyboardInterrupt, match=r"goes on from step 0$"):
    train(CONFIG, tmp_path, Stops(1, interrupt))


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(straight, workdir):
  out = io.StringIO()
  state = train(CONFIG, workdir, console=Console(file=out))
  assert out.getvalue().startswith("going on from step 6 of 12\n")
  assert_identical(state, straight[1])
  names = "step", "rows", "loss/squad", "gradient_norm/squad"
  want = lines(straight[0], *names)
  assert [step for step, *_ in want] == list(range(1, 13))
  # Step 7 was done before the stop and is done again, on the same rows.
  assert lines(workdir, *names) == want[:7] + want[6:]
  held_out = lines(workdir, "step", "held_out/squad")
  assert held_out == lines(straight[0], "step", "held_out/squad")
  assert [step for step, _ in held_out] == [6, 12]


def test_a_finished_run_does_nothing_and_still_has_its_state(
  straight, tmp_path
):
  workdir = shutil.copytree(straight[0], tmp_path / "run")
  log = (workdir / "metrics.jsonl").read_bytes()
  state = train(CONFIG, workdir, Stops(1, interrupt))
  assert_identical(state, straight[1])
  assert (workdir / "metrics.jsonl").read_bytes() == log
  assert saved(workdir) == [9, 12]


# Dies while the checkpoint of step 6 is being written in the background.
KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
import conftest
import test_checkpoint
from tokenlora_jax import checkpoint

save = checkpoint.Checkpoints.save
def dies(self, step, *args):
  save(self, step, *args)
  if step == 6:
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = dies
test_checkpoint.train(test_checkpoint.CONFIG, Path(sys.argv[1]))
"""


def test_a_killed_run_leaves_whole_checkpoints(straight, tmp_path):
  died = subprocess.run(
    [sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True
  )
  assert died.returncode == -signal.SIGKILL, died.stderr
  assert 3 in saved(tmp_path)
  assert len(lines(tmp_path, "step", "mfu")) == 6
  assert_identical(train(CONFIG, tmp_path), straight[1])
  left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert sorted(left) == ["12", "9"], "nothing half written stays"


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_no_number_stops_the_run_before_it_is_saved(name, workdir, monkeypatch):
  real = make_step(CONFIG, one_device())

  def step(state, base, batch):
    state, metrics = real(state, base, batch)
    if state.step == 9:  # The next checkpoint's.
      metrics = metrics | {name: jnp.array([jnp.inf])}
    return state, metrics

  monkeypatch.setattr("tiny.make_step", lambda *args: step)
  newest = workdir / "checkpoints/6"
  before = {p: p.stat().st_mtime_ns for p in newest.rglob("*")}
  with pytest.raises(FloatingPointError) as error:
    train(CONFIG, workdir)
  data = iter(make_batches(CONFIG))
  rows = [next(data)["rows"] for _ in range(9)][-1][0].tolist()
  assert str(error.value) == (
    f"step 9: the {name.replace('_', ' ')} of squad is inf on rows {rows}"
  )
  assert saved(workdir) == [3, 6]
  assert {p: p.stat().st_mtime_ns for p in newest.rglob("*")} == before


# -----------------------------------------------------------------------------
# Checkpoints.


@pytest.mark.parametrize(
  ("save_every", "keep", "want"),
  [(5, 3, [5, 10, 12]), (4, 2, [8, 12]), (50, 2, [12])],
)
def test_which_steps_are_saved_and_kept(tmp_path, save_every, keep, want):
  config = dataclasses.replace(
    CONFIG, save_every=save_every, keep=keep, eval_every=0
  )
  train(config, tmp_path)
  assert saved(tmp_path) == want
  assert [s for s, _ in lines(tmp_path, "step", "held_out/squad")] == [12]


def test_what_is_saved_is_what_the_state_was_at_the_call(tmp_path):
  mesh = one_device()
  batches = first_batches(CONFIG, 4)
  state, *_ = run_steps(CONFIG, make_base(), mesh, batches[:1])
  want = jax.tree.map(np.array, state)
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, state, {"next": 5})
  # The next steps are given the state's memory while it is written.
  like, *_ = run_steps(CONFIG, make_base(), mesh, batches[1:], state)
  checkpoints.close()
  again = Checkpoints(tmp_path, keep=1)
  restored, data_state = again.restore(like, mesh)
  again.close()
  assert_identical(restored, want)
  assert data_state == {"next": 5}


def test_an_empty_folder_has_no_checkpoint(tmp_path):
  checkpoints = Checkpoints(tmp_path / "new", keep=1)
  assert checkpoints.newest() is None
  state = random_state(CONFIG, make_base(), one_device())
  assert checkpoints.restore(state, one_device()) is None
  checkpoints.close()


# -----------------------------------------------------------------------------
# The folder.


def in_folder(folder, **changes):
  return dataclasses.replace(CONFIG, workdir=str(folder), **changes)


def test_a_new_folder_gets_the_config(tmp_path):
  config = in_folder(tmp_path / "runs/new")
  workdir = claim_workdir(config)
  assert workdir == tmp_path / "runs/new"
  assert json.loads((workdir / "config.json").read_text()) == config.to_json()
  assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_another_run_is_refused_by_its_first_difference(tmp_path):
  claim_workdir(in_folder(tmp_path))
  before = (tmp_path / "config.json").read_bytes()
  other = in_folder(tmp_path, optim=OptimConfig(12, 2e-3, 2), seed=1)
  with pytest.raises(InputError) as error:
    claim_workdir(other)
  assert str(error.value) == (
    f"--workdir {tmp_path}: holds a run with optim.learning_rate 0.01 (now"
    " 0.002); choose another --workdir, or go back to its settings to go on"
    " with it"
  )
  assert (tmp_path / "config.json").read_bytes() == before


def test_the_same_run_goes_on_where_its_result_stays_the_same(tmp_path):
  claim_workdir(in_folder(tmp_path))
  claim_workdir(in_folder(tmp_path))
  changes = {"save_every": 1, "eval_every": 0, "keep": 9, "remat": "full"}
  changes |= {"mesh": MeshConfig(data=2), "router": RouterConfig("uniform")}
  config = in_folder(tmp_path, **changes)
  claim_workdir(config)
  assert json.loads((tmp_path / "config.json").read_text()) == config.to_json()


def test_no_resume_refuses_a_folder_that_holds_the_run(tmp_path):
  config = in_folder(tmp_path, resume=False)
  claim_workdir(config)
  with pytest.raises(
    InputError, match=r"holds this run already;.* --no-resume"
  ):
    claim_workdir(config)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(InputError, match=r"config\.json: not a run's config"):
    claim_workdir(in_folder(tmp_path))


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(InputError, match=r"holds checkpoints, but no config"):
    claim_workdir(in_folder(tmp_path))
  assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(InputError, match=rf"{name}: cannot be written to \("):
    claim_workdir(in_folder(tmp_path / name))
  assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
  file = tmp_path / "config.json"
  checkpoint.write_atomically(file, "old")

  def fails(self, target):
    raise OSError("no space left")

  monkeypatch.setattr(Path, "replace", fails)
  with pytest.raises(OSError, match="no space left"):
    checkpoint.write_atomically(file, "new")
  assert file.read_text() == "old"
  assert list(tmp_path.iterdir()) == [file]
