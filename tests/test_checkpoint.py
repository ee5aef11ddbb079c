"""Stopping a run, going on with it, and damaged checkpoints."""

import dataclasses
import errno
import io
import json
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
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
  normal,
  one_device,
  random_state,
  run_steps,
  train,
)

from tokenlora_jax.config import InputError, MeshConfig
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training.checkpoint import Checkpoints, checksum

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
  assert message == "stopped; the same command resumes from step 6"
  assert saved(workdir) == [3, 6]
  assert [step for step, _ in lines(workdir, "step", "mfu")] == [*range(1, 8)]
  assert "7/12" in shown
  # The cursor, which a live bar hides, is back.
  assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_ctrl_c_before_any_checkpoint_starts_again(tmp_path):
  with pytest.raises(KeyboardInterrupt, match=r"resumes from step 0$"):
    train(CONFIG, tmp_path, Stops(1, interrupt))


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(straight, workdir):
  out = io.StringIO()
  state = train(CONFIG, workdir, console=Console(file=out))
  assert out.getvalue().startswith("resuming from step 6 of 12\n")
  assert_identical(state, straight[1])
  names = "step", "rows", "loss/squad", "gradient_norm/squad"
  want = lines(straight[0], *names)
  assert [step for step, *_ in want] == list(range(1, 13))
  # Step 7 was done before the stop and is done again, but is there once.
  assert lines(workdir, *names) == want
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
import test_checkpoint
from tokenlora_jax.training import checkpoint

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
def test_no_number_stops_the_run_before_it_is_saved(
  name, straight, workdir, monkeypatch
):
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
  # What made it may be gone, as a broken device is.
  monkeypatch.setattr("tiny.make_step", make_step)
  assert_identical(train(CONFIG, workdir), straight[1])


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
  checkpoints.save(1, state, {"data": {"next": 5}})
  # The next steps are given the state's memory while it is written.
  like, *_ = run_steps(CONFIG, make_base(), mesh, batches[1:], state)
  checkpoints.close()
  again = Checkpoints(tmp_path, keep=1)
  restored, about = again.restore(like, mesh)
  again.close()
  assert_identical(restored, want)
  assert about == {"data": {"next": 5}}


def test_an_empty_folder_has_no_checkpoint(tmp_path):
  checkpoints = Checkpoints(tmp_path / "new", keep=1)
  assert checkpoints.newest() is None
  state = random_state(CONFIG, make_base(), one_device())
  assert checkpoints.restore(state, one_device()) is None
  checkpoints.close()


def test_a_checkpoint_says_of_which_run_it_is(straight):
  about = straight[0] / "checkpoints/12/about/metadata"
  assert json.loads(about.read_text())["config"] == CONFIG.to_json()


def test_a_checksum_is_the_same_on_any_mesh_and_changes_with_any_bit():
  split = NamedSharding(make_mesh(MeshConfig(fsdp=8)), P("fsdp"))
  x, step = normal(16, 3), np.int32(7)
  about = {"data": {"next": 5}}
  want = checksum({"x": jnp.array(x), "step": step}, about)
  assert checksum({"x": jax.device_put(x, split), "step": step}, about) == want
  bits = x.view(np.uint32).copy()
  for bit in range(32):
    bits[bit % 16, bit % 3] ^= 1 << bit
    other = {"x": jnp.array(bits.view(np.float32)), "step": step}
    assert checksum(other, about) != want
    bits[bit % 16, bit % 3] ^= 1 << bit
  assert checksum({"x": jnp.array(x), "step": step + 1}, about) != want
  assert checksum({"x": x, "step": step}, {"data": {"next": 6}}) != want


# -----------------------------------------------------------------------------
# Damage.


def cut(folder):
  """The files of the arrays end in their middle."""
  for file in (folder / "state").glob("**/d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  return "is not valid for value of size"


def arrays(folder) -> Path:
  """The file of the numbers themselves, by far the largest."""
  files = (folder / "state").glob("**/d/*")
  return max(files, key=lambda path: path.stat().st_size)


def lose_a_file(folder):
  arrays(folder).unlink()
  return "Error reading"


def lose_the_arrays(folder):
  shutil.rmtree(folder / "state")
  return "0 arrays, not"


def lose_the_rest(folder):
  shutil.rmtree(folder / "about")
  return "about"


def flip_a_bit(folder):
  """As a failing disk or cable does: nothing but the numbers shows it."""
  file = arrays(folder)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  return "does not hold the numbers that were saved"


def other_place_in_the_data(folder):
  file = folder / "about/metadata"
  about = json.loads(file.read_text())
  about["data"]["next"] = 4
  file.write_text(json.dumps(about))
  return "does not hold the numbers that were saved"


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()
  return "0 arrays, not"


DAMAGES = [
  cut, lose_a_file, lose_the_arrays, lose_the_rest, flip_a_bit,
  other_place_in_the_data, empty,
]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory):
  """A folder with the checkpoints 1, 2 and 3, and a state like theirs."""
  folder = tmp_path_factory.mktemp("three") / "checkpoints"
  checkpoints = Checkpoints(folder, keep=3)
  for step in (1, 2, 3):
    a = jnp.array(normal(1, 2, 16, 64, seed=step))
    state = {"q": {"a": a}, "step": jnp.int32(step)}
    checkpoints.save(step, state, {"data": {"next": step}})
  checkpoints.close()
  return folder, state


def warnings(caplog) -> list[str]:
  """Ours; Orbax's are silenced by the programs."""
  names = ("tokenlora_jax.training.checkpoint",)
  return [r.getMessage() for r in caplog.records if r.name in names]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_gone_on_from(
  damage, three, tmp_path, caplog
):
  folder, state = three
  folder = shutil.copytree(folder, tmp_path / "checkpoints")
  why = damage(folder / "3")
  checkpoints = Checkpoints(folder, keep=3)
  restored, about = checkpoints.restore(state, one_device())
  assert (restored["step"], about["data"]) == (2, {"next": 2})
  [line] = warnings(caplog)
  assert "\n" not in line
  assert line.startswith(f"{folder / '3'}: damaged (")
  assert line.endswith(
    f"moved to {tmp_path / 'damaged/3'}, resuming from step 2"
  )
  assert re.search(why, line)
  # It is not in the way of its step, and is there to be looked at.
  checkpoints.save(3, state, {})
  checkpoints.close()
  assert saved(tmp_path) == [1, 2, 3]
  assert (tmp_path / "damaged/3").is_dir()
  checkpoints = Checkpoints(folder, keep=3)
  assert checkpoints.restore(state, one_device())[0]["step"] == 3
  checkpoints.close()


@pytest.mark.parametrize("name", ["_sums", "_why_unreadable"])
def test_what_passes_damages_no_checkpoint(name, three, monkeypatch):
  folder, state = three
  io = OSError(errno.EIO, "Input/output error")
  for error in MemoryError(), io, ValueError("UNAVAILABLE: x"):
    fails = Mock(side_effect=error)
    monkeypatch.setattr(f"tokenlora_jax.training.checkpoint.{name}", fails)
    with pytest.raises(InputError, match=r"/3: cannot be read now .*it stays"):
      Checkpoints(folder, keep=3).restore(state, one_device())
    assert saved(folder.parent) == [1, 2, 3]


def test_two_damaged_ones_make_room_and_a_third_in_their_place_too(
  three, tmp_path, caplog
):
  folder, state = three
  folder = shutil.copytree(folder, tmp_path / "checkpoints")
  (tmp_path / "damaged/3").mkdir(parents=True)
  cut(folder / "3")
  empty(folder / "2")
  checkpoints = Checkpoints(folder, keep=3)
  restored, _ = checkpoints.restore(state, one_device())
  checkpoints.close()
  assert restored["step"] == 1
  assert len(warnings(caplog)) == 2
  assert saved(tmp_path) == [1]
  aside = sorted(path.name for path in (tmp_path / "damaged").iterdir())
  assert aside == ["2", "3", "3.1"]


def test_a_run_is_never_started_over_from_damaged_checkpoints(workdir):
  for step in (3, 6):
    cut(workdir / f"checkpoints/{step}")
  log = (workdir / "metrics.jsonl").read_bytes()
  with pytest.raises(InputError) as error:
    train(CONFIG, workdir)
  message = str(error.value)
  assert "\n" not in message
  assert message.startswith(
    f"{workdir / 'checkpoints'}: none of its checkpoints is whole (6: "
  )
  assert "; 3: " in message
  assert message.endswith("remove this folder to start from step 0")
  assert saved(workdir) == [3, 6]
  assert not (workdir / "damaged").exists()
  assert (workdir / "metrics.jsonl").read_bytes() == log


def test_a_run_whose_newest_checkpoint_is_cut_still_ends_the_same(
  straight, workdir
):
  cut(workdir / "checkpoints/6")
  out = io.StringIO()
  state = train(CONFIG, workdir, console=Console(file=out))
  assert out.getvalue().startswith("resuming from step 3 of 12\n")
  assert_identical(state, straight[1])
  for names in (("step", "rows", "loss/squad"), ("step", "held_out/squad")):
    assert lines(workdir, *names) == lines(straight[0], *names)
