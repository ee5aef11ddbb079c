"""The commands that show, edit and export a bank, as a person gives them."""

import json
import subprocess
import sys

from banks import NAMES, contents
import numpy as np
import pytest

import infer
from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import Base, load_base
from tokenlora_jax.formats.peft import load_adapters, save_adapter
from tokenlora_jax.model.lora import Adapters, random_adapters

CONFIG = (
  "--config", "configs/tiny.py", "--router.centroid-rows", "2",
  "--data.train-rows", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def base():
  return load_base("random:tiny", "float32")


@pytest.fixture
def folder(base, tmp_path):
  adapters = Adapters(NAMES, random_adapters(base, experts=3, rank=4).layers)
  table = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
  fitted = {"kmeans": Fitted({"k": 2}, {"means": np.ones((3, 2, 64))}, NAMES)}
  bank = Bank(
    adapters, "random:tiny", base.fingerprint, {"hidden": table},
    {"beta": Expert("squad", "...")}, fitted,
  )  # fmt: skip
  save_bank(tmp_path / "bank", bank)
  save_adapter(
    random_adapters(base, experts=1, rank=6, seed=1), 0, tmp_path / "new"
  )
  return tmp_path / "bank"


@pytest.fixture
def run(folder, base, monkeypatch, capsys):
  """Gives infer.py a command on the bank, and returns what it prints."""
  monkeypatch.setattr(Base, "weights", lambda *_, **__: base)
  monkeypatch.setenv("COLUMNS", "120")

  def run(command, *argv):
    infer.main([command, "--bank", str(folder), *map(str, argv)])
    return capsys.readouterr().out

  return run


def rows(shown):
  """The cells of the tables' rows, by the first cell."""
  cells = [line.split("│")[1:-1] for line in shown.splitlines()]
  return {row[0].strip(): [c.strip() for c in row[1:]] for row in cells if row}


def test_a_bank_is_shown(run, folder):
  shown = run("bank")
  assert (
    f"{folder}: 3 experts on random:tiny (fingerprint random:tiny)" in shown
  )
  found = rows(shown)
  assert found["beta"] == ["squad", "4", "4", "q v", "hidden"]
  assert found["alpha"] == ["?", "4", "4", "q v", "hidden"]
  assert found["kmeans"] == ['{"k": 2}', "means [3, 2, 64]", "these experts"]
  weights = folder / "beta" / "adapter_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1])
  with pytest.raises(InputError, match="was damaged or exchanged"):
    run("bank")


def test_an_expert_is_added_with_its_tasks_rows(run, folder, tmp_path, base):
  told = run(
    "bank-add", *CONFIG, "--adapter", tmp_path / "new", "--name", "delta",
    "--task", "gsm8k",
  )  # fmt: skip
  assert told == f"added delta to {folder}\n"
  bank = load_bank(folder, base)
  assert bank.experts["delta"].task == "gsm8k"
  assert bank.experts["delta"].template == "Question: {question}\n\nAnswer:"
  row = bank.centroids["hidden"][3]
  assert 0.5 < np.linalg.norm(row) <= 1.0001
  assert rows(run("bank"))["delta"][:2] == ["gsm8k", "6"]
  assert rows(run("bank"))["kmeans"][2] == "others: alpha, beta, gamma"


def test_an_expert_is_added_with_texts_of_ones_own(run, folder, tmp_path, base):
  (tmp_path / "texts").write_text("one text\n\nanother\n")
  own = ("--adapter", tmp_path / "new", "--task", "my own", "--name")
  run("bank-add", *CONFIG, *own, "d", "--texts-file", tmp_path / "texts")
  bank = load_bank(folder, base)
  assert bank.experts["d"] == Expert("my own", "")
  assert bank.lacking("hidden") == ()
  # Without, the centroid is missing, and that is said.
  told = run("bank-add", *CONFIG, *own, "e")
  assert "e has no centroid of hidden" in told
  assert rows(run("bank"))["e"] == ["my own", "6", "2.667", "q v", "no hidden"]


def test_an_expert_is_dropped(run, folder, base):
  assert run("bank-drop", "--name", "beta") == f"dropped beta from {folder}\n"
  assert load_bank(folder, base).adapters.names == ("alpha", "gamma")


def test_a_mixture_is_exported(run, folder, tmp_path):
  out = tmp_path / "mixed"
  shown = run("export", "--gates", "0.5", "-0.25", "0", "--output", out)
  assert shown.endswith(f"{out}: rank 8, relative error 0.00e+00\n")
  assert load_adapters([out]).layers[0]["q"].a.shape == (1, 8, 64)
  small = tmp_path / "small"
  shown = run(
    "export", "--gates", "0.5", "-0.25", "1", "--rank", 2, "--output", small
  )
  last = shown.splitlines()[-1]
  error = float(last.split("relative error ")[1])
  assert last.startswith(f"{small}: rank 2,") and 0.1 < error < 0.9
  assert [float(x) > 0.1 for x in rows(shown)["1"]] == [True, True]
  config = json.loads((small / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "random:tiny"


def test_mistakes_are_one_line_and_overwrite_nothing(
  run, folder, tmp_path, monkeypatch
):
  (tmp_path / "taken").mkdir()
  (tmp_path / "empty").write_text("\n")
  new = ("--adapter", tmp_path / "new")
  named = (*new, "--name", "delta")
  gates = ("--gates", "1", "1", "1")
  before = contents(tmp_path)
  for argv, told in (
    (["bank", "--nmae", "x"], "--nmae: there is no such flag"),
    (["bank-drop"], "^--name: is needed; see --help$"),
    (["bank-drop", "--name", "bta"], "did you mean 'beta'"),
    (["export", "--output", "x"], "--gates: is needed"),
    (["export", "--gates", "1", "x", "--output", "x"], "x"),
    (["export", *gates, "--output", tmp_path / "taken"], "taken: exists"),
    (["export", *gates, "--output", tmp_path / "a/b"], "there is no folder"),
    (
      ["export", "--gates", "1", "--output", tmp_path / "x"],
      "gates: 1 numbers for 3 experts",
    ),
    (["export", *gates, "--rank", "0", "--output", tmp_path / "x"], "rank: 0"),
    (["bank-add", *CONFIG, *new], "--name: is needed"),
    (["bank-add", *CONFIG, "--name", "delta"], "--adapter: is needed"),
    (
      ["bank-add", *CONFIG, *named, "--base", "random:smollm2-135m"],
      "trained on random:tiny .* give --base.path that one, .*--same-base",
    ),
    (
      ["bank-add", *CONFIG, *named, "--texts-file", tmp_path / "empty"],
      "empty: holds no text",
    ),
    (["bank-add", *CONFIG, *new, "--name", "beta"], "'beta' already"),
    (["bank-ad"], "'bank-ad': is not a command; .*did you mean 'bank-add'"),
  ):
    with pytest.raises(InputError, match=told) as caught:
      run(*argv)
    assert "\n" not in str(caught.value), argv
    assert contents(tmp_path) == before
  for command in ("bank", "bank-add", "bank-drop", "export"):
    with pytest.raises(InputError, match=r"^--bank: is needed; see --help$"):
      infer.main([command])
  full = OSError(28, "No space left on device")

  def fails(*_, **__):
    raise full

  monkeypatch.setattr("safetensors.numpy.save_file", fails)
  with pytest.raises(InputError, match="make room there, and give the command"):
    run("bank-drop", "--name", "beta")
  assert contents(tmp_path) == before


def test_help_tells_each_flag(capsys):
  for command, flags in (
    ("bank", ["--bank"]),
    ("bank-add", ["--adapter", "--name", "--texts-file", "--data.tasks"]),
    ("bank-drop", ["--bank", "--name"]),
    ("export", ["--gates", "--rank", "--output"]),
  ):
    with pytest.raises(SystemExit) as stop:
      infer.main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(flag in shown for flag in flags)


def test_a_mistake_is_status_2(folder):
  done = subprocess.run(
    [sys.executable, "infer.py", "bank-drop", "--bank", folder, "--name", "x"],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == ("error: name: 'x' is not one of alpha, beta, gamma\n")
