"""Reports a training run: progress bar, metrics.jsonl and TensorBoard.

Model FLOPs utilisation (MFU) is 4 N FLOPs per real token, padding not counted,
over the devices' peak: 2 N for the forward pass and 2 N for the gradient of the
activations, where N is the number of parameters a token is multiplied with. A
frozen base has no weight gradient, which would be another 2 N; the adapters'
FLOPs are left out. No MFU is shown where it would exceed 100 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import sys
import time

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from tokenlora_jax.files import write_atomically
from tokenlora_jax.model.fused_attention import Accelerator
from tokenlora_jax.parallel.chips import chip_of

# tensorboardX imports torch where there is one, which takes seconds, to write
# torch's tensors, of which we have none. Python takes None for "not installed".
_hidden = sys.modules.setdefault("torch", None) is None
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402

if _hidden:
  del sys.modules["torch"]

# Seconds between two flushes to TensorBoard.
FLUSH_EVERY = 30


def peak_flops(device: Accelerator) -> float:
  """Returns a device's peak in FLOP/s, from the table or measured.

  For a CPU or an unknown device, the rate of a 1024 x 1024 float32 matrix
  product is measured.
  """
  if chip := chip_of(device.device_kind):
    return chip.flops
  size = 1024
  x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
  multiply = jax.jit(lambda x: x @ x)
  multiply(x).block_until_ready()
  start = time.perf_counter()
  for _ in range(8):
    multiply(x).block_until_ready()
  return 8 * 2 * size**3 / (time.perf_counter() - start)


class RunLog:
  """Prints and writes the metrics of a training run.

  Args:
    workdir: gets metrics.jsonl and tensorboard/.
    names: the experts' names.
    steps: of the whole run.
    first: steps done before this start.
    parameters: N, for the MFU.
    console: shows the progress.

  Only process 0 should make one.
  """

  def __init__(
    self,
    workdir: Path,
    names: Sequence[str],
    steps: int,
    first: int,
    parameters: int,
    console: Console,
  ):
    self._names = names
    self._steps = steps
    self._console = console
    self._peak = peak_flops(jax.devices()[0]) * jax.device_count()
    self._flops_per_token = 4 * parameters
    # A resumed run repeats the steps after its last checkpoint.
    _drop_lines_after(workdir / "metrics.jsonl", first)
    self._file = (workdir / "metrics.jsonl").open("a")
    (workdir / "tensorboard").mkdir(exist_ok=True)
    # Not SummaryWriter: a full disk kills its thread, and close() then hangs.
    self._board = EventsWriter(
      str(workdir / "tensorboard/events"), f".{os.getpid()}"
    )
    log = SessionLog(status=SessionLog.START)
    self._board.write_event(Event(step=first + 1, session_log=log))
    self._last = self._flushed = time.perf_counter()
    self._progress = Progress(
      TextColumn("train"),
      BarColumn(bar_width=20),
      MofNCompleteColumn(),
      TextColumn("{task.fields[losses]}"),
      TimeRemainingColumn(compact=True),
      console=console,
      disable=not console.is_terminal,
    )
    self._task = self._progress.add_task(
      "", total=steps, completed=first, losses=""
    )
    self._progress.start()

  def step(
    self,
    step: int,
    metrics: Mapping[str, Float[np.ndarray, " E"]],
    batch: Mapping,
  ) -> None:
    """Reports one optimizer step.

    Args:
      step: optimizer steps done.
      metrics: float32[E] each, on the host; see `make_step`.
      batch: of the step; its `sizes`, int32[E, B], and `rows`, E arrays, cover
        all processes.
    """
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    real = int(np.sum(batch["sizes"]))
    values = {"tokens_per_second": real / seconds}
    told = f"{values['tokens_per_second']:,.0f} tok/s"
    mfu = real / seconds * self._flops_per_token / self._peak
    if mfu <= 1:
      values["mfu"] = mfu
      told += f"  MFU {mfu:.0%} of {self._peak / 1e12:.3g} TFLOP/s"
    for name in metrics:
      values |= {
        f"{name}/{expert}": float(value)
        for expert, value in zip(self._names, metrics[name], strict=True)
      }
    self._write(step, values, rows=[r.tolist() for r in batch["rows"]])
    if now > self._flushed + FLUSH_EVERY:
      self._board.flush()
      self._flushed = now
    losses = " ".join(
      f"{name} {loss:.3f}"
      for name, loss in zip(self._names, metrics["loss"], strict=True)
    )
    line = f"{losses}  {told}"
    self._progress.update(self._task, completed=step, losses=line)
    every = max(1, self._steps // 20)
    shown = step % every == 0 or step in (1, self._steps)
    if shown and not self._console.is_terminal:
      self._console.print(
        f"step {step}/{self._steps}  {line}", highlight=False, soft_wrap=True
      )

  def held_out(self, step: int, losses: Mapping[str, float]) -> None:
    """Reports held-out losses by expert, in nats a target token."""
    self._write(step, {f"held_out/{k}": v for k, v in losses.items()})
    text = "  ".join(f"{k} {v:.3f}" for k, v in losses.items())
    self._console.print(f"step {step}  held-out  {text}", soft_wrap=True)
    self._last = time.perf_counter()  # The next step's time starts here.

  def _write(self, step, values, **more):
    scalars = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
    ]
    self._board.write_event(
      Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
    )
    self._file.write(json.dumps({"step": step, **values, **more}) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Ends the bar and the files."""
    with contextlib.ExitStack() as stack:  # Each, even if one fails.
      stack.callback(self._board.close)
      stack.callback(self._file.close)
      stack.callback(self._progress.stop)


def _drop_lines_after(file: Path, step: int) -> None:
  """Drops the lines of later steps, and a last line that is incomplete."""
  if not file.exists():
    return

  def stays(line):
    try:
      return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
      return False

  lines = file.read_text(errors="replace").splitlines(keepends=True)
  whole = [line for line in lines if stays(line)]
  if whole != lines:
    write_atomically(file, "".join(whole))
