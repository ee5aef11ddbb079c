"""Results, tables and pictures from rows alone."""

import csv
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from tokenlora_jax.evaluation.experiment import plots
from tokenlora_jax.evaluation.experiment.arms import Arm
from tokenlora_jax.evaluation.experiment.results import summarise
from tokenlora_jax.evaluation.experiment.tables import (
  markdown,
  records,
  terminal_tables,
  write_tables,
)

TASKS = ("gsm8k", "squad")
PROMPT = Arm("prompt", "centroid", "exact")
TOKEN = Arm("token:2", "centroid", "exact", "reuse")
LATER = Arm("token:16", "centroid", "exact", "reuse")
# What each arm's loss a token is about, by task.
LEVELS = {
  Arm("base"): (2.0, 4.0),
  Arm("adapter:gsm8k", "", "exact"): (1.0, 3.5),
  Arm("adapter:squad", "", "exact"): (1.8, 1.0),
  TOKEN: (1.1, 1.1),
  LATER: (1.15, 1.2),
  PROMPT: (1.2, 1.3),
}


def make_rows(count=30, scores=False):
  rng = np.random.default_rng(0)
  rows = []
  for arm, levels in LEVELS.items():
    for task, level in zip(TASKS, levels, strict=True):
      for i in range(count):
        tokens = 3 + i % 5
        right = task if i % 10 else TASKS[0]
        rows.append(
          {
            **arm._asdict(),
            "task": task,
            "row": f"{task}:{i}",
            "loss": tokens * (level + float(rng.normal(0, 0.1))),
            "tokens": tokens,
            "seconds": 0.5,
            "lead": "" if arm == Arm("base") else right,
            "gates": {}
            if arm == Arm("base")
            else {e: 0.75 if e == right else 0.25 for e in TASKS},
            "scores": {f"{task}_a": float(i % 2), f"{task}_b": 1.0}
            if scores
            else {},
            "made": 6,
            "made_seconds": 2.0,
          }
        )
  return rows


@pytest.fixture(scope="module")
def results():
  return summarise(make_rows(), resamples=200)


def by_hand(rows, arm, task):
  some = [r for r in rows if r["task"] == task and r["variant"] == arm.variant]
  return sum(r["loss"] for r in some) / sum(r["tokens"] for r in some)


def test_figures_are_ratios_of_sums_and_differences_of_figures(results):
  rows = make_rows()
  assert results.tasks == {"gsm8k": 30, "squad": 30}
  assert results.singles == {"loss": Arm("adapter:squad", "", "exact")}
  assert results.metrics == ["loss"]
  for arm in LEVELS:
    each = [by_hand(rows, arm, task) for task in TASKS]
    wanted = dict(zip((*TASKS, "average"), (*each, np.mean(each)), strict=True))
    base = [by_hand(rows, Arm("base"), task) for task in TASKS]
    for task, value in wanted.items():
      figure = results.figures[arm, "loss", task]
      assert figure.own.value == pytest.approx(value)
      assert figure.own.low < value < figure.own.high
    figure = results.figures[arm, "loss", "average"]
    assert figure.questions == 60
    assert figure.over_base.value == pytest.approx(
      np.mean(each) - np.mean(base)
    )
  mixed = results.figures[TOKEN, "loss", "average"]
  assert mixed.over_base.excludes_zero and mixed.over_base.high < 0
  # Better than the best adapter on average, and worse where that is at home.
  assert mixed.over_single.excludes_zero and mixed.over_single.high < 0
  at_home = results.figures[TOKEN, "loss", "squad"].over_single
  assert at_home.excludes_zero and at_home.low > 0
  itself = results.figures[results.singles["loss"], "loss", "average"]
  assert itself.over_single == (0, 0, 0)
  assert not itself.over_single.excludes_zero
  assert results.paces[TOKEN].seconds == pytest.approx(60 * 2.5)
  assert results.paces[TOKEN].tokens_per_second == pytest.approx(10)
  assert results.paces[TOKEN].made_per_second == pytest.approx(3)


def test_the_order_of_rows_does_not_matter(results):
  """But for the order of questions, which the draws go by."""
  rows = make_rows()
  by_arm = sorted(rows, key=lambda row: row["variant"])
  assert by_arm != rows
  again = summarise(by_arm, resamples=200)
  for key, figure in results.figures.items():
    assert again.figures[key].own == pytest.approx(figure.own)
  assert (
    again.arms
    == results.arms
    == [
      Arm("base"),
      Arm("adapter:gsm8k", "", "exact"),
      Arm("adapter:squad", "", "exact"),
      PROMPT,
      TOKEN,
      LATER,
    ]
  )


def test_a_cell_that_lacks_rows_has_no_figure():
  rows = make_rows(count=4)
  rows.remove(next(r for r in rows if r["variant"] == "token:2"))
  found = summarise(rows, resamples=20)
  assert (TOKEN, "loss", "gsm8k") not in found.figures
  assert (TOKEN, "loss", "squad") in found.figures
  assert (TOKEN, "loss", "average") not in found.figures
  assert "token:2" in markdown(found)
  # Neither without the base nor without adapters is there a difference.
  few = [r for r in rows if r["variant"] in ("prompt", "adapter:squad")]
  few = [r for r in few if r["variant"] == "prompt" or r["task"] == "squad"]
  found = summarise(few, resamples=20)
  assert found.singles == {}
  figure = found.figures[PROMPT, "loss", "average"]
  assert figure.over_base is None and figure.over_single is None
  assert "average, from base" in markdown(found)


def test_one_question_has_no_interval():
  found = summarise(make_rows(count=1), resamples=20)
  figure = found.figures[TOKEN, "loss", "average"]
  assert math.isnan(figure.own.low)
  assert not figure.over_base.excludes_zero
  assert (
    "[" not in markdown(found).replace("In brackets [", "").split("In br")[0]
  )
  flat = records(found)
  assert flat[0]["low"] is None
  json.dumps(flat, allow_nan=False)


def test_scores_are_averaged_over_tasks_that_have_other_ones():
  found = summarise(make_rows(scores=True), resamples=50)
  assert found.metrics[:2] == ["loss", "score"]
  assert set(found.metrics[2:]) == {
    "gsm8k_a", "gsm8k_b", "squad_a", "squad_b",
  }  # fmt: skip
  for task in (*TASKS, "average"):
    figure = found.figures[TOKEN, "score", task].own
    assert figure.value == pytest.approx(0.75)
    assert figure.low < 0.75 < figure.high
  assert found.figures[TOKEN, "gsm8k_a", "gsm8k"].own.value == 0.5
  assert (TOKEN, "gsm8k_a", "squad") not in found.figures
  assert (TOKEN, "gsm8k_a", "average") not in found.figures
  # Of scores more is better.
  rows = make_rows(scores=True)
  for row in rows:
    if row["variant"] == "adapter:gsm8k":
      row["scores"] = {name: 1.0 for name in row["scores"]}
  found = summarise(rows, resamples=50)
  assert found.singles["score"].variant == "adapter:gsm8k"
  assert found.singles["loss"].variant == "adapter:squad"


def test_tables_hold_the_figures(results, tmp_path):
  console = Console(file=io.StringIO(), width=80)
  for table in terminal_tables(results):
    console.print(table)
  shown = console.file.getvalue()
  text = markdown(results)
  for key, figure in results.figures.items():
    assert f"{figure.own.value:.3f}" in shown, key
    assert f"{figure.own.value:.3f}" in text, key
  # What all share is said once.
  assert "(router centroid, rule exact, cache reuse)" in text
  assert "| token:2 |" in text
  assert "from the best adapter (squad)" in text
  assert "…" not in shown
  # Nor where there is little room: names and figures stay whole.
  rows = make_rows(count=4)
  for row in list(rows):
    rows += [{**row, "task": task} for task in ("arc_challenge", "codealpaca")]
    if row["variant"] == "adapter:squad":
      rows += [
        {**row, "variant": "adapter:arc_challenge", "task": task}
        for task in (*TASKS, "arc_challenge", "codealpaca")
      ]
  wide = summarise(rows, resamples=20)
  console = Console(file=io.StringIO(), width=80)
  for table in terminal_tables(wide):
    console.print(table)
  narrow = console.file.getvalue()
  assert "…" not in narrow and "adapter:arc_challenge" in narrow
  for figure in wide.figures.values():
    assert f" {figure.own.value:.3f} " in narrow
  write_tables(results, tmp_path)
  assert (tmp_path / "table.md").read_text() == text
  flat = records(results)
  about = json.loads((tmp_path / "table.json").read_text())
  assert about["figures"] == flat
  assert about["best_single"] == {"loss": "adapter:squad"}
  lines = list(
    csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
  )
  assert len(lines) == len(flat) == len(LEVELS) * 3
  for line, record in zip(lines, flat, strict=True):
    assert float(line["value"]) == record["value"]
    assert line["over_base_excludes_0"] == str(record["over_base_excludes_0"])


def test_gates_and_confusion_by_hand():
  routed = plots.gates_by_router(make_rows(count=20))
  assert list(routed) == [TOKEN]
  tasks, experts, shares = plots.confusion(routed[TOKEN])
  assert tuple(tasks) == tuple(experts) == TASKS
  np.testing.assert_allclose(shares, [[1, 0], [0.1, 0.9]])
  _, _, gates = plots.mean_gates(routed[TOKEN])
  np.testing.assert_allclose(gates, [[0.75, 0.25], [0.3, 0.7]])


def test_pictures_show_what_the_rows_say(results, tmp_path):
  rows = make_rows(scores=True)
  plots.write_plots(rows, summarise(rows, resamples=20), tmp_path)
  assert sorted(file.name for file in tmp_path.iterdir()) == [
    "confusion.png", "gates.png", "quality.png", "quality_score.png",
  ]  # fmt: skip
  figure = plots.draw_quality(results, "loss")
  average, *_ = figure.axes
  assert [axes.get_title() for axes in figure.axes] == ["average", *TASKS]
  ticks = [label.get_text() for label in average.get_xticklabels()]
  assert ticks == ["2", "16", "once"]
  (line,) = [x for x in average.lines if x.get_marker() == "o"]
  wanted = [
    results.figures[arm, "loss", "average"].own.value
    for arm in (TOKEN, LATER, PROMPT)
  ]
  np.testing.assert_allclose(line.get_ydata(), wanted)


def test_there_is_nothing_to_draw_of_a_base_alone(tmp_path):
  rows = [r for r in make_rows(count=3) if r["variant"] == "base"]
  plots.write_plots(rows, summarise(rows, resamples=5), tmp_path)
  assert list(tmp_path.iterdir()) == []
