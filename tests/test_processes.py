"""Several processes as one run: how they start, and what each of them does."""

import dataclasses
import functools
import io
import itertools
import json
from pathlib import Path
import re
import socket
import subprocess
import sys
from unittest import mock

from child import devices
import jax
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest

from tokenlora_jax.bank.bank import load_bank
from tokenlora_jax.commands import training
from tokenlora_jax.config import InputError, MeshConfig
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.parallel import processes
from tokenlora_jax.parallel.processes import start_processes, tpu_hosts
from tokenlora_jax.parallel.sharding import MESH_AXES, make_mesh, process_block
import train

ROOT = Path(__file__).parents[1]

# -----------------------------------------------------------------------------
# A run of two processes.

STEPS = 20
TASKS = ("gsm8k", "arc_challenge")
CONFIG = f"""
from tokenlora_jax.config import *

config = Config(
  base=BaseConfig(path="random:tiny", dtype="float32"),
  lora=LoraConfig(rank=2),
  data=DataConfig(
    tasks={TASKS}, rows=4, length=160, loss_on="all", too_long="truncate",
    train_rows=12, eval_rows=4,
  ),
  optim=OptimConfig(steps={STEPS}, learning_rate=1e-2, warmup_steps=2),
  remat="none",
  router=RouterConfig(encoder="hidden", centroid_rows=2),
)
"""

# train.py, and notes on what it read, built and wrote.
PROGRAM = """
import json, os, sys

notes = {"measured": [], "built": [], "wrote": []}


def audit(event, args):
  if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
    notes["wrote"].append(str(args[0]))


sys.addaudithook(audit)

from tokenlora_jax.data import batches, examples as data

tokenize = data.tokenize


def noted(name):
  def function(row, *args):
    notes[name].append(row.origin)
    return tokenize(row, *args)

  return function


data.tokenize, batches.tokenize = noted("measured"), noted("built")

import train

train.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
  json.dump(notes, file)
"""


def free_port() -> int:
  with socket.socket() as taken:
    taken.bind(("localhost", 0))
    return taken.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run of two processes and the same of one: (notes, outputs, folders)."""
  folder = tmp_path_factory.mktemp("processes")
  file = folder / "config.py"
  file.write_text(CONFIG)
  argv = ["--config", str(file), "--workdir"]
  two, one = folder / "two", folder / "one"
  flags = [*argv, str(two), "--mesh.processes", "2"]
  flags += ["--mesh.coordinator", f"localhost:{free_port()}"]
  flags += ["--mesh.process"]
  environment = devices(2)
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, folder / f"{i}.json", *flags, str(i)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    alone = functools.partial(make_mesh, devices=jax.devices()[:1])
    with mock.patch.object(training, "make_mesh", alone):
      train.main([*argv, str(one)])
    outputs = [process.communicate(timeout=300) for process in started]
  finally:
    for process in started:
      process.kill()
  for process, (_, errors) in zip(started, outputs, strict=True):
    assert process.returncode == 0, errors
  notes = [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]
  return notes, outputs, (one, two)


def lines(workdir):
  file = workdir / "metrics.jsonl"
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_processes_train_as_one(runs):
  *_, (one, two) = runs
  for ours, theirs in zip(lines(two), lines(one), strict=True):
    assert ours.keys() == theirs.keys()
    for name in theirs:
      if name == "rows" or name.startswith(("step", "targets")):
        assert ours[name] == theirs[name]
      elif name.startswith(("loss", "held_out")):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
  first, last = lines(two)[0], lines(two)[STEPS - 1]
  for task in TASKS:
    assert last[f"loss/{task}"] < first[f"loss/{task}"] - 0.05
  base = load_base("random:tiny", "float32")
  ours, theirs = (load_bank(run / "bank", base) for run in (two, one))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
    (ours.adapters.layers, ours.centroids),
    (theirs.adapters.layers, theirs.centroids),
  )


def test_each_process_reads_and_builds_its_own_rows(runs):
  notes, _, (_, two) = runs
  steps = [line["rows"] for line in lines(two) if "rows" in line]
  assert len(steps) == STEPS
  for process, note in enumerate(notes):
    # Every second row's length, of two tasks in two splits.
    shares = [f"builtin:train:{i}" for i in range(process, 12, 2)] * 2
    shares += [f"builtin:test:{i}" for i in range(process, 4, 2)] * 2
    assert note["measured"] == shares
    # Of four rows a step and expert the two that its devices hold.
    held = slice(2 * process, 2 * process + 2)
    want = [
      f"builtin:train:{row}"
      for rows in steps
      for expert in rows
      for row in expert[held]
    ]
    built = [origin for origin in note["built"] if ":train:" in origin]
    assert built[: len(want)] == want
    # The next steps' batches may be under way.
    assert len(built) <= len(want) + 4 * (2 * len(TASKS))
    tests = [origin for origin in note["built"] if ":test:" in origin]
    assert len(tests) == 2 * len(TASKS)


# Gloo says this once a group of processes, from several threads, and writes its
# parts one by one: those of two lines may alternate.
GLOO = (
  "[Gloo] Rank ", " is connected to ", " peer ranks. ",
  "Expected number of connected peer ranks is : ",
)  # fmt: skip


def without_gloo(text: str) -> str:
  """What is left of a text without Gloo's parts, their numbers and ends."""
  for part in GLOO:
    text = text.replace(part, "\0")
  return re.sub(r"\0[\0\d]*(\n+\d+(?=\n))*\n*", "", text).rstrip("\n")


@pytest.mark.parametrize(
  "said", ["", "7 rows", "step 3", "connected peer ranks"]
)
def test_gloo_alone_is_left_out(said):
  whole = (
    "[Gloo] Rank 1 is connected to 1 peer ranks. "
    "Expected number of connected peer ranks is : 1\n"
  )
  torn = (
    "[Gloo] Rank [Gloo] Rank 11 is connected to  is connected to 11 peer"
    " ranks.  peer ranks. Expected number of connected peer ranks is : Expected"
    " number of connected peer ranks is : 1\n1\n"
  )
  assert without_gloo(f"{whole}{said}\n{torn}") == said


def test_only_process_0_writes_and_speaks(runs):
  notes, outputs, (_, two) = runs
  wrote = [
    {
      Path(name).relative_to(two).parts[0]
      for name in note["wrote"]
      if Path(name).is_relative_to(two)
    }
    for note in notes
  ]
  assert {"metrics.jsonl", "tensorboard"} <= wrote[0]
  assert wrote[1] <= {"checkpoints"}
  assert "step 20/20" in outputs[0][0]
  assert (without_gloo(outputs[1][0]), outputs[1][1]) == ("", "")
  assert len(list((two / "tensorboard").iterdir())) == 1


# -----------------------------------------------------------------------------
# How processes start.


def settings(coordinator, process) -> MeshConfig:
  return MeshConfig(coordinator=coordinator, processes=2, process=process)


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` was called with."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args: calls.append(args)
  )
  return calls


def test_flags_join_processes(joined):
  start_processes(MeshConfig())
  assert joined == []
  with socket.create_server(("localhost", 0)) as process_0:
    coordinator = f"localhost:{process_0.getsockname()[1]}"
    start_processes(settings(coordinator, 1))
  assert joined == [(coordinator, 2, 1)]


def test_a_coordinator_that_does_not_answer_is_named(joined, monkeypatch):
  monkeypatch.setattr(processes, "WAIT", 0)
  port = free_port()
  with pytest.raises(InputError) as error:
    start_processes(settings(f"localhost:{port}", 1))
  assert str(error.value) == (
    f"mesh.coordinator: 'localhost' does not answer on port {port} (Connection"
    " refused); does process 0 run there?"
  )
  assert joined == []


def test_a_port_that_is_taken_is_named(joined):
  with socket.create_server(("", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(InputError) as error:
      start_processes(settings(f"localhost:{port}", 0))
  assert str(error.value) == (
    f"mesh.coordinator: port {port} cannot be listened on (Address already in"
    " use)"
  )
  assert joined == []


@pytest.fixture
def tpu(monkeypatch):
  """A machine with TPUs, as far as JAX's settings say."""
  monkeypatch.setattr(
    processes.jax, "config", mock.Mock(jax_platforms="tpu,cpu")
  )
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  for name in ("MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)

  def unasked(*args, **kwargs):
    raise AssertionError("the metadata need not be asked for")

  monkeypatch.setattr(processes.urllib.request, "urlopen", unasked)
  return monkeypatch


@pytest.mark.parametrize(
  ("environment", "hosts"),
  [
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, 2),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
    ({"TPU_SKIP_MDS_QUERY": "1"}, 1),
  ],
)
def test_the_environment_names_a_pods_hosts(environment, hosts, tpu, joined):
  for name, value in environment.items():
    tpu.setenv(name, value)
  assert tpu_hosts() == hosts
  start_processes(MeshConfig())
  assert joined == [()] * (hosts > 1)


def test_a_machines_metadata_names_a_pods_hosts(tpu):
  def reply(request, timeout):
    assert request.headers == {"Metadata-flavor": "Google"}
    return io.BytesIO(b"x:y:10.0.0.1,x:y:10.0.0.2")

  tpu.setattr(processes.urllib.request, "urlopen", reply)
  assert tpu_hosts() == 2

  def none(request, timeout):
    raise OSError("no such host")

  tpu.setattr(processes.urllib.request, "urlopen", none)
  assert tpu_hosts() == 1


def test_without_tpus_nobody_is_asked(tpu):
  tpu.setenv("TPU_WORKER_HOSTNAMES", "a,b")
  processes.jax.config.jax_platforms = "cpu"
  assert tpu_hosts() == 1


def test_processes_that_cannot_be_joined_are_one_line(monkeypatch):
  def fail(*args):
    raise RuntimeError("DEADLINE_EXCEEDED: no answer\nin 300 s")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(InputError) as error:
    start_processes(settings(f"localhost:{free_port()}", 0))
  assert str(error.value) == (
    "mesh.processes: the processes cannot be joined: DEADLINE_EXCEEDED: no"
    " answer"
  )


# -----------------------------------------------------------------------------
# Who holds what.


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh needs."""

  id: int
  process_index: int
  coords: tuple[int, int, int] = (0, 0, 0)
  platform: str = "cpu"
  device_kind: str = "cpu"
  core_on_chip: int = 0


def mesh_of(processes, *shape) -> Mesh:
  """A mesh whose devices belong to these processes, in this order."""
  devices = [Device(i, process) for i, process in enumerate(processes)]
  axis_types = (AxisType.Auto,) * 4
  return Mesh(
    np.array(devices).reshape(shape), MESH_AXES, axis_types=axis_types
  )


@pytest.mark.parametrize(
  ("processes", "shape", "want"),
  [
    ([0, 0, 1, 1], (2, 1, 2, 1), ([2, 3], [0, 1, 2, 3, 4, 5, 6, 7])),
    ([0, 0, 1, 1], (1, 2, 2, 1), ([0, 1, 2, 3], [4, 5, 6, 7])),
    ([0, 1, 0, 1], (2, 1, 2, 1), ([0, 1, 2, 3], [4, 5, 6, 7])),
    # A host's chips need not be neighbours on an axis of the mesh.
    ([0, 0, 1, 1] * 2, (1, 1, 8, 1), ([0, 1, 2, 3], [2, 3, 6, 7])),
    ([0, 0, 1, 1] * 2, (4, 1, 2, 1), ([1, 3], [0, 1, 2, 3, 4, 5, 6, 7])),
    # All hold all rows where only tensors are split.
    ([0, 0, 1, 1], (1, 1, 1, 4), ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7])),
  ],
)
def test_a_process_holds_a_block(processes, shape, want, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert process_block(mesh_of(processes, *shape), 4, 8) == want


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
  ("processes", "shape"),
  [
    ([0, 0, 0, 1], (2, 2, 1, 1)),  # Process 0 holds no block.
    ([0, 0, 0, 1, 1, 1], (1, 3, 1, 2)),  # Both hold the middle row.
    ([0, 1, 1, 1], (1, 4, 1, 1)),  # Process 1 holds more.
  ],
)
def test_all_processes_refuse_other_meshes(
  processes, shape, process, monkeypatch
):
  monkeypatch.setattr(jax, "process_index", lambda: process)
  with pytest.raises(InputError, match=r"^mesh: expert .* 2 processes; choose"):
    process_block(mesh_of(processes, *shape), 2, 12)


@pytest.mark.parametrize("axes", [(1, 1, 32, 1), (4, 2, 4, 1), (2, 4, 2, 2)])
def test_a_pods_hosts_hold_blocks(axes):
  # A TPU v6e of 4 x 8 chips, each host with 2 x 2 of them.
  chips = [
    Device(i, x // 2 * 4 + y // 2, (x, y, 0), "tpu", "TPU v6 lite")
    for i, (y, x) in enumerate(itertools.product(range(8), range(4)))
  ]
  mesh = make_mesh(MeshConfig(*axes), rows=32, devices=chips)
  assert mesh.devices.shape == axes
  assert set(mesh.devices.flat) == set(chips)
  experts, rows = process_block(mesh, 4, 32)
  assert len(experts) * len(rows) == 4 * 32 // 8  # A host is an eighth.
