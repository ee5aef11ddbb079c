"""Kills training runs and compares their results with an undisturbed run.

  python -m benchmarks.kills --kills 20 --seed 0

One run of train.py is left alone. Another is killed with SIGKILL at random
moments of its whole life (start-up, compilation, steps, checkpoints being
written, the bank) and started again each time until it is done. A third is
stopped by SIGTERM half-way and resumed in three ways: on one device, on four
simulated ones, and with its newest checkpoint truncated.

Each must give the results of the undisturbed run: the same adapters bit for
bit, and in metrics.jsonl each step once, with the same rows and losses (to 1e-5
on four devices, where sums have another order). A difference gives exit status
1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import hashlib
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks import make_parser
from tokenlora_jax.commands import cli

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
# About how long a checkpoint is being written, seconds.
SAVE = 0.2


class Trainer:
  """A process of train.py, its output in a file of the folder above its own.

  Args:
    args: of this script.
    workdir: of the run.
    devices: how many CPU devices it sees.
  """

  def __init__(self, args: argparse.Namespace, workdir: Path, devices: int = 1):
    self.workdir = workdir
    self._logged = _steps(workdir)
    self._output = workdir.with_suffix(".out")
    self._output_before = self.said()
    flag = f"--xla_force_host_platform_device_count={devices}"
    settings = {
      "--config": args.config,
      "--workdir": workdir,
      "--optim.steps": args.steps,
      "--save-every": args.save_every,
      "--eval-every": args.steps // 4,
    }
    command = [sys.executable, "train.py"]
    for name, value in settings.items():
      command += [name, str(value)]
    self._start = time.monotonic()
    with self._output.open("ab") as output:
      self._process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
        stdout=output,
        stderr=subprocess.STDOUT,
      )

  @property
  def seconds(self) -> float:
    """The process's age in seconds."""
    return time.monotonic() - self._start

  @property
  def trains(self) -> bool:
    """Whether it has begun training steps."""
    return _steps(self.workdir) not in (self._logged, 0)

  def said(self) -> str:
    """The output so far, with that of earlier processes in the folder."""
    return self._output.read_text() if self._output.exists() else ""

  def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
    """Waits for something, and returns the exit status if it ended first."""
    while not until():
      try:
        return self._process.wait(0.005)
      except subprocess.TimeoutExpired:
        pass
    return self._process.poll()

  def wait_for(self, seconds: float) -> bool:
    """Waits so long, and returns whether it ended first."""
    until = self.seconds + seconds
    return self.wait(lambda: self.seconds > until) is not None

  def finish(self) -> str:
    """Waits for its end, and returns what it printed."""
    if status := self.wait():
      sys.exit(f"train.py ended with status {status}:\n{self.said()}")
    return self.said().removeprefix(self._output_before)

  def stop(self, number: signal.Signals) -> int:
    """Sends a signal and returns the exit status."""
    self._process.send_signal(number)
    return self._process.wait()


def _steps(workdir: Path) -> int:
  """Returns the number of lines in metrics.jsonl."""
  file = workdir / "metrics.jsonl"
  return file.read_bytes().count(b"\n") if file.exists() else 0


def half_written(workdir: Path) -> list[str]:
  """Returns the names of unfinished checkpoints."""
  return [p.name for p in workdir.glob("checkpoints/*") if not p.name.isdigit()]


def whole(workdir: Path) -> list[int]:
  """Returns the steps of the finished checkpoints."""
  names = [path.name for path in workdir.glob("checkpoints/*")]
  return sorted(int(name) for name in names if name.isdigit())


def lines(workdir: Path) -> list[dict]:
  """Returns the lines of metrics.jsonl, without times."""
  text = (workdir / "metrics.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  times = ("tokens_per_second", "mfu")
  return [{k: v for k, v in x.items() if k not in times} for x in found]


def adapters(workdir: Path) -> list[Path]:
  """Returns the adapter files of a finished run."""
  return sorted((workdir / "bank").glob("*/adapter_model.safetensors"))


def sha256(workdir: Path) -> str:
  """Returns the SHA-256 of all adapters of a finished run."""
  total = hashlib.sha256()
  for file in adapters(workdir):
    total.update(file.read_bytes())
  return total.hexdigest()


def compare(workdir: Path, alone: Path) -> list[str]:
  """Returns how a run's result differs from another's, to the last bit."""
  wrong = []
  if sha256(workdir) != sha256(alone):
    wrong.append("adapters")
  ours, theirs = lines(workdir), lines(alone)
  if _rows(ours) != _rows(theirs):
    wrong.append("steps or rows")
  if ours != theirs:
    wrong.append("losses")
  if whole(workdir) != whole(alone) or half_written(workdir):
    wrong.append("checkpoints")
  return wrong


def _rows(found: Sequence[dict]) -> list:
  return [(line["step"], line.get("rows")) for line in found]


def furthest(workdir: Path, alone: Path) -> tuple[float, float]:
  """Returns the largest differences of losses and of adapters' numbers."""
  losses = [
    abs(ours[name] - theirs[name])
    for ours, theirs in zip(lines(workdir), lines(alone), strict=True)
    for name in ours
    if name.startswith(("loss/", "held_out/"))
  ]
  numbers = [
    np.abs(ours[name] - theirs[name]).max()
    for ours, theirs in zip(
      map(load_file, adapters(workdir)),
      map(load_file, adapters(alone)),
      strict=True,
    )
    for name in ours
  ]
  return max(losses), float(max(numbers))


def kill_until_done(
  args: argparse.Namespace,
  workdir: Path,
  alone: Path,
  start_up: float,
  rest: float,
) -> list[list[str]]:
  """Trains while killing, and returns a table's row a kill.

  Of the moments, 2 in 5 lie in the time that a process takes to its first step.
  The others lie each in its share of the time that is left to train; half of
  them then wait until a checkpoint is being written.

  Args:
    args: of this script.
    workdir: of the run.
    alone: the folder of the run that was left alone.
    start_up: seconds from a process's start to its first step.
    rest: seconds from there to the end of a run that is left alone.
  """
  draw = random.Random(args.seed)
  table = []
  while len(table) < args.kills:
    trainer = Trainer(args, workdir)
    phase = draw.choices(("start-up", "steps", "a save"), (4, 3, 3))[0]
    moment = draw.random()
    if phase == "start-up":
      done = trainer.wait_for(moment * start_up)
    else:
      left = 1 - _steps(workdir) / _steps(alone)
      share = rest * left / (args.kills - len(table))
      done = trainer.wait(lambda t=trainer: t.trains) is not None
      done = done or trainer.wait_for(moment * 2 * share)
    if phase == "a save" and not done:
      done = trainer.wait(lambda: half_written(workdir)) is not None
      done = done or trainer.wait_for(moment * SAVE)
    age, trained = trainer.seconds, trainer.trains
    if done:
      trainer.finish()
      continue
    trainer.stop(signal.SIGKILL)
    table.append(
      [
        f"{len(table) + 1}",
        phase,
        f"{age:.2f}",
        f"{_steps(workdir)}" if trained else "none yet",
        ", ".join(half_written(workdir)),
        f"{max(whole(workdir), default=0)}",
      ]
    )
    print(f"kill {len(table)} after {age:.2f} s", file=sys.stderr)
  Trainer(args, workdir).finish()
  return table


def cut_newest(workdir: Path) -> Path:
  """Cuts the files of the newest checkpoint's arrays in half."""
  newest = workdir / f"checkpoints/{whole(workdir)[-1]}"
  for file in (newest / "state").glob("**/d/*"):
    os.truncate(file, file.stat().st_size // 2)
  return newest


def main(argv: Sequence[str]) -> None:
  """Runs all and prints tables."""
  parser = make_parser("benchmarks.kills", __doc__)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--config", default="configs/tiny.py")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--save-every", type=int, default=2)
  args = parser.parse_args(argv)
  console = Console(width=100)
  console.print(f"seed {args.seed}, {args.steps} steps of {args.config}")
  with tempfile.TemporaryDirectory() as folder:
    failures = _all(args, Path(folder), console)
  sys.exit(1 if failures else 0)


def _all(args: argparse.Namespace, folder: Path, console: Console) -> int:
  """Runs all cases, and returns the number of runs that differ."""
  results = Table("run", "adapters, sha256", "differs in", "")
  failures = 0

  def report(name, workdir, wrong, note=""):
    nonlocal failures
    failures += bool(wrong)
    results.add_row(
      name, sha256(workdir)[:16], ", ".join(wrong) or "nothing", note
    )

  alone = folder / "alone"
  trainer = Trainer(args, alone)
  trainer.wait(lambda: trainer.trains)
  start_up = trainer.seconds
  trainer.finish()
  rest = trainer.seconds - start_up
  console.print(f"left alone: {start_up:.1f} s to step 1, then {rest:.1f} s")
  report("left alone", alone, [])

  killed = folder / "killed"
  kills = Table(
    "kill",
    "its age, s",
    "moment",
    "lines logged",
    "half written",
    "resumes from",
  )
  for row in kill_until_done(args, killed, alone, start_up, rest):
    kills.add_row(*row)
  console.print(kills)
  report(f"{args.kills} times SIGKILL", killed, compare(killed, alone))

  half = folder / "half"
  trainer = Trainer(args, half)
  trainer.wait(lambda: _steps(half) >= args.steps // 2)
  status = trainer.stop(signal.SIGTERM)
  said = trainer.said().splitlines()[-1]
  stopped = status == 0 and "stopped by SIGTERM" in said
  for name, devices in (("SIGTERM", 1), ("one to four devices", 4)):
    workdir = Path(shutil.copytree(half, folder / name.replace(" ", "-")))
    Trainer(args, workdir, devices).finish()
    if devices == 1:
      wrong = compare(workdir, alone) + ([] if stopped else ["how it stopped"])
      report(name, workdir, wrong, f"status {status}: {said}")
      continue
    losses, numbers = furthest(workdir, alone)
    wrong = ["losses"] if losses > TOLERANCE else []
    if _rows(lines(workdir)) != _rows(lines(alone)):
      wrong.append("steps or rows")
    report(
      name, workdir, wrong, f"losses by {losses:.1e}, adapters {numbers:.1e}"
    )

  newest = cut_newest(half)
  warning = Trainer(args, half).finish()
  said = next((x for x in warning.splitlines() if "damaged" in x), "")
  wrong = compare(half, alone) + (
    [] if str(newest) in said else ["its warning"]
  )
  report("newest checkpoint cut", half, wrong, said)
  console.print(results)
  return failures


if __name__ == "__main__":
  cli.run(main)
