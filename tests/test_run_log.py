"""What a run reports while it trains."""

import io
import json
from pathlib import Path
import re
import struct
import time
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from tokenlora_jax.training import run_log as metrics
from tokenlora_jax.training.run_log import RunLog, peak_flops

NAMES = ("gsm8k", "squad")
PEAK = 1e6  # FLOP/s of one device.
PARAMETERS = 1000


@pytest.fixture
def clock(monkeypatch):
  """A clock that only the test turns."""
  clock = types.SimpleNamespace(now=100.0)
  fake = types.SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: 0.0)
  monkeypatch.setattr(metrics, "time", fake)
  monkeypatch.setattr(metrics, "peak_flops", lambda device: PEAK)
  return clock


def step_metrics(loss=2.0):
  return {
    "loss": np.array([loss, loss + 1], np.float32),
    "gradient_norm": np.array([0.25, 0.5], np.float32),
    "targets": np.array([3, 4], np.float32),
  }


def a_batch():
  """Two experts of two rows of 10 tokens, of which 8 are real.

  This process holds the first expert alone.
  """
  return {
    "tokens": np.zeros((1, 2, 10), np.int32),
    "sizes": np.full((2, 2), 8, np.int32),
    "rows": [np.array([4, 7], np.int32), np.array([0, 1], np.int32)],
  }


def open_log(workdir, steps=40, first=0, **console):
  out = io.StringIO()
  console = Console(file=out, width=120, **console)
  return out, RunLog(workdir, NAMES, steps, first, PARAMETERS, console)


def events(workdir) -> list[Event]:
  """TensorBoard's events: records of length, CRC, message and CRC."""
  found = []
  for file in sorted((workdir / "tensorboard").iterdir()):
    data = file.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      found.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def test_a_line_a_step_and_a_line_a_held_out_loss(tmp_path, clock):
  _, log = open_log(tmp_path)
  clock.now += 0.5
  log.step(1, step_metrics(), a_batch())
  # Each line is on disk at once.
  first = json.loads((tmp_path / "metrics.jsonl").read_text())
  clock.now += 5  # The held-out losses take time that is no step's.
  log.held_out(1, {"gsm8k": 1.5, "squad": 1.25})
  clock.now += 0.25
  log.step(2, step_metrics(1.0), a_batch())
  log.close()

  real = 2 * 2 * 8
  devices = jax.device_count()
  # Forward and the gradient of activations: 2 + 2 FLOPs a parameter, for
  # every token that is no padding, of the peak of all devices.
  flops = 4 * PARAMETERS * real
  assert first == {
    "step": 1,
    "tokens_per_second": real / 0.5,
    "mfu": pytest.approx(flops / 0.5 / (PEAK * devices)),
    "loss/gsm8k": 2.0,
    "loss/squad": 3.0,
    "gradient_norm/gsm8k": 0.25,
    "gradient_norm/squad": 0.5,
    "targets/gsm8k": 3.0,
    "targets/squad": 4.0,
    "rows": [[4, 7], [0, 1]],
  }
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  assert lines[0] == first
  assert lines[1] == {
    "step": 1,
    "held_out/gsm8k": 1.5,
    "held_out/squad": 1.25,
  }
  assert lines[2]["tokens_per_second"] == real / 0.25
  assert lines[2]["mfu"] == pytest.approx(2 * first["mfu"])


def test_tensorboard_has_what_the_lines_have(tmp_path, clock):
  _, log = open_log(tmp_path)
  for step in (1, 2):
    clock.now += 1
    log.step(step, step_metrics(float(step)), a_batch())
  log.held_out(2, {"gsm8k": 1.5, "squad": 1.25})
  log.close()
  values = {
    (event.step, value.tag): value.simple_value
    for event in events(tmp_path)
    for value in event.summary.value
  }
  want = {}
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    line = json.loads(line)
    line.pop("rows", None)
    step = line.pop("step")
    want |= {(step, name): pytest.approx(v) for name, v in line.items()}
  assert len(want) == 2 * 8 + 2
  assert values == want


def test_a_run_that_goes_on_adds_to_both(tmp_path, clock):
  for first in (0, 1):
    _, log = open_log(tmp_path, first=first)
    for step in (first + 1, first + 2):
      clock.now += 1
      log.step(step, step_metrics(), a_batch())
    log.close()
    # TensorBoard's files are named for the second they were made in.
    time.sleep(1 - time.time() % 1)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
  # TensorBoard is told to forget what it had from step 2 on.
  starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
  assert starts == [1, 2]


@pytest.mark.parametrize(
  ("first", "torn", "want"),
  [
    (0, "", []),
    (1, "", [1, 1]),
    (2, '{"step": 3, "lo', [1, 1, 2]),
    (3, '{"step": 3}', [1, 1, 2]),  # Nobody knows what was to follow.
    (3, "\0\0\xff\n", [1, 1, 2]),
    (3, "[3]\n", [1, 1, 2]),
  ],
)
def test_lines_of_steps_to_come_are_dropped(tmp_path, clock, first, torn, want):
  _, log = open_log(tmp_path)
  clock.now += 1
  log.step(1, step_metrics(), a_batch())
  log.held_out(1, {"gsm8k": 1.5, "squad": 1.25})
  clock.now += 1
  log.step(2, step_metrics(), a_batch())
  log.close()
  file = tmp_path / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  file.write_text("".join(lines) + torn, encoding="latin-1")
  _, log = open_log(tmp_path, first=first)
  log.close()
  left = file.read_text().splitlines(keepends=True)
  assert [json.loads(line)["step"] for line in left] == want
  assert left == lines[: len(want)]


def test_a_full_disk_closes_all_that_is_open(tmp_path, clock):
  out, log = open_log(tmp_path, force_terminal=True)
  full = Path("/dev/full").open("w")  # noqa: SIM115
  log._file.close()
  log._file = full
  clock.now += 1
  with pytest.raises(OSError, match="No space left"):
    log.step(1, step_metrics(), a_batch())
  with pytest.raises(OSError, match="No space left"):
    log.close()
  assert full.closed
  assert log._board._py_recordio_writer._writer.closed
  assert out.getvalue().rindex("\x1b[?25h") > 0


def test_a_pipe_gets_some_lines_and_no_control_codes(tmp_path, clock):
  out, log = open_log(tmp_path, steps=45, force_terminal=False)
  for step in range(1, 46):
    clock.now += 0.02
    log.step(step, step_metrics(), a_batch())
  log.held_out(45, {"gsm8k": 1.5, "squad": 1.25})
  log.close()
  lines = out.getvalue().splitlines()
  shown = [int(line.split("/")[0].removeprefix("step ")) for line in lines[:-1]]
  assert shown == [1, *range(2, 45, 2), 45]
  peak = PEAK * jax.device_count()
  mfu = 4 * PARAMETERS * 32 / 0.02 / peak
  assert lines[0] == (
    f"step 1/45  gsm8k 2.000 squad 3.000  1,600 tok/s  MFU {mfu:.0%} of"
    f" {peak / 1e12:.3g} TFLOP/s"
  )
  assert lines[-1] == "step 45  held-out  gsm8k 1.500  squad 1.250"
  assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_bar_that_is_closed(tmp_path, clock):
  out, log = open_log(tmp_path, steps=3, first=1, force_terminal=True)
  for step in (2, 3):
    clock.now += 1
    log.step(step, step_metrics(), a_batch())
  log.close()
  shown = out.getvalue()
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
  assert "train" in text
  assert "3/3 gsm8k 2.000 squad 3.000  32 tok/s" in text
  assert "step 2/3" not in text
  assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.parametrize(
  ("kind", "want"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
  ],
)
def test_known_devices_peaks_are_their_data_sheets(kind, want):
  device = types.SimpleNamespace(device_kind=kind, platform="")
  assert peak_flops(device) == want


def test_a_cpus_peak_is_measured():
  assert 1e8 < peak_flops(jax.devices()[0]) < 1e14


def test_a_peak_that_is_too_low_gives_no_utilisation(clock, tmp_path):
  out, log = open_log(tmp_path)
  clock.now += 1e-6
  log.step(1, step_metrics(), a_batch())
  log.close()
  assert "tok/s" in out.getvalue() and "MFU" not in out.getvalue()
  assert "mfu" not in json.loads((tmp_path / "metrics.jsonl").read_text())
