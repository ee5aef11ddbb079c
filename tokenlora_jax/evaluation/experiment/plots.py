"""Plots of an experiment: quality by refresh, gates by task, leading expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
import numpy as np

from tokenlora_jax.evaluation.experiment.arms import Arm
from tokenlora_jax.evaluation.experiment.results import (
  AVERAGE,
  LOSS,
  SCORE,
  Results,
)
from tokenlora_jax.evaluation.experiment.rows import arm_of
from tokenlora_jax.evaluation.statistics import Estimate
from tokenlora_jax.report.colours import colour

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure


def write_plots(
  rows: Sequence[Mapping[str, Any]], results: Results, folder: Path
) -> None:
  """Writes the plots that the rows allow as PNG: quality, gates, confusion.

  Args:
    rows: an experiment's rows.
    results: the figures of these rows.
    folder: an existing folder.
  """
  for metric in (LOSS, SCORE):
    if metric in results.metrics and any(arm.router for arm in results.arms):
      name = "quality" if metric == LOSS else "quality_score"
      _save(draw_quality(results, metric), folder / f"{name}.png")
  routed = gates_by_router(rows)
  if routed:
    _save(draw_gates(routed), folder / "gates.png")
    _save(draw_confusion(routed), folder / "confusion.png")


def _save(figure: Figure, file: Path) -> None:
  figure.savefig(file, dpi=150, bbox_inches="tight")


def _panels(
  count: int, width: float, height: float, across: int = 3
) -> tuple[Figure, list[Axes]]:
  # Imported here, since it takes a second; pyplot would keep all figures.
  from matplotlib.figure import Figure

  columns = min(count, across)
  lines = math.ceil(count / columns)
  figure = Figure((width * columns, height * lines), layout="constrained")
  grid = figure.subplots(lines, columns, squeeze=False).ravel()
  for axes in grid[count:]:
    axes.set_axis_off()
  return figure, list(grid[:count])


# -----------------------------------------------------------------------------
# Quality by refresh.


def draw_quality(results: Results, metric: str) -> Figure:
  """Draws a metric by `refresh_every`, with intervals, one panel per task.

  Args:
    results: an experiment's figures.
    metric: `loss` or `score`.
  """
  tasks = [
    task
    for task in (AVERAGE, *results.tasks)
    if any(key[1:] == (metric, task) for key in results.figures)
  ]
  if len(results.tasks) == 1:
    tasks = [task for task in tasks if task != AVERAGE]
  paces = sorted({arm.pace for arm in results.arms if arm.pace})
  # "Once, at the prompt" stands after the slowest refresh.
  places = {pace: i for i, pace in enumerate([*paces, 0])}
  figure, panels = _panels(len(tasks), 4, 3.2)
  for axes, task in zip(panels, tasks, strict=True):
    known = {
      arm: results.figures[arm, metric, task].own
      for arm in results.arms
      if (arm, metric, task) in results.figures
    }
    _lines_by_refresh(axes, known, places)
    _marks(axes, known, results.singles.get(metric))
    axes.set_title(task)
    axes.set_xticks(list(places.values()), [*map(str, paces), "once"])
    axes.set_xlabel("tokens between two refreshes")
    axes.set_ylabel("loss, nats a token" if metric == LOSS else metric)
  handles = {
    label: handle
    for axes in panels
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  figure.legend(
    handles.values(), handles.keys(), loc="outside lower center", ncols=4,
    frameon=False, fontsize="small",
  )  # fmt: skip
  return figure


def _lines_by_refresh(
  axes: Axes, known: Mapping[Arm, Estimate], places: Mapping[int, int]
) -> None:
  """Draws one line per router, rule and cache, from token:1 to prompt."""
  ways = dict.fromkeys(
    (arm.router, arm.rule, arm.cache)
    for arm in known
    if arm.variant.startswith("token:")
  )
  # Gates computed once, at the prompt, have no cache policy.
  asked = dict.fromkeys(
    (a.router, a.rule, "") for a in known if a.variant == "prompt"
  )
  ways |= {
    way: None for way in asked if not any(w[:2] == way[:2] for w in ways)
  }
  for number, (router, rule, cache) in enumerate(ways):
    points = {
      places[arm.pace]: value
      for arm, value in known.items()
      if arm[1:] == (router, rule, cache) and arm.pace
    }
    once = known.get(Arm("prompt", router, rule))
    if once is not None:
      points[places[0]] = once
    x = sorted(points)
    values = np.array([points[i] for i in x])
    # Shifted a little, so that intervals do not hide each other.
    axes.errorbar(
      np.array(x) + 0.06 * (number - (len(ways) - 1) / 2),
      values[:, 0],
      yerr=np.nan_to_num(np.abs(values[:, 1:] - values[:, :1]).T),
      color=colour(number),
      marker="o", markersize=4, capsize=3, linewidth=1.2,
      label=" ".join(part for part in (router, rule, cache) if part),
    )  # fmt: skip


def _marks(
  axes: Axes, known: Mapping[Arm, Estimate], single: Arm | None
) -> None:
  """Draws arms that do not depend on the refresh as horizontal lines."""
  styles = {"own": "--", "uniform": "-."}
  dash_dot_dot = (0, (6, 2, 1, 2, 1, 2))
  # One rule is enough, since most rules reproduce an adapter alone.
  rules = {arm.rule: None for arm in known if arm.variant in styles}
  rule = "exact" if "exact" in rules else next(iter(rules), "")
  for arm, value in known.items():
    style = dash_dot_dot if arm == single else styles.get(arm.variant)
    if style is None or (arm != single and arm.rule != rule):
      continue
    name = f"best single ({arm.variant[8:]})" if arm == single else arm.variant
    axes.axhline(
      value.value, linestyle=style, color="black", linewidth=1, label=name
    )
  if base := known.get(Arm("base")):
    low, high = axes.get_ylim()
    # A line so far off that it would flatten the others becomes a note.
    if low - (high - low) < base.value < high + (high - low):
      axes.axhline(
        base.value, linestyle=":", color="black", linewidth=1, label="base"
      )
    else:
      axes.text(
        0.98, 0.97, f"base: {base.value:.3f}, off the scale",
        transform=axes.transAxes, ha="right", va="top", fontsize="small",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
      )  # fmt: skip


# -----------------------------------------------------------------------------
# Gates.


def gates_by_router(
  rows: Sequence[Mapping[str, Any]],
) -> dict[Arm, list[Mapping[str, Any]]]:
  """Returns rows by arm, one arm per router: the one with the fastest refresh.

  All arms of a router have the same gates at the prompt. Later gates depend on
  rule and cache only for routers of hidden states.

  Args:
    rows: an experiment's rows.
  """
  found: dict[Arm, list[Mapping[str, Any]]] = {}
  for row in rows:
    arm = arm_of(row)
    if arm.variant == "prompt" or arm.variant.startswith("token:"):
      found.setdefault(arm, []).append(row)
  chosen: dict[str, Arm] = {}
  for arm in sorted(found, key=lambda arm: arm.pace or math.inf):
    chosen.setdefault(arm.router, arm)
  return {arm: found[arm] for arm in chosen.values()}


def _table(
  rows: Sequence[Mapping[str, Any]],
  of_row: Callable[[Mapping[str, Any], list[str]], list[float]],
) -> tuple[list[str], list[str], Float[np.ndarray, "T E"]]:
  """Computes (tasks, experts, float[tasks, experts]), the means of `of_row`."""
  experts = list(rows[0]["gates"])
  by_task: dict[str, list[list[float]]] = {}
  for row in rows:
    by_task.setdefault(row["task"], []).append(of_row(row, experts))
  table = np.array([np.mean(some, axis=0) for some in by_task.values()])
  return list(by_task), experts, table


def mean_gates(
  rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], Float[np.ndarray, "T E"]]:
  """Computes (tasks, experts, float[tasks, experts]), the mean gates.

  The mean is over a row's answer tokens, then over rows.

  Args:
    rows: the rows of one arm.

  Example:
    >>> row = {"task": "gsm8k", "gates": {"gsm8k": 0.75, "squad": 0.25}}
    >>> mean_gates([row])[2].tolist()
    [[0.75, 0.25]]
  """
  return _table(rows, lambda row, experts: [row["gates"][e] for e in experts])


def confusion(
  rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], Float[np.ndarray, "T E"]]:
  """Computes (tasks, experts, float[tasks, experts]), each expert's leads.

  An expert leads a row if its gate at the prompt is the largest; a task's
  shares sum to at most 1.

  Args:
    rows: the rows of one arm.

  Example:
    >>> row = {"task": "gsm8k", "gates": {"a": 0.5, "b": 0.5}, "lead": "a"}
    >>> confusion([row])[2].tolist()
    [[1.0, 0.0]]
  """
  return _table(rows, lambda row, experts: [row["lead"] == e for e in experts])


def draw_gates(
  routed: Mapping[Arm, Sequence[Mapping[str, Any]]],
) -> Figure:
  """Draws each router's mean gates by task as stacked bars.

  Args:
    routed: rows by arm, from `gates_by_router`.
  """
  figure, panels = _panels(len(routed), 4.5, 3.4)
  for axes, (arm, rows) in zip(panels, routed.items(), strict=True):
    tasks, experts, table = mean_gates(rows)
    bottom = np.zeros(len(tasks))
    for e, expert in enumerate(experts):
      axes.bar(
        tasks, table[:, e], bottom=bottom, width=0.7, label=expert,
        color=colour(e),
      )  # fmt: skip
      bottom += table[:, e]
    axes.set_title(arm.label, fontsize="medium")
    axes.set_ylabel("mean gates")
    axes.tick_params("x", labelrotation=20)
  figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center",
    ncols=4, frameon=False, fontsize="small",
  )  # fmt: skip
  return figure


def draw_confusion(
  routed: Mapping[Arm, Sequence[Mapping[str, Any]]],
) -> Figure:
  """Draws the share of each task's prompts that each expert led.

  Args:
    routed: rows by arm, from `gates_by_router`.
  """
  figure, panels = _panels(len(routed), 4.5, 3.8)
  for axes, (arm, rows) in zip(panels, routed.items(), strict=True):
    tasks, experts, table = confusion(rows)
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (i, j), share in np.ndenumerate(table):
      axes.text(
        j, i, f"{share:.2f}", ha="center", va="center",
        color="white" if share > 0.6 else "black",
      )  # fmt: skip
    axes.set_xticks(range(len(experts)), experts, rotation=20)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("leading expert at the prompt")
    axes.set_ylabel("task of the row")
    axes.set_title(arm.label, fontsize="medium")
  return figure
