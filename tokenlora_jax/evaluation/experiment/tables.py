"""Tables of an experiment's results: terminal, Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tokenlora_jax.evaluation.experiment.arms import Arm
from tokenlora_jax.evaluation.experiment.results import (
  AVERAGE,
  LOSS,
  SCORE,
  Figure,
  Results,
)
from tokenlora_jax.evaluation.statistics import LEVEL, Estimate
from tokenlora_jax.files import write_atomically

NOTE = (
  f"With each figure its {LEVEL:.0%} bootstrap interval over questions."
  " Differences are paired; * where the interval excludes 0."
)


@dataclasses.dataclass(frozen=True)
class View:
  """One table: one line per arm, one column per metric and task.

  Attributes:
    title: the table's title.
    columns: {(metric, task): heading}.
    last: the column whose differences are shown; None shows none.
  """

  title: str
  columns: dict[tuple[str, str], str]
  last: tuple[str, str] | None


def views(results: Results) -> Iterator[View]:
  """Yields the tables of results: losses, scores, each task's own scores.

  Args:
    results: an experiment's figures.
  """
  found = dict.fromkeys(key[1:] for key in results.figures)
  for metric, title in (
    (LOSS, "held-out loss, nats an answer token"),
    (SCORE, "score, the mean of a row's scores"),
  ):
    tasks = [task for task in results.tasks if (metric, task) in found]
    # With one task the average adds nothing.
    if len(tasks) > 1 and (metric, AVERAGE) in found:
      tasks.append(AVERAGE)
    if tasks:
      columns = {(metric, task): task for task in tasks}
      yield View(title, columns, (metric, tasks[-1]))
  for task in results.tasks:
    columns = {
      (metric, of): metric
      for metric, of in found
      if of == task and metric not in (LOSS, SCORE)
    }
    if columns:
      yield View(f"scores of {task}", columns, None)


def _names(results: Results) -> tuple[str, dict[Arm, str]]:
  """Returns (settings that all arms share, {arm: its name without them})."""
  shared = {}
  for field in ("router", "rule", "cache"):
    used = {getattr(arm, field) for arm in results.arms} - {""}
    if len(used) == 1:
      shared[field] = used.pop()
  names = {
    arm: arm._replace(**dict.fromkeys(shared, "")).label for arm in results.arms
  }
  told = ", ".join(f"{field} {value}" for field, value in shared.items())
  return f" ({told})" if told else "", names


def _best(results: Results, metric: str, task: str) -> Arm:
  values = {
    arm: results.figures[arm, metric, task].own.value
    for arm in results.arms
    if (arm, metric, task) in results.figures
  }
  return (min if metric == LOSS else max)(values, key=values.get)


def _lines(
  results: Results, view: View
) -> Iterator[tuple[Arm, list[Figure | None]]]:
  """Yields each arm with a figure in a table, and its figures."""
  for arm in results.arms:
    found = [results.figures.get((arm, *column)) for column in view.columns]
    if any(found):
      yield arm, found


def _interval(one: Estimate) -> str:
  """Returns an interval as "0.900 1.100", or "" without one."""
  return "" if math.isnan(one.low) else f"{one.low:.3f} {one.high:.3f}"


def _differences(figure: Figure, single: Arm | None) -> list[tuple[str, str]]:
  """Returns (difference, interval) to the base and to the best adapter."""
  cells = []
  for one, other in (
    (figure.over_base, Arm("base")),
    *([(figure.over_single, single)] if single else []),
  ):
    if one is None or figure.arm == other:
      cells.append(("", ""))
    else:
      star = " *" if one.excludes_zero else ""
      cells.append((f"{one.value:+.3f}{star}", _interval(one)))
  return cells


def _pace(results: Results, arm: Arm, metric: str) -> tuple[str, str]:
  """Returns the seconds, and the tokens per second, as text."""
  pace = results.paces[arm]
  rate = pace.tokens_per_second if metric == LOSS else pace.made_per_second
  return f"{pace.seconds:.0f}", f"{rate:.0f}"


def _expert(single: Arm) -> str:
  return single.variant.partition(":")[2]


def terminal_tables(results: Results) -> Iterator[Table]:
  """Yields tables for a terminal of at least 80 columns.

  Args:
    results: an experiment's figures.
  """
  told, names = _names(results)
  for view in views(results):
    table = _table(f"{view.title}{told}")
    for (_, task), head in view.columns.items():
      rows = results.tasks.get(task)
      head = head if rows is None else f"{head}\n({rows} rows)"
      table.add_column(head, justify="right", overflow="fold")
    best = [_best(results, *column) for column in view.columns]
    for arm, found in _lines(results, view):
      cells = []
      for figure, leader in zip(found, best, strict=True):
        style = "bold" if leader == arm else ""
        cells.append(
          _two_lines(f"{figure.own.value:.3f}", _interval(figure.own), style)
          if figure
          else ""
        )
      table.add_row(Text(names[arm]), *cells)
    yield table
    if view.last:
      yield _difference_table(results, *view.last, names)


def _table(title: str) -> Table:
  """Returns an empty table that never cuts the names of arms."""
  table = Table(title=title)
  table.add_column("mixing", no_wrap=True)
  return table


def _two_lines(value: str, interval: str, style: str = "") -> Text:
  text = Text(value, style)
  return text.append(f"\n{interval}", "not bold dim") if interval else text


def _difference_table(
  results: Results, metric: str, task: str, names: dict[Arm, str]
) -> Table:
  """Returns a table of paired differences, and of each arm's time."""
  single = results.singles.get(metric)
  title = f"{metric}, {task}: differences, and the time it took"
  table = _table(title)
  table.add_column("from base", justify="right")
  if single:
    head = f"from the best\nadapter, {_expert(single)}"
    table.add_column(head, justify="right")
  table.add_column("seconds", justify="right")
  table.add_column("tokens/s", justify="right")
  for arm in results.arms:
    if figure := results.figures.get((arm, metric, task)):
      cells = [_two_lines(*cell) for cell in _differences(figure, single)]
      took = _pace(results, arm, metric)
      table.add_row(Text(names[arm]), *cells, *took)
  return table


def markdown(results: Results) -> str:
  """Returns all tables as Markdown.

  Args:
    results: an experiment's figures.
  """
  told, names = _names(results)
  lines = []
  for view in views(results):
    heads = [
      f"{head} ({results.tasks[task]})" if task in results.tasks else head
      for (_, task), head in view.columns.items()
    ]
    single = results.singles.get(view.last[0]) if view.last else None
    if view.last:
      heads.append(f"{view.last[1]}, from base")
      if single:
        heads.append(
          f"{view.last[1]}, from the best adapter ({_expert(single)})"
        )
      heads += ["seconds", "tokens/s"]
    lines += [f"## {view.title}{told}", "", _line(["mixing", *heads])]
    lines.append("|---|" + "---:|" * len(heads))
    best = [_best(results, *column) for column in view.columns]
    for arm, found in _lines(results, view):
      cells = [
        _cell(figure, leader == arm)
        for figure, leader in zip(found, best, strict=True)
      ]
      if view.last:
        if last := found[-1]:
          cells += [_one_line(*x) for x in _differences(last, single)]
        else:
          cells += [""] * (2 if single else 1)
        cells += _pace(results, arm, view.last[0])
      lines.append(_line([names[arm], *cells]))
    lines.append("")
  return "\n".join([*lines, NOTE, ""])


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _one_line(value: str, interval: str) -> str:
  return f"{value} [{interval.replace(' ', ', ')}]" if interval else value


def _cell(figure: Figure | None, best: bool) -> str:
  if figure is None:
    return ""
  value = f"{figure.own.value:.3f}"
  return _one_line(f"**{value}**" if best else value, _interval(figure.own))


def records(results: Results) -> list[dict[str, Any]]:
  """Returns all figures as flat records, None for unknown values.

  Args:
    results: an experiment's figures.
  """
  found = []
  for figure in results.figures.values():
    record = {
      **figure.arm._asdict(),
      "metric": figure.metric,
      "task": figure.task,
      "questions": figure.questions,
    }
    for name, one in (
      ("", figure.own),
      ("over_base", figure.over_base),
      ("over_single", figure.over_single),
    ):
      for part in Estimate._fields:
        value = math.nan if one is None else getattr(one, part)
        key = f"{name}_{part}" if name else part
        record[key] = None if math.isnan(value) else value
      if name:
        record[f"{name}_excludes_0"] = one and one.excludes_zero
    found.append(record)
  return found


def write_tables(results: Results, folder: Path) -> None:
  """Writes table.md, table.csv and table.json.

  Args:
    results: an experiment's figures.
    folder: an existing folder.
  """
  flat = records(results)
  write_atomically(folder / "table.md", markdown(results))
  lines = io.StringIO()
  writer = csv.DictWriter(
    lines, list(flat[0]) if flat else [], lineterminator="\n"
  )
  writer.writeheader()
  writer.writerows(flat)
  write_atomically(folder / "table.csv", lines.getvalue())
  about = {
    "tasks": results.tasks,
    "level": LEVEL,
    "best_single": {m: arm.variant for m, arm in results.singles.items()},
    "paces": [
      {**arm._asdict(), **vars(pace)} for arm, pace in results.paces.items()
    ],
    "figures": flat,
  }
  text = json.dumps(about, indent=2, allow_nan=False) + "\n"
  write_atomically(folder / "table.json", text)
