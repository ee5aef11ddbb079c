"""Whose folder a run may write to, and what a failing disk gets."""

import dataclasses
import errno
import fcntl
import json
import os
from pathlib import Path
import socket

import pytest
from safetensors import SafetensorError
from tiny import make_config

from tokenlora_jax import files
from tokenlora_jax.config import (
  InputError,
  MeshConfig,
  OptimConfig,
  RouterConfig,
)
from tokenlora_jax.data.rows import Row
from tokenlora_jax.files import writing
from tokenlora_jax.training.workdir import claim_workdir, contents

CONFIG = make_config(("squad",), steps=12, save_every=3, keep=2)


def claim(config, made_of=None) -> Path:
  """Claims the folder, and lets go of it."""
  with claim_workdir(config, made_of) as folder:
    return folder


def in_folder(folder, **changes):
  return dataclasses.replace(CONFIG, workdir=str(folder), **changes)


def test_a_new_folder_gets_the_config(tmp_path):
  config = in_folder(tmp_path / "runs/new")
  folder = claim(config)
  assert folder == tmp_path / "runs/new"
  assert json.loads((folder / "config.json").read_text()) == config.to_json()
  names = sorted(path.name for path in folder.iterdir())
  assert names == [".lock", "config.json"]


def test_another_run_is_refused_by_its_first_difference(tmp_path):
  claim(in_folder(tmp_path))
  before = (tmp_path / "config.json").read_bytes()
  other = in_folder(tmp_path, optim=OptimConfig(12, 2e-3, 2), seed=1)
  with pytest.raises(InputError) as error:
    claim(other)
  assert str(error.value) == (
    f"--workdir {tmp_path}: holds a run with optim.learning_rate 0.01 (now"
    " 0.002); choose another --workdir, or restore its settings to resume it"
  )
  assert (tmp_path / "config.json").read_bytes() == before


def test_the_same_run_goes_on_where_its_result_stays_the_same(tmp_path):
  claim(in_folder(tmp_path))
  claim(in_folder(tmp_path))
  changes = {"save_every": 1, "eval_every": 0, "keep": 9, "remat": "full"}
  changes |= {"mesh": MeshConfig(data=2), "router": RouterConfig("uniform")}
  config = in_folder(tmp_path, **changes)
  claim(config)
  assert json.loads((tmp_path / "config.json").read_text()) == config.to_json()


def made_of(folder="here", base="abc", answer=" b"):
  rows = [Row("q", " a", f"{folder}:1"), Row("r", answer, f"{folder}:2")]
  return contents(base, train={"squad": rows}, test={"squad": rows[:1]})


def moved(config, base, data):
  return dataclasses.replace(
    config,
    base=dataclasses.replace(config.base, path=base),
    data=dataclasses.replace(config.data, dir=data),
  )


def test_a_run_goes_on_where_its_rows_and_base_have_moved(tmp_path):
  claim(moved(in_folder(tmp_path), "old/base", "old"), made_of("old"))
  config = moved(in_folder(tmp_path), "new/base", "new")
  claim(config, made_of("new"))
  assert json.loads((tmp_path / "config.json").read_text()) == config.to_json()
  with pytest.raises(InputError, match=r"optim\.learning_rate 0\.01"):
    claim(
      dataclasses.replace(config, optim=OptimConfig(12, 2e-3, 2)),
      made_of("new"),
    )


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"answer": " c"}, "the train rows of squad"),
    ({"base": "abd"}, "the base"),
  ],
)
def test_other_rows_or_another_base_are_refused(tmp_path, change, name):
  config = in_folder(tmp_path)
  claim(config, made_of())
  before = (tmp_path / "run.json").read_bytes()
  with pytest.raises(InputError) as error:
    claim(config, made_of(**change))
  assert str(error.value) == (
    f"--workdir {tmp_path}: holds a run started with another version of"
    f" {name}; choose another --workdir, or restore that version"
  )
  assert (tmp_path / "run.json").read_bytes() == before


def test_the_order_of_rows_counts():
  rows = [Row("q", " a", "f:1"), Row("r", " b", "f:2")]
  ways = [rows, rows[::-1], rows[:1], [Row("q a", "", "f:1"), rows[1]]]
  digests = {str(contents("", train={"squad": way})) for way in ways}
  assert len(digests) == len(ways)


def test_a_run_without_contents_goes_on_in_its_place_alone(tmp_path):
  config = moved(in_folder(tmp_path), "base", "data")
  claim(config)
  with pytest.raises(InputError, match=r"base\.path 'base' \(now 'other'\)"):
    claim(moved(config, "other", "data"), made_of())
  claim(config, made_of())
  claim(moved(config, "other", "elsewhere"), made_of())


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_damaged_contents_are_named(tmp_path, text):
  claim(in_folder(tmp_path), made_of())
  (tmp_path / "run.json").write_text(text)
  with pytest.raises(InputError, match=r"run\.json: not a run's contents"):
    claim(in_folder(tmp_path), made_of())


def test_no_resume_refuses_a_folder_that_holds_the_run(tmp_path):
  config = in_folder(tmp_path, resume=False)
  claim(config)
  with pytest.raises(
    InputError, match=r"holds this run already;.* --no-resume"
  ):
    claim(config)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(InputError, match=r"config\.json: not a run's config"):
    claim(in_folder(tmp_path))


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(InputError, match=r"holds checkpoints of an unknown run"):
    claim(in_folder(tmp_path))
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(InputError, match=rf"{name}: cannot be written to \("):
    claim(in_folder(tmp_path / name))
  assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
  file = tmp_path / "config.json"
  files.write_atomically(file, "old")

  def fails(self, target):
    raise OSError("no space left")

  monkeypatch.setattr(Path, "replace", fails)
  with pytest.raises(OSError, match="no space left"):
    files.write_atomically(file, "new")
  assert file.read_text() == "old"
  assert list(tmp_path.iterdir()) == [file]


# -----------------------------------------------------------------------------
# The lock.


def test_a_second_trainer_is_told_who_has_the_folder(tmp_path):
  config = in_folder(tmp_path)
  with claim_workdir(config):
    lock = (tmp_path / ".lock").read_bytes()
    with pytest.raises(InputError) as error:
      claim(config)
    assert (tmp_path / ".lock").read_bytes() == lock
    # Whatever it is a run of.
    with pytest.raises(InputError, match="trains in it"):
      claim(in_folder(tmp_path, seed=1))
  owner = f"process {os.getpid()} on {socket.gethostname()}"
  assert str(error.value) == (
    f"--workdir {tmp_path}: {owner} trains in it; wait for its end, stop it, or"
    " choose another --workdir"
  )
  claim(config)
  assert (tmp_path / ".lock").read_bytes() == b""


def test_a_run_that_fails_lets_go_of_the_folder(tmp_path):
  with pytest.raises(ZeroDivisionError), claim_workdir(in_folder(tmp_path)):
    raise ZeroDivisionError
  claim(in_folder(tmp_path))


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_a_disk_without_locks_gets_a_warning(
  number, tmp_path, monkeypatch, caplog
):
  def flock(file, how):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "flock", flock)
  claim(in_folder(tmp_path))
  assert caplog.messages == [
    f"--workdir {tmp_path}: its disk has no locks ({os.strerror(number)}); let"
    " no other process train in it"
  ]


# -----------------------------------------------------------------------------
# A disk that fails.


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (OSError(errno.ENOSPC, "No space"), "No space left on device); make room"),
    (OSError(errno.EDQUOT, "Quota"), "Disk quota exceeded); make room there"),
    (OSError(errno.EIO, "I/O"), "Input/output error); make it writable"),
    # As tensorstore and safetensors say it.
    (
      ValueError("Failed to write 1 bytes: No space [os_error_code='28']"),
      "No space left on device); make room there",
    ),
    (
      SafetensorError("I/O error: No space left on device (os error 28)"),
      "No space left on device); make room there",
    ),
  ],
)
def test_a_failing_disk_is_one_line(error, said):
  with pytest.raises(InputError) as caught, writing(Path("runs/a")):
    raise error
  assert str(caught.value).startswith(f"runs/a: cannot be written to ({said}")
  assert str(caught.value).endswith(
    ", and the same command resumes from its newest checkpoint"
  )


@pytest.mark.parametrize(
  "error",
  [BrokenPipeError(errno.EPIPE, "pipe"), ValueError("28"), OSError("x")],
)
def test_other_errors_stay_what_they_are(error):
  with pytest.raises(type(error)) as caught, writing(Path("runs/a")):
    raise error
  assert caught.value is error
