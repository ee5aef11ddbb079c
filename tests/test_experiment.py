"""The experiment: its arms, its rows, and going on after it was stopped."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from tokenlora_jax.config import DataConfig, InputError, RouterConfig
from tokenlora_jax.data.examples import tokenize
from tokenlora_jax.data.rows import Row
from tokenlora_jax.evaluation.evaluator import Evaluator
from tokenlora_jax.evaluation.experiment.answers import Judge
from tokenlora_jax.evaluation.experiment.arms import (
  Arm,
  Routers,
  make_arms,
  own_experts,
  router_config,
)
from tokenlora_jax.evaluation.experiment.questions import Question
from tokenlora_jax.evaluation.experiment.rows import (
  RowLog,
  open_rows,
  read_rows,
)
from tokenlora_jax.evaluation.experiment.run import run_cells
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.lora import random_adapters

ABOUT = {
  "base": "b",
  "router": {"gates": (1, 2)},
  "rows": {"e0": "x", "e1": "y"},
}


@pytest.fixture(scope="module")
def base():
  return load_base("random:tiny", "float32")


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=2, rank=4)


@pytest.fixture(scope="module")
def routers(base):
  table = np.random.default_rng(0).normal(size=(2, base.config.width))
  router = make_router("centroid", centroids=table, encoder="hidden")
  return Routers({"centroid": router})


@pytest.fixture(scope="module")
def tests():
  tokenizer = load_tokenizer("random:tiny")
  rows = {
    task: [Row(f"What is {task} {i}?", " It is." * (i % 3 + 1), f"{task}:{i}")
           for i in range(12)]
    for task in ("e0", "e1")
  }  # fmt: skip
  return {
    task: [
      Question(row.origin, tokenize(row, tokenizer, DataConfig(length=64)))
      for row in some
    ]
    for task, some in rows.items()
  }


@pytest.fixture(scope="module")
def evaluator(base, adapters):
  return Evaluator(base, adapters, load_tokenizer("random:tiny"))


def labels(arms):
  return [arm.label for arm in arms]


def test_arms_are_those_that_make_sense(adapters, routers):
  fixed = make_router("fixed", gates=[0.5, 0.5])
  routers = Routers({**routers.named, "fixed": fixed})
  arms, skipped = make_arms(
    ["base", "own", "adapter:e1", "sum", "top1", "token:02", "token:2"],
    routers,
    ["exact", "peft040", "probabilities"],
    ["reuse", "recompute"],
    adapters,
  )
  assert labels(arms) == [
    "base",
    "own exact",
    "own peft040",
    "adapter:e1 exact",
    "adapter:e1 peft040",
    "sum exact",
    "sum peft040",
    "top1 centroid exact",
    "top1 centroid peft040",
    "top1 centroid probabilities",
    "top1 fixed exact",
    "top1 fixed peft040",
    "top1 fixed probabilities",
    "token:2 centroid exact reuse",
    "token:2 centroid exact recompute",
    "token:2 centroid peft040 reuse",
    "token:2 centroid peft040 recompute",
    "token:2 centroid probabilities reuse",
  ]
  assert (
    "token:2 centroid probabilities recompute is left out: each expert reads"
    " alone, the same as reuse"
  ) in skipped
  assert any("token:2 fixed exact reuse is left out" in s for s in skipped)
  assert any("sum probabilities is left out" in s for s in skipped)


def test_what_does_not_fit_together_is_left_out_and_said(base, routers):
  adapters = random_adapters(base, experts=2, rank=4)
  only_q = tuple({"q": layer["q"]} for layer in adapters.layers)
  adapters = dataclasses.replace(adapters, layers=only_q)
  arms, skipped = make_arms(
    ["prompt", "token:1"], routers, ["exact"], ["reuse", "remix"], adapters
  )
  assert labels(arms) == [
    "prompt centroid exact", "token:1 centroid exact reuse",
  ]  # fmt: skip
  (line,) = skipped
  assert line.startswith(
    "token:1 centroid exact remix is left out: decode.cache"
  )
  assert "no adapter touches v" in line


@pytest.mark.parametrize(
  ("variant", "told"),
  [
    ("unifrom", "did you mean 'uniform'"),
    ("token:0", "want token:K"),
    ("token:two", "want token:K"),
    ("token", "is not one of"),
    ("adapter:e7", "'e7' is not one of e0, e1"),
    ("adapter:NAME", "'NAME' is not one of e0, e1"),
    ("token:K", "want token:K"),
    ("", "is not one of"),
  ],
)
def test_unknown_variants_are_one_line(adapters, routers, variant, told):
  with pytest.raises(InputError, match=told):
    make_arms([variant], routers, ["exact"], ["reuse"], adapters)


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("centroid:shapren=3", "'shapren' is not one of .*mean 'sharpen'"),
    ("centroid:sharpen=much", "sharpen 'much' is not allowed; want a number"),
    ("centroid:top-k=1.5", r"top_k '1\.5' is not allowed"),
    ("centroid:sharpen", "sharpen '' is not allowed"),
    ("centroid:encoder=bert", r"router\.encoder: 'bert'"),
    ("fixed:gates=1", "'gates' is not one of"),
  ],
)
def test_bad_settings_of_a_router_are_one_line(text, told):
  with pytest.raises(InputError, match=told) as caught:
    router_config(text, RouterConfig())
  assert "\n" not in str(caught.value)


ALONE = Arm("adapter:e1", "", "exact")
ARMS = [
  Arm("base"),
  Arm("own", "", "exact"),
  Arm("token:2", "centroid", "exact", "reuse"),
]


def run(tests, routers, evaluator, log):
  console = Console(file=io.StringIO(), width=200)
  run_cells(ARMS, tests, routers, evaluator, ("e0", "e1"), None, log, console)
  return console.file.getvalue()


@pytest.fixture(scope="module")
def whole(tests, routers, evaluator):
  """The rows of a run that was left alone."""
  log = RowLog()
  run(tests, routers, evaluator, log)
  return log.rows


def test_rows_say_what_became_of_each_question(whole, tests):
  assert len(whole) == len(ARMS) * 24
  for row in whole:
    assert np.isfinite(row["loss"])
    if row["variant"] == "base":
      assert row["gates"] == {}
    else:
      assert sum(row["gates"].values()) == pytest.approx(1, abs=1e-4)
    if row["variant"] == "own":
      assert row["lead"] == row["task"]
      assert row["gates"][row["task"]] == 1


def comparable(rows):
  keys = ("variant", "task", "row", "tokens", "lead")
  return {tuple(row[key] for key in keys): row["loss"] for row in rows}


def test_arms_that_ask_one_router_ask_the_very_same(routers):
  """Since an evaluator remembers what that one said."""
  for kind in ("top1", "prompt"):
    first, second = (
      routers.variant(Arm(kind, "centroid", rule), "e0").router
      for rule in ("exact", "probabilities")
    )
    assert first is second
  own = routers.variant(Arm("own", "", "exact"), "e1")
  assert own.router is routers.variant(ALONE, "e0").router


def test_a_tasks_own_expert_may_have_another_name(routers):
  own = own_experts(["gsm8k", "e1"], {"e0": "gsm8k", "e1": "", "x": "e1"})
  assert own == {"gsm8k": "e0", "e1": "e1"}
  named = Routers(routers.named, own)
  asked = named.variant(Arm("own", "", "exact"), "gsm8k").router
  assert asked is named.variant(ALONE._replace(variant="adapter:e0"), "").router
  with pytest.raises(
    InputError, match=r"^--variants own: a, b are of task 't'"
  ):
    own_experts(["t"], {"a": "t", "b": "t"})
  with pytest.raises(InputError, match=r"'gsm9k' is not one of gsm8k.*did you"):
    own_experts(["gsm9k"], {"gsm8k": ""})


class Stop(Exception):
  pass


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_was_stopped_goes_on(
  tmp_path, tests, routers, evaluator, whole, after, monkeypatch
):
  """Whatever a batch left on the disk, no row is lost and none is twice."""
  batches = 0
  add = RowLog.add

  def add_until(self, rows):
    nonlocal batches
    batches += 1
    if batches > after:
      # The process dies in the middle of writing a line.
      self._file.write(json.dumps(rows[0])[:40])
      self._file.flush()
      raise Stop
    add(self, rows)

  monkeypatch.setattr(RowLog, "add", add_until)
  with pytest.raises(Stop), open_rows(tmp_path, ABOUT) as log:
    run(tests, routers, evaluator, log)
  monkeypatch.undo()
  left = (tmp_path / "rows.jsonl").read_bytes()
  assert not left.endswith(b"\n")
  with open_rows(tmp_path, ABOUT) as log:
    before = len(log.rows)
    assert 0 < before < len(whole)
    run(tests, routers, evaluator, log)
  rows = read_rows(tmp_path / "rows.jsonl")
  assert len(rows) == len(whole)
  found, expected = comparable(rows), comparable(whole)
  assert found.keys() == expected.keys()
  for key, loss in expected.items():
    assert found[key] == pytest.approx(loss, abs=1e-4)
  # Nothing is left to do.
  with open_rows(tmp_path, ABOUT) as log:
    assert run(tests, routers, evaluator, log) == ""


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path):
  told = "^stopped; the same command resumes where it stopped$"
  with (
    pytest.raises(KeyboardInterrupt, match=told),
    open_rows(tmp_path, ABOUT),
  ):
    raise KeyboardInterrupt


def refused(folder, about, told):
  with pytest.raises(InputError, match=told), open_rows(folder, about):
    pass


def test_another_experiment_is_refused(tmp_path):
  with open_rows(tmp_path, ABOUT):
    refused(tmp_path, ABOUT, r"process \d+ on .* evaluates in it")
  for change, told in (
    ({"base": "c"}, r"holds an experiment with base 'b' \(now 'c'\)"),
    ({"rows": {"e0": "z"}}, r"with rows\.e0 'x' \(now 'z'\)"),
    ({"more": 1}, r"with more None \(now 1\)"),
    ({"generate": {"seed": 0}}, "holds an experiment with no --generate;"),
  ):
    refused(tmp_path, {**ABOUT, **change}, told)
  # More tasks may come.
  with open_rows(tmp_path, {**ABOUT, "rows": {"e2": "z"}}):
    pass
  about = json.loads((tmp_path / "experiment.json").read_text())
  assert about["rows"] == {"e0": "x", "e1": "y", "e2": "z"}


def test_damaged_files_are_one_line(tmp_path):
  rows, about = tmp_path / "rows.jsonl", tmp_path / "experiment.json"
  rows.write_text("{}\n")
  refused(tmp_path, ABOUT, r"but no experiment\.json")
  about.write_text("[]")
  refused(tmp_path, ABOUT, "not an experiment's")
  about.unlink()
  rows.unlink()
  with open_rows(tmp_path, ABOUT):
    pass
  rows.write_text('{"variant": 3}\n')
  refused(tmp_path, ABOUT, r"rows\.jsonl:1: is no row")


class Parrot(Judge):
  """A judge that finds all answers alike."""

  def __init__(self):
    """It needs no model."""

  def judge(self, task, variant, questions):
    return [
      {"scores": {f"{task}_right": 0.5}, "text": one.name} for one in questions
    ]


def test_what_a_judge_says_is_kept(tests, routers, evaluator, tmp_path):
  few = {task: some[:3] for task, some in tests.items()}
  console = Console(file=io.StringIO())
  with open_rows(tmp_path, ABOUT) as log:
    run_cells(
      ARMS[:1], few, routers, evaluator, ("e0", "e1"), Parrot(), log, console
    )
  rows = read_rows(tmp_path / "rows.jsonl")
  assert len(rows) == 6
  for row in rows:
    assert row["text"] == row["row"]
    assert row["scores"] == {f"{row['task']}_right": 0.5}
