"""Nothing is lost when a run is stopped, killed, or its disk fails."""

import io
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from child import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_checkpoint import CONFIG, Stops, lines, saved
from tiny import assert_identical, make_step, one_device, train

from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError, MeshConfig
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training.workdir import claim_workdir
import train as program

ROOT = Path(__file__).parents[1]
LOGGED = (
  ("step", "rows", "loss/squad", "gradient_norm/squad"),
  ("step", "held_out/squad"),
)
STEPS = list(range(1, 13))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of 12 steps that nothing stops: (folder, last state)."""
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, train(CONFIG, workdir)


def assert_same_log(workdir, straight):
  """Each step is there once, and is what it was."""
  for names in LOGGED:
    assert lines(workdir, *names) == lines(straight, *names)
  assert [step for step, *_ in lines(workdir, *LOGGED[0])] == STEPS


# -----------------------------------------------------------------------------
# SIGTERM.


def terminate(batch):
  os.kill(os.getpid(), signal.SIGTERM)
  return batch


@pytest.mark.parametrize(("step", "kept"), [(1, [1]), (6, [3, 6]), (8, [6, 8])])
def test_sigterm_saves_the_step_it_came_in(step, kept, straight, tmp_path):
  out = io.StringIO()
  before = signal.getsignal(signal.SIGTERM)
  state = train(
    CONFIG, tmp_path, Stops(step, terminate), console=Console(file=out)
  )
  assert signal.getsignal(signal.SIGTERM) == before
  assert state.step == step
  assert saved(tmp_path) == kept
  assert out.getvalue().splitlines()[-1] == (
    f"stopped by SIGTERM; step {step} of 12 is saved, and the same command"
    " resumes from there"
  )
  assert_identical(train(CONFIG, tmp_path), straight[1])
  assert_same_log(tmp_path, straight[0])


def test_sigterm_in_the_last_step_lets_the_run_end(straight, tmp_path):
  out = io.StringIO()
  state = train(
    CONFIG, tmp_path, Stops(12, terminate), console=Console(file=out)
  )
  assert_identical(state, straight[1])
  assert "SIGTERM" not in out.getvalue()


def test_a_run_goes_on_on_four_devices(straight, tmp_path):
  train(CONFIG, tmp_path, Stops(7, terminate))
  mesh = make_mesh(MeshConfig(fsdp=4), devices=jax.devices()[:4])
  state = train(CONFIG, tmp_path, mesh=mesh)
  assert len(state.loras["q"].a.sharding.device_set) == 4
  for names in LOGGED:
    for ours, one in zip(
      lines(tmp_path, *names), lines(straight[0], *names), strict=True
    ):
      assert ours[:-1] == [*one[:1], *ours[1:-1]]
      np.testing.assert_allclose(ours[-1], one[-1], atol=1e-5)
  rows = lines(tmp_path, "step", "rows")
  assert rows == lines(straight[0], "step", "rows")
  assert saved(tmp_path) == [9, 12]


# -----------------------------------------------------------------------------
# Programs.

PROGRAM = """
from tokenlora_jax.config import *

config = Config(
  workdir={workdir!r},
  base=BaseConfig(path="random:tiny", dtype="float32"),
  lora=LoraConfig(rank=2, targets=("q",)),
  data=DataConfig(
    tasks=("arc_challenge",), rows=4, length=512, train_rows=12, eval_rows=4
  ),
  optim=OptimConfig(steps=100_000),
  router=RouterConfig(encoder="hidden", centroid_rows=2),
  save_every=100_000,
)
"""


def wait_for(what, process):
  end = time.monotonic() + 120
  while not what():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.05)


def test_a_trainer_keeps_its_folder_until_sigterm(tmp_path):
  workdir = tmp_path / "run"
  file = tmp_path / "config.py"
  file.write_text(PROGRAM.format(workdir=str(workdir)))
  argv = ["--config", str(file), "--mesh.data", "2"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  environment = devices(2)
  with subprocess.Popen(
    [sys.executable, "train.py", *argv], cwd=ROOT, env=environment, **pipes
  ) as first:
    log = workdir / "metrics.jsonl"
    try:
      wait_for(lambda: log.exists() and log.read_text(), first)
      with pytest.raises(InputError, match=f": process {first.pid} on .* tr"):
        program.main(
          [*argv, "--mesh.data", "4", "--mesh.fsdp", "1", "--mesh.tensor", "2"]
        )
      first.terminate()
      out, errors = first.communicate(timeout=60)
    finally:
      first.kill()
  assert first.returncode == 0
  assert "Traceback" not in errors
  count = len(log.read_text().splitlines())
  assert out.splitlines()[-1] == (
    f"stopped by SIGTERM; step {count} of 100000 is saved, and the same command"
    " resumes from there"
  )
  assert saved(workdir) == [count]
  assert not (workdir / "bank").exists()
  with claim_workdir(cli.parse(Config, argv, "")):
    pass


HOLDS = """
import sys, time
from tokenlora_jax.config import Config
from tokenlora_jax.training.workdir import claim_workdir

with claim_workdir(Config(workdir=sys.argv[1])):
  print("holds it", flush=True)
  time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_lock(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", HOLDS, tmp_path],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  ) as holder:
    try:
      assert holder.stdout.readline() == "holds it\n"
      config = Config(workdir=str(tmp_path))
      with pytest.raises(InputError, match="trains in it"):  # noqa: SIM117
        with claim_workdir(config):
          pass
    finally:
      holder.kill()
  with claim_workdir(config):
    pass


# -----------------------------------------------------------------------------
# No numbers, no room.


def run(main, monkeypatch, capsys) -> tuple[int, str]:
  """A program's exit status and what it says on stderr."""
  monkeypatch.setattr(cli, "quiet", lambda: None)
  with pytest.raises(SystemExit) as stop:
    cli.run(main)
  return stop.value.code, capsys.readouterr().err


def test_no_number_is_status_1_and_the_good_checkpoint_stays(
  straight, tmp_path, monkeypatch, capsys
):
  real = make_step(CONFIG, one_device())

  def step(state, base, batch):
    state, metrics = real(state, base, batch)
    if state.step == 6:
      metrics = metrics | {"loss": jnp.array([jnp.nan])}
    return state, metrics

  with monkeypatch.context() as patched:
    patched.setattr("tiny.make_step", lambda *args: step)
    status, said = run(
      lambda argv: train(CONFIG, tmp_path), monkeypatch, capsys
    )
  assert status == 1
  rows = lines(straight[0], "step", "rows")[5][1][0]
  assert said == f"error: step 6: the loss of squad is nan on rows {rows}\n"
  assert saved(tmp_path) == [3]
  assert_identical(train(CONFIG, tmp_path), straight[1])
  assert_same_log(tmp_path, straight[0])


# Many arrays of a checkpoint fail at once; then something else goes wrong.
LEFT = f"""
import contextlib, gc, io, resource, sys, time
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import jax, jax.numpy as jnp
from tokenlora_jax.commands import cli
from tokenlora_jax.training.checkpoint import Checkpoints

class Other:
  def __del__(self):
    raise RuntimeError("Event loop is closed")

cli.quiet()
hook, dropped = sys.unraisablehook, []
sys.unraisablehook = lambda error: (dropped.append(error.exc_value), hook(error))
state = {{str(i): jnp.ones((50, 50)) + i for i in range(40)}}
checkpoints = Checkpoints(sys.argv[1], keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
with contextlib.suppress(ValueError):
  checkpoints.save(1, state, {{}})
  checkpoints.close()
del checkpoints
end = time.monotonic() + 30
while not dropped and time.monotonic() < end:
  gc.collect()
  time.sleep(0.1)
print({{str(error) for error in dropped}})
Other()
"""


def test_what_a_failed_save_leaves_is_not_heard_and_all_else_is(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", LEFT, tmp_path], capture_output=True, text=True
  )
  assert done.stdout == "{'Event loop is closed'}\n", done.stderr
  assert done.stderr.count("Event loop is closed") == 1
  assert "in __del__" in done.stderr


# A limit on a file's size fails as a full disk does, at any moment one likes.
FULL = f"""
import resource, sys, time
from pathlib import Path
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import test_checkpoint as t
from tokenlora_jax.commands import cli
from tokenlora_jax.files import writing

workdir, (size, step, newest) = Path(sys.argv[1]), map(int, sys.argv[2:])

def full(batch):
  while not (workdir / f"checkpoints/{{newest}}").exists():
    time.sleep(0.01)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
  return batch

def main(argv):
  with writing(workdir):
    t.train(t.CONFIG, workdir, t.Stops(step, full))

cli.run(main)
"""


@pytest.mark.parametrize(
  ("size", "step", "whole"),
  [
    (3000, 5, [3]),  # The checkpoint of step 6 has longer files.
    (1000, 8, [3, 6]),  # metrics.jsonl is longer already.
  ],
)
def test_a_full_disk_is_status_2_and_loses_nothing(
  size, step, whole, straight, tmp_path
):
  numbers = map(str, (size, step, whole[-1]))
  done = subprocess.run(
    [sys.executable, "-c", FULL, tmp_path, *numbers],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    f"error: {tmp_path}: cannot be written to (File too large); make it"
    " writable, and the same command resumes from its newest checkpoint"
  )
  assert "Traceback" not in done.stderr
  assert saved(tmp_path) == whole
  out = io.StringIO()
  state = train(CONFIG, tmp_path, console=Console(file=out))
  assert out.getvalue().startswith(f"resuming from step {whole[-1]} of 12\n")
  assert_identical(state, straight[1])
  assert_same_log(tmp_path, straight[0])
  left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert left == ["12", "9"]
