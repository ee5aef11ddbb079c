"""train.py, from a command line to a bank."""

import functools
import json
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
import safetensors.numpy

from benchmarks.loading import write_checkpoint
from tokenlora_jax.bank.bank import load_bank
from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError
from tokenlora_jax.formats.load import Base, load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training import step as training
from tokenlora_jax.training.checkpoint import Checkpoints
from tokenlora_jax.training.loop import trained_adapters
import train

CONFIG = """
from tokenlora_jax.config import *

config = Config(
  workdir={workdir!r},
  base=BaseConfig(path="random:tiny", dtype="float32"),
  lora=LoraConfig(rank=2, targets=("q", "down")),
  data=DataConfig(
    tasks=("gsm8k", "arc_challenge"), rows=4, length=384, train_rows=12,
    eval_rows=4,
  ),
  optim=OptimConfig(steps=2, learning_rate=1e-2, warmup_steps=0),
  mesh=MeshConfig(expert=2, data=2, fsdp=2),
  router=RouterConfig(encoder="hidden", centroid_rows=2),
)
"""


@pytest.fixture(scope="module", autouse=True)
def base_once():
  """The base is drawn once for all runs."""
  with mock.patch.object(Base, "weights", functools.cache(Base.weights)):
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run: (its arguments, its folder)."""
  folder = tmp_path_factory.mktemp("train")
  workdir = folder / "run"
  file = folder / "config.py"
  file.write_text(CONFIG.format(workdir=str(workdir)))
  argv = ["--config", str(file)]
  train.main(argv)
  return argv, workdir


def contents(folder) -> dict:
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_bank_holds_the_last_checkpoints_adapters(run):
  argv, workdir = run
  config = cli.parse(Config, argv, "")
  assert json.loads((workdir / "config.json").read_text()) == config.to_json()
  bank = load_bank(workdir / "bank", load_base("random:tiny", "float32"))
  assert bank.base == "random:tiny"
  assert bank.adapters.names == config.data.tasks
  assert bank.centroids["hidden"].shape == (2, 64)
  assert np.ptp(bank.centroids["hidden"], axis=0).max() > 1e-3

  mesh = make_mesh(config.mesh)
  base = load_base("random:tiny", "float32", mesh, stacked=True)
  checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
  state, _ = checkpoints.restore(training.init_state(config, base, mesh), mesh)
  checkpoints.close()
  assert state.step == 2
  saved = trained_adapters(config, state)
  for ours, theirs in zip(bank.adapters.layers, saved.layers, strict=True):
    assert set(ours) == {"q", "down"}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(np.any(lora.b != 0) for lora in ours.values())


def test_a_finished_run_gives_the_same_bank_again(run, capsys):
  argv, workdir = run
  before = contents(workdir / "bank")
  train.main(argv)
  assert "resuming from step 2 of 2" in capsys.readouterr().out
  assert contents(workdir / "bank") == before


def test_a_full_disk_leaves_the_bank_as_it_was(run, monkeypatch):
  argv, workdir = run
  before = contents(workdir)

  def full(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(InputError, match=r"run: cannot .* \(No space left on"):
    train.main(argv)
  after = contents(workdir)
  for folder in (before, after):  # A new file at each start.
    for path in [p for p in folder if "tensorboard" in p.parts]:
      folder.pop(path)
  assert after == before


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--optim.learning-rate", "0.5"], "holds a run with optim.learning_rate"),
    (["--no-resume"], "holds this run already"),
  ],
)
def test_a_run_is_never_overwritten(run, flags, message):
  argv, workdir = run
  before = contents(workdir)
  with pytest.raises(InputError, match=message):
    train.main([*argv, *flags])
  assert contents(workdir) == before


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--mesh.data", "3"], "takes 12 devices, but there are 8"),
    (["--data.rows", "6"], "data.rows: 6 is not a multiple"),
    (["--base", "random:tyni"], "did you mean 'tiny'"),
    (["--data.tasks", "gsm8k", "sqad"], "did you mean 'squad'"),
    (["--data.length", "8"], "8 tokens hold none"),
  ],
)
def test_bad_input_is_found_before_anything_is_written(
  run, tmp_path, flags, message
):
  argv, _ = run
  workdir = tmp_path / "new"
  with pytest.raises(InputError, match=message) as error:
    train.main([*argv, *flags, "--workdir", str(workdir)])
  assert "\n" not in str(error.value)
  assert not workdir.exists()


def test_a_tokenizer_of_another_base_is_told_before_the_first_step(
  run, tmp_path
):
  argv, _ = run
  base, workdir = tmp_path / "base", tmp_path / "new"
  base.mkdir()
  write_checkpoint(base, PRESETS["tiny"], "float32", 2**30)
  tokenizer = load_tokenizer("random:tiny")
  tokenizer.add_special_tokens({"eos_token": "<end>"})
  tokenizer.save_pretrained(base)
  with pytest.raises(InputError, match=r"260.*base's own tokenizer") as error:
    train.main([*argv, "--base", str(base), "--workdir", str(workdir)])
  assert "\n" not in str(error.value)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("error", "status", "said"),
  [
    (FloatingPointError("step 3: nan"), 1, "error: step 3: nan\n"),
    (KeyboardInterrupt("stopped; go on"), 130, "\nstopped; go on\n"),
    (KeyboardInterrupt(), 130, "\nstopped\n"),
  ],
)
def test_how_a_program_ends(error, status, said, monkeypatch, capsys):
  def main(argv):
    assert argv == ["--flag"]
    raise error

  monkeypatch.setattr(sys, "argv", ["train.py", "--flag"])
  monkeypatch.setattr(cli, "quiet", lambda: None)
  with pytest.raises(SystemExit) as stop:
    cli.run(main)
  assert stop.value.code == status
  assert capsys.readouterr().err == said
