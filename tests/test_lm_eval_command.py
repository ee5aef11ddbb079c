"""What lm-eval's command and tasks get from our model, beside `hf`."""

import dataclasses
import functools
import json
import logging
import sys

from lm_eval import evaluator, simple_evaluate
from lm_eval.api.registry import get_model
import lm_eval.tasks
from lm_eval.tasks import TaskManager
import numpy as np
import pytest
from saved_llama import EXPERTS, save_adapters, save_bank_of, save_llama
import yaml

from tokenlora_jax import lm_eval as command
from tokenlora_jax.commands import cli
from tokenlora_jax.commands.lm_eval import TokenLoraLM
from tokenlora_jax.commands.lm_eval_args import (
  parse_gen_kwargs,
  parse_model_args,
)
from tokenlora_jax.config import InputError, RouterConfig
from tokenlora_jax.formats.load import load_base

ROWS = [
  {"question": f"Is {n} a {word}?", "choices": choices, "answer": n % 2}
  for n, (word, choices) in enumerate(
    [
      ("bird", ["yes", "no"]),
      ("stone", ["A", "B", "C"]),
      ("number", ["certainly", "never"]),
      ("place", ["left", "right"]),
      ("time", ["A", "B", "C"]),
      ("word", ["long", "short", "neither"]),
    ]
  )
]
CHOICE = {
  "output_type": "multiple_choice",
  "doc_to_choice": "{{choices}}",
  "doc_to_target": "{{answer}}",
  "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXT = {
  "output_type": "generate_until",
  "doc_to_target": "{{choices[answer]}}",
  "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
  "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
  "output_type": "loglikelihood_rolling",
  "doc_to_text": "",
  "doc_to_target": "{{question}}",
  "metric_list": [{"metric": "byte_perplexity"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
  return save_adapters(folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def bank(folder, adapters, tmp_path_factory):
  return save_bank_of(
    folder, adapters, tmp_path_factory.mktemp("runs") / "bank"
  )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  """A folder of tasks that need no network."""
  folder = tmp_path_factory.mktemp("tasks")
  lines = "".join(json.dumps(row) + "\n" for row in ROWS)
  (folder / "rows.jsonl").write_text(lines)
  common = {
    "dataset_path": "json",
    "dataset_kwargs": {
      "data_files": {"test": str(folder / "rows.jsonl")},
      "cache_dir": str(folder / "cache"),
    },
    "test_split": "test",
    "doc_to_text": "{{question}}",
  }
  for name, own in {"choice": CHOICE, "text": TEXT, "rolling": ROLLING}.items():
    task = {"task": f"toy_{name}"} | common | own
    (folder / f"toy_{name}.yaml").write_text(yaml.safe_dump(task))
  return folder


@pytest.fixture
def evaluate(tasks, monkeypatch):
  """Runs a model on the tasks, as lm-eval's command does."""
  # It asks the machine for all that is installed, which takes long.
  monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
  manager = TaskManager(include_path=str(tasks), include_defaults=False)

  def run(model, args):
    return simple_evaluate(
      model, args, ["toy_choice", "toy_text", "toy_rolling"],
      batch_size=2, task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip

  return run


def test_tasks_come_out_as_with_hf(evaluate, folder, adapters, bank):
  mine = evaluate(
    "tokenlora_jax",
    {
      "base": folder, "dtype": "float32", "bank": bank, "router": "one-hot",
      "expert": "beta",
    },
  )  # fmt: skip
  theirs = evaluate(
    "hf",
    f"pretrained={folder},dtype=float32,device=cpu,peft={adapters['beta']}",
  )
  for task, results in theirs["results"].items():
    for name, value in results.items():
      if isinstance(value, float):
        assert mine["results"][task][name] == pytest.approx(value, rel=1e-5)
  assert mine["results"]["toy_choice"].keys() >= {"acc,none", "acc_norm,none"}
  for task in theirs["samples"]:
    for left, right in zip(
      mine["samples"][task], theirs["samples"][task], strict=True
    ):
      left, right = np.array(left["resps"]), np.array(right["resps"])
      if task == "toy_text":
        assert left.tolist() == right.tolist()
      else:
        np.testing.assert_allclose(
          left.astype(float), right.astype(float), atol=1e-3
        )
  about = mine["config"]
  assert about["model_fingerprint"] == load_base(folder).fingerprint
  assert about["model_base"]["path"] == folder
  assert about["model_bank"] == bank
  assert about["model_router"]["name"] == "one-hot"
  assert about["model_experts"] == list(EXPERTS)
  assert about["model_batch_size"] == about["batch_size"] == 2
  assert about["model_max_length"] == 32
  json.dumps(about)


def test_the_base_alone_names_no_router(folder):
  about = TokenLoraLM(base=folder).get_model_info()
  assert about["model_bank"] == ""
  assert not [name for name in about if "router" in name or "rule" in name]


def test_settings_beat_the_flags_of_the_command(folder):
  cls = get_model("tokenlora_jax")
  assert cls is TokenLoraLM
  flags = {"batch_size": "3", "max_batch_size": None, "device": "cuda:0"}
  text = f"base={folder},dtype=float32,max_length=20,add_bos_token=False"
  model = cls.create_from_arg_string(text, flags)
  about = model.get_model_info()
  assert (about["model_batch_size"], model.max_length) == (3, 20)
  assert model.tok_encode("hi") == [108, 109]
  model = cls.create_from_arg_obj({"base": folder, "batch_size": 5}, flags)
  assert model.get_model_info()["model_batch_size"] == 5


def test_every_setting_of_a_router_can_be_said():
  said = {
    "name": "fixed", "encoder": "hidden", "minilm": "folder", "sharpen": 2,
    "expert": 7, "gates": [0.5, 1], "top_k": 2, "temperature": 0.5,
    "threshold": 0.25, "smoothing": 0.5, "window": "end", "prior": "sum",
    "evidence": "all", "share": 0.125, "measure": "entropy", "rank_share": 0.5,
  }  # fmt: skip
  args = parse_model_args(
    {"base": "x", "bank": "y", "quantize": "none", "max_length": None}
    | {"router" if n == "name" else n: value for n, value in said.items()}
  )
  assert args.router == RouterConfig(
    **said | {"expert": "7", "gates": (0.5, 1.0)}
  )
  fields = {field.name for field in dataclasses.fields(RouterConfig)}
  # What training and fitting alone read.
  assert fields - said.keys() == {"centroid_rows", "clusters"}


@pytest.mark.parametrize(
  ("given", "told"),
  [
    ({}, "model_args base: None is not allowed; want the path of a base"),
    ({"bse": "x"}, "model_args: 'bse' is not one of base, .*mean 'base'"),
    ({"pretrained": "x"}, "model_args: 'pretrained' is not one of base, "),
    ({"device": "cuda"}, "model_args: 'device' is not one of base, "),
    ({"router": "uniform"}, "router: 'uniform' is not .* want a bank with it"),
    ({"expert": "a", "bank": "none"}, "expert: 'a' is not .*; want a bank"),
    ({"batch_size": "auto"}, "batch_size: 'auto' is not .* a whole number"),
    ({"batch_size": 0}, "batch_size: 0 is not allowed; want 1 or more"),
    ({"batch_size": True}, "batch_size: True is not allowed"),
    ({"refresh_every": 1.5}, "refresh_every: 1.5 is not allowed"),
    ({"refresh_every": -1}, "refresh_every: -1 is not .* want 0 or more"),
    ({"rule": "exakt"}, "rule: 'exakt' is not one of .*mean 'exact'"),
    ({"dtype": "float16"}, "base.dtype: 'float16' is not one of float32"),
    ({"quantize": "int4"}, "base.quantize: 'int4' is not one of"),
    ({"bank": "x", "sharpen": "high"}, "sharpen: 'high' is not .* a number"),
    ({"bank": "x", "gates": "[0.5"}, r"gates: '\[0.5' is not .* numbers"),
    ({"bank": True}, "bank: True is not allowed; want a text"),
    ({"same_base": 1}, "same_base: 1 is not .* true or false"),
    ({"add_bos_token": "yes"}, "add_bos_token: 'yes' is not .* true or false"),
    ({"max_length": 4097}, "max_length: 4097 is not .* 2 to the base's 32"),
    ({"max_length": 1}, "max_length: 1 is not allowed"),
    ({"bank": "nowhere"}, "nowhere: holds no bank.json"),
  ],
)
def test_bad_settings_are_one_line(folder, given, told):
  if given and "bse" not in given:
    given = {"base": folder} | given
  with pytest.raises(InputError, match=told) as caught:
    TokenLoraLM(**given)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("given", "told"),
  [
    ({"num_beams": 4}, "gen_kwargs: 'num_beams' is not one of until, "),
    ({"max_gen_toks": 0}, "max-new-tokens: 0 is not allowed"),
    ({"do_sample": True, "temperature": 1, "top_p": 0}, "top-p: 0 is not"),
  ],
)
def test_bad_requests_are_one_line(given, told):
  with pytest.raises(InputError, match=told):
    parse_gen_kwargs(given, 0)


def test_what_cannot_be_read_whole_is_cut_or_refused(folder, caplog):
  model = TokenLoraLM(base=folder, dtype="float32", max_length=8)
  with caplog.at_level(logging.WARNING):
    cut = model._loglikelihood_tokens([(None, [*range(9, 29)], [5, 6])])
  assert "a context of 20 tokens: only its last 7 fit" in caplog.text
  assert cut == model._loglikelihood_tokens([(None, [*range(22, 29)], [5, 6])])
  for answer in ([], [5] * 9):
    with pytest.raises(InputError, match=f"{len(answer)} tokens' is not"):
      model._loglikelihood_tokens([(None, [1], answer)])
  with pytest.raises(InputError, match="max_gen_toks: 8 is not allowed"):
    model._decode_config({"until": [], "max_gen_toks": 8})


def run_command(monkeypatch, *argv):
  monkeypatch.setattr(sys, "argv", ["lm_eval", *argv])
  monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
  monkeypatch.setattr(cli, "quiet", lambda: None)
  # It reads thousands of files of tasks to know their names.
  few = functools.partial(TaskManager, include_defaults=False)
  monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
  cli.run(command.main)


def test_the_command_evaluates_and_writes(
  folder, bank, tasks, tmp_path, monkeypatch, capsys
):
  args = f"base={folder},dtype=float32,bank={bank},router=fixed"
  run_command(
    monkeypatch, "--model", "tokenlora_jax", "--model_args",
    f"{args},gates=[0.25,0.5],refresh_every=2", "--tasks",
    str(tasks / "toy_choice.yaml"), "--output_path",
    str(tmp_path / "out.json"), "--batch_size", "3",
  )  # fmt: skip
  assert "toy_choice" in capsys.readouterr().out
  (file,) = tmp_path.glob("out*.json")
  about = json.loads(file.read_text())
  assert about["config"]["model_router"]["gates"] == [0.25, 0.5]
  assert about["config"]["model_refresh_every"] == 2
  assert 0 <= about["results"]["toy_choice"]["acc,none"] <= 1


def test_the_command_tells_bad_input_in_one_line(tasks, monkeypatch, capsys):
  with pytest.raises(SystemExit) as stop:
    run_command(
      monkeypatch, "--model", "tokenlora_jax", "--model_args",
      "base=random:tiny,roter=x", "--tasks", str(tasks / "toy_choice.yaml"),
    )  # fmt: skip
  assert stop.value.code == 2
  last = capsys.readouterr().err.strip().splitlines()[-1]
  assert last.startswith("error: model_args: 'roter' is not one of base,")


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, capsys):
  monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(SystemExit) as stop:
    run_command(monkeypatch)
  assert stop.value.code == 2
  told = capsys.readouterr().err
  assert told.startswith("error: lm-eval is not installed; pip install")
