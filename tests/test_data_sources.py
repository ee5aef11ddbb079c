"""Rows from every source: built in, local files, the hub and tfds."""

import json
import logging
import sys
import types

import numpy as np
import pytest

from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data.rows import Row, load_rows
from tokenlora_jax.data.tasks import TASKS


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "".join(
      (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
    )
  )


def gsm8k(n):
  return {"question": f"What is {n}+1?", "answer": f"#### {n + 1}"}


def local(tmp_path, **settings):
  return DataConfig(source="local", dir=str(tmp_path), **settings)


def test_built_in_rows_follow_seed_split_and_caps():
  config = DataConfig(train_rows=5)
  train = load_rows(config, "squad", "train")
  test = load_rows(config, "squad", "test")
  assert [row.origin for row in train] == [
    f"builtin:train:{i}" for i in range(5)
  ]
  assert [row.origin for row in test] == [
    f"builtin:test:{i}" for i in range(512)
  ]
  assert train == load_rows(config, "squad", "train")
  assert not {row.prompt for row in train} & {row.prompt for row in test}
  assert train != load_rows(DataConfig(train_rows=5, seed=1), "squad", "train")
  for row in train:
    assert row.prompt.startswith("Context:\n")
    assert row.prompt.endswith("\n\nAnswer:")
    assert row.answer.startswith(" ")


def test_zero_train_rows_is_all_of_them():
  assert len(load_rows(DataConfig(), "gsm8k", "train")) == 4096


def test_an_unknown_split_is_named():
  with pytest.raises(InputError, match=r"split: 'tset' .*did you mean 'test'"):
    load_rows(DataConfig(), "gsm8k", "tset")


def test_local_rows_carry_file_and_line(tmp_path):
  path = tmp_path / "gsm8k" / "train.jsonl"
  write_lines(path, [gsm8k(1), "", gsm8k(2), gsm8k(3)])
  rows = load_rows(local(tmp_path, train_rows=2), "gsm8k", "train")
  assert rows == [
    Row("Question: What is 1+1?\n\nAnswer:", " #### 2", f"{path}:1"),
    Row("Question: What is 2+1?\n\nAnswer:", " #### 3", f"{path}:3"),
  ]


SKIP = "; --data.bad-rows skip leaves such rows out"
BAD_LINES = [gsm8k(1), '{"question": ', {"question": "q"}, gsm8k(4)]


def test_a_bad_row_is_fatal_and_names_file_line_and_field(tmp_path):
  path = tmp_path / "gsm8k" / "train.jsonl"
  write_lines(path, BAD_LINES)
  with pytest.raises(InputError) as error:
    load_rows(local(tmp_path), "gsm8k", "train")
  assert (
    str(error.value) == f"{path}:2: want a JSON object, got '{{\"question\":'"
    f"{SKIP}"
  )
  write_lines(path, [BAD_LINES[0], BAD_LINES[2]])
  with pytest.raises(InputError) as error:
    load_rows(local(tmp_path), "gsm8k", "train")
  assert str(error.value) == f"{path}:2: field 'answer' is missing{SKIP}"


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, caplog):
  path = tmp_path / "gsm8k" / "train.jsonl"
  write_lines(path, BAD_LINES)
  config = local(tmp_path, bad_rows="skip")
  with caplog.at_level(logging.WARNING):
    rows = load_rows(config, "gsm8k", "train")
  assert [row.origin for row in rows] == [f"{path}:1", f"{path}:4"]
  (record,) = caplog.records
  assert record.getMessage().startswith(
    f"gsm8k train: skipped 2 bad rows, the first is {path}:2: "
  )


def test_an_empty_task_is_an_error(tmp_path):
  path = tmp_path / "gsm8k" / "train.jsonl"
  write_lines(path, [])
  with pytest.raises(InputError, match="gsm8k train has no usable row"):
    load_rows(local(tmp_path), "gsm8k", "train")
  write_lines(path, [{"question": "q"}])
  with pytest.raises(InputError, match="gsm8k train has no usable row"):
    load_rows(local(tmp_path, bad_rows="skip"), "gsm8k", "train")


def test_missing_folders_and_files_name_the_nearest(tmp_path):
  write_lines(tmp_path / "data" / "gsm8k_" / "tran.jsonl", [gsm8k(1)])
  with pytest.raises(InputError, match=r"'dta' .*did you mean 'data'\?"):
    load_rows(local(tmp_path / "dta"), "gsm8k", "train")
  with pytest.raises(InputError, match=r"'gsm8k' .*did you mean 'gsm8k_'\?"):
    load_rows(local(tmp_path / "data"), "gsm8k", "train")
  (tmp_path / "data" / "gsm8k_").rename(tmp_path / "data" / "gsm8k")
  with pytest.raises(
    InputError, match=r"'train\.jsonl' .*did you mean 'tran\.jsonl'\?"
  ):
    load_rows(local(tmp_path / "data"), "gsm8k", "train")
  with pytest.raises(InputError, match=r"data\.dir: 'b' does not exist"):
    load_rows(local(tmp_path / "a" / "b"), "gsm8k", "train")


def test_hub_asks_for_the_right_data_set_and_split(monkeypatch):
  asked = []

  def load_dataset(*args, split):
    asked.append((*args, split))
    return [gsm8k(1)] if "gsm8k" in args[0] else []

  fake = types.ModuleType("datasets")
  fake.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, "datasets", fake)
  config = DataConfig(source="hub")
  (row,) = load_rows(config, "gsm8k", "train")
  assert row.origin == "openai/gsm8k:train:0"
  assert row.answer == " #### 2"
  for task in TASKS[1:]:
    with pytest.raises(InputError, match=f"'hub': {task} test has no usable"):
      load_rows(config, task, "test")
  assert asked == [
    ("openai/gsm8k", "main", "train"),
    ("allenai/ai2_arc", "ARC-Challenge", "test"),
    ("sahil2801/CodeAlpaca-20k", "train[-2000:]"),
    ("rajpurkar/squad", "validation"),
  ]


def test_hub_failures_are_one_line(monkeypatch):
  def load_dataset(*args, split):
    raise ConnectionError("no route\nto the host")

  fake = types.ModuleType("datasets")
  fake.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, "datasets", fake)
  with pytest.raises(InputError) as error:
    load_rows(DataConfig(source="hub"), "squad", "train")
  assert str(error.value) == (
    "data.source 'hub': rajpurkar/squad cannot be loaded: no route"
  )
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(InputError, match="'hub': needs the package datasets: "):
    load_rows(DataConfig(source="hub"), "squad", "train")


def test_tfds_rows_are_turned_into_our_schema(monkeypatch):
  asked = []
  rows = {
    "ai2_arc/ARC-Challenge": {
      "id": b"q",
      "question": b"Which is a metal?",
      "choices": {
        "text": np.array([b"oak", b"iron"], object),
        "label": np.array([0, 1]),
      },
      "answerKey": np.int64(1),
    },
    "squad/v1.1": {
      "context": "Ein Käse.".encode(),
      "question": b"Was?",
      "answers": {"text": ["Käse".encode()], "answer_start": [np.int32(4)]},
    },
  }

  def data_source(name, split, data_dir, builder_kwargs):
    asked.append((name, split, data_dir, builder_kwargs["file_format"]))
    return [rows[name]]

  fake = types.ModuleType("tensorflow_datasets")
  fake.data_source = data_source
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets.text", fake)
  config = DataConfig(source="tfds", dir="prepared")
  (arc,) = load_rows(config, "arc_challenge", "train")
  (squad,) = load_rows(config, "squad", "test")
  assert arc.prompt == (
    "Question: Which is a metal?\nChoices: A. oak\nB. iron\n\nAnswer:"
  )
  assert arc.answer == " B"
  assert squad.prompt.startswith("Context:\nEin Käse.")
  assert squad.answer == " Käse"
  assert asked == [
    ("ai2_arc/ARC-Challenge", "train", "prepared", "array_record"),
    ("squad/v1.1", "validation", "prepared", "array_record"),
  ]
  with pytest.raises(InputError, match=r"codealpaca is not in .*use 'hub'"):
    load_rows(config, "codealpaca", "train")


@pytest.mark.realdata
def test_counts_of_the_real_rows(data_dir):
  config = DataConfig(
    source="local",
    dir=str(data_dir),
    eval_rows=10**6,
    bad_rows="skip",
  )
  counts = {
    task: tuple(len(load_rows(config, task, s)) for s in ("train", "test"))
    for task in TASKS
  }
  assert counts == {
    "gsm8k": (7473, 659),
    "arc_challenge": (1056, 586),
    "codealpaca": (1699, 316),  # one empty output each is left out
    "squad": (924, 266),
  }


def test_a_folder_in_place_of_a_file_of_rows_is_a_line(tmp_path):
  for task, name in (("gsm8k", "train.jsonl"), ("squad", "train.json")):
    path = tmp_path / task / name
    path.mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
      load_rows(local(tmp_path), task, "train")


@pytest.mark.parametrize("bad", [b"caf\xe9", rb"\ud83d", rb"\udc00 x"])
@pytest.mark.parametrize("task", ["gsm8k", "codealpaca"])
def test_what_is_no_utf8_breaks_its_own_row_alone(tmp_path, task, bad):
  if task == "gsm8k":
    name, form = "train.jsonl", b'{"question": "%s", "answer": "1"}'
    joined, place = b"\n".join, "2"
  else:
    name, form = "train.json", b'{"instruction": "%s", "output": "1"}'
    joined, place = lambda rows: b"[" + b",".join(rows) + b"]", "[1]"
  path = tmp_path / task / name
  path.parent.mkdir()
  path.write_bytes(joined([form % b"a", form % bad, form % b"caf\xc3\xa9"]))
  with pytest.raises(InputError) as error:
    load_rows(local(tmp_path), task, "train")
  told = str(error.value)
  assert told.startswith(f"{path}:{place}: field ") and told.endswith(SKIP)
  assert "no text in UTF-8" in told and told.isascii()
  rows = load_rows(local(tmp_path, bad_rows="skip"), task, "train")
  assert len(rows) == 2 and "caf\u00e9" in rows[1].text
