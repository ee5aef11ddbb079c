"""Computes an experiment's figures from its rows alone.

Axis letters: Q questions, A figures, S resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any
import zlib

from jaxtyping import Float
import numpy as np

from tokenlora_jax.evaluation.experiment.arms import Arm
from tokenlora_jax.evaluation.experiment.rows import arm_of
from tokenlora_jax.evaluation.statistics import (
  RESAMPLES,
  Estimate,
  estimate,
  ratios,
)

# Less is better for this metric; for all others, more is.
LOSS = "loss"
# The mean of a row's scores; tasks with different scores share this metric.
SCORE = "score"
AVERAGE = "average"

_ORDER = (
  "base", "own", "adapter", "uniform", "sum", "top1", "prompt", "token",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Figure:
  """One figure of one arm.

  Attributes:
    arm: the way to mix.
    metric: `loss`, nats per answer token; `score`, the mean of a row's scores;
      or the name of one score.
    task: a task, or `average`, in which every task counts the same.
    questions: the number of rows.
    own: the figure.
    over_base: the paired difference from the base; None without a base.
    over_single: the paired difference from the best single adapter, the one
      with the best average in this metric on these very rows; None without one.
  """

  arm: Arm
  metric: str
  task: str
  questions: int
  own: Estimate
  over_base: Estimate | None = None
  over_single: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Pace:
  """The time and tokens of an arm, over all its rows.

  Attributes:
    seconds: time of scoring and generation, compilation and router included.
      Gates that an earlier arm computed are not computed again.
    tokens_per_second: answer tokens scored per second.
    made_per_second: tokens generated per second; 0 if none were.
  """

  seconds: float
  tokens_per_second: float
  made_per_second: float


@dataclasses.dataclass(frozen=True)
class Results:
  """All figures of an experiment.

  Attributes:
    tasks: {task: questions}.
    figures: figures by (arm, metric, task), of complete cells.
    singles: {metric: the best single adapter}; empty if no single adapter ran
      on all tasks.
    paces: time and tokens by arm.
  """

  tasks: dict[str, int]
  figures: dict[tuple[Arm, str, str], Figure]
  singles: dict[str, Arm]
  paces: dict[Arm, Pace]

  @functools.cached_property
  def arms(self) -> list[Arm]:
    """The arms that have a figure, in the order of tables."""
    return sorted({arm for arm, *_ in self.figures}, key=_place)

  @functools.cached_property
  def metrics(self) -> list[str]:
    """The metrics that any arm has: loss and score, then single scores."""
    return list(dict.fromkeys(metric for _, metric, _ in self.figures))


def _place(arm: Arm) -> tuple:
  kind = arm.variant.partition(":")[0]
  place = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
  return place, arm.pace, arm


def summarise(
  rows: Sequence[Mapping[str, Any]], resamples: int = RESAMPLES
) -> Results:
  """Computes all figures of an experiment.

  A task's questions are all that occur in any arm; a cell that lacks one has no
  figure. Losses are means over all answer tokens of all rows, scores over rows.
  All arms share a task's resamples, so differences are paired; an average
  resamples each task separately.

  Args:
    rows: the experiment's rows.
    resamples: S.

  Example:
    >>> row = {"variant": "base", "router": "", "rule": "", "cache": ""}
    >>> row |= {"task": "gsm8k", "row": "1", "loss": 3.0, "tokens": 2}
    >>> row |= {"seconds": 1.0, "lead": "", "gates": {}, "scores": {}}
    >>> summarise([row]).figures[Arm("base"), "loss", "gsm8k"].own.value
    1.5
  """
  tasks: dict[str, dict[str, int]] = {}  # task -> row -> its place
  for row in rows:
    places = tasks.setdefault(row["task"], {})
    places.setdefault(row["row"], len(places))
  samples: dict[tuple[Arm, str, str], Float[np.ndarray, " _"]] = {}
  for task, places in tasks.items():
    mine = [row for row in rows if row["task"] == task]
    samples |= _samples(task, places, mine, resamples)
  metrics = list(dict.fromkeys(metric for _, metric, _ in samples))
  metrics.sort(key=lambda m: (m != LOSS, m != SCORE))
  arms = sorted({arm for arm, *_ in samples}, key=_place)
  for arm in arms:
    for metric in metrics:
      each = [samples.get((arm, metric, task)) for task in tasks]
      if all(x is not None for x in each):
        samples[arm, metric, AVERAGE] = np.mean(each, axis=0)
  counts = {task: len(places) for task, places in tasks.items()}
  singles = dict(_singles(arms, metrics, samples))
  figures = {}
  for metric in metrics:
    for task in (*tasks, AVERAGE):
      base = samples.get((Arm("base"), metric, task))
      single = samples.get((singles.get(metric), metric, task))
      least = counts[task] if task != AVERAGE else min(counts.values())
      total = counts[task] if task != AVERAGE else sum(counts.values())
      for arm in arms:
        if (sample := samples.get((arm, metric, task))) is None:
          continue
        over_base, over_single = (
          None if other is None else estimate(sample - other, least)
          for other in (base, single)
        )
        figures[arm, metric, task] = Figure(
          arm, metric, task, total, estimate(sample, least),
          over_base, over_single,
        )  # fmt: skip
  return Results(counts, figures, singles, dict(_paces(rows)))


def _samples(
  task: str,
  places: Mapping[str, int],
  rows: Sequence[Mapping[str, Any]],
  resamples: int,
) -> dict[tuple[Arm, str, str], Float[np.ndarray, " _"]]:
  """Computes float[1 + S] by (arm, metric, task), for a task's whole cells."""
  count = len(places)
  # [Q, (sum, weight)]
  found: dict[tuple[Arm, str], Float[np.ndarray, "Q 2"]] = {}
  for row in rows:
    values = {LOSS: (row["loss"], row["tokens"])}
    if scores := row["scores"]:
      values[SCORE] = float(np.mean(list(scores.values()))), 1
      values |= {name: (value, 1) for name, value in scores.items()}
    for metric, value in values.items():
      key = arm_of(row), metric
      if key not in found:
        found[key] = np.full((count, 2), np.nan)
      found[key][places[row["row"]]] = value
  whole = {key: x for key, x in found.items() if not np.isnan(x).any()}
  if not whole:
    return {}
  # [Q, A, (sum, weight)]
  table = np.stack(list(whole.values()), axis=1)
  seed = [zlib.crc32(task.encode()), count]
  drawn = ratios(table[..., 0], table[..., 1], seed, resamples)
  return {
    (arm, metric, task): column
    for (arm, metric), column in zip(whole, drawn.T, strict=True)
  }


def _singles(
  arms: Sequence[Arm],
  metrics: Sequence[str],
  samples: Mapping[tuple[Arm, str, str], Float[np.ndarray, " _"]],
) -> Iterator[tuple[str, Arm]]:
  """Yields (metric, the single adapter with the best average)."""
  for metric in metrics:
    averages = {
      arm: samples[arm, metric, AVERAGE][0]
      for arm in arms
      if arm.variant.startswith("adapter:")
      and (arm, metric, AVERAGE) in samples
    }
    if averages:
      best = min if metric == LOSS else max
      yield metric, best(averages, key=averages.get)


def _paces(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Arm, Pace]]:
  """Yields the time and tokens of each arm."""
  totals: dict[Arm, np.ndarray] = {}
  for row in rows:
    of_row = (
      row["seconds"], row["tokens"],
      row.get("made_seconds", 0.0), row.get("made", 0),
    )  # fmt: skip
    totals.setdefault(arm_of(row), np.zeros(4))[:] += of_row
  for arm, (seconds, tokens, made_seconds, made) in totals.items():
    yield (
      arm,
      Pace(
        float(seconds + made_seconds),
        float(tokens / seconds) if seconds else 0.0,
        float(made / made_seconds) if made_seconds else 0.0,
      ),
    )
