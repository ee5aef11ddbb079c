"""Scores the missing rows of an experiment's cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from tokenlora_jax.evaluation.evaluator import Evaluator, Scored
from tokenlora_jax.evaluation.experiment.answers import Judge
from tokenlora_jax.evaluation.experiment.arms import Arm, Routers
from tokenlora_jax.evaluation.experiment.questions import Question
from tokenlora_jax.evaluation.experiment.rows import RowLog
from tokenlora_jax.report.trace import leaders


def run_cells(
  arms: Sequence[Arm],
  tests: Mapping[str, Sequence[Question]],
  routers: Routers,
  evaluator: Evaluator,
  experts: Sequence[str],
  judge: Judge | None,
  log: RowLog,
  console: Console,
) -> None:
  """Scores the missing rows of each arm on each task.

  Args:
    arms: the arms, in the order to run.
    tests: the held-out rows by task.
    routers: the arms' routers.
    evaluator: computes losses for the base and the experts.
    experts: the experts' names.
    judge: generates and scores answers; None computes losses alone.
    log: the rows scored before; new rows are appended.
    console: shows a bar, or one line per cell if it is no terminal.

  Raises:
    FloatingPointError: a loss is not finite.
  """
  work = []
  for arm in arms:
    for task, asked in tests.items():
      left = [one for one in asked if not log.has(arm, task, one.name)]
      if left:
        work.append((arm, task, left))
  total = sum(len(left) for *_, left in work)
  done, begun = 0, time.perf_counter()
  with Progress(
    TextColumn("evaluate"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TextColumn("{task.fields[cell]}", markup=False),
    # Averaged over minutes, since a row takes longer in some cells.
    TimeRemainingColumn(compact=True),
    speed_estimate_period=600,
    console=console,
    disable=not console.is_terminal,
  ) as progress:
    bar = progress.add_task("", total=total, cell="")
    for number, (arm, task, left) in enumerate(work, 1):
      progress.update(bar, cell=f"{arm.label} {task}")
      variant = routers.variant(arm, task)
      loss = tokens = 0
      start = last = time.perf_counter()
      for batch in evaluator.score(variant, [one.example for one in left]):
        seconds = (time.perf_counter() - last) / len(batch)
        asked = [left[one.place] for one in batch]
        rows = [
          _row(arm, task, question, one, experts, seconds)
          for question, one in zip(asked, batch, strict=True)
        ]
        if judge is not None:
          said = judge.judge(task, variant, asked)
          rows = [row | more for row, more in zip(rows, said, strict=True)]
        last = time.perf_counter()
        log.add(rows)
        loss += sum(row["loss"] for row in rows)
        tokens += sum(row["tokens"] for row in rows)
        done += len(rows)
        progress.update(bar, advance=len(rows))
      if not console.is_terminal:
        rest = (last - begun) / done * (total - done)
        console.print(
          f"{number}/{len(work)}  {arm.label}  {task}"
          f"  {loss / tokens:.3f} nats a token  {last - start:.0f} s"
          f"  about {math.ceil(rest / 60)} min left",
          markup=False, soft_wrap=True,
        )  # fmt: skip


def _row(
  arm: Arm,
  task: str,
  question: Question,
  scored: Scored,
  experts: Sequence[str],
  seconds: float,
) -> dict[str, Any]:
  """Returns a scored row as JSON values."""
  loss = float(np.sum(scored.losses, dtype=np.float64))
  if not math.isfinite(loss):
    raise FloatingPointError(
      f"{arm.label}: the loss of {task} {question.name} is {loss}"
    )
  lead, gates = "", {}
  if scored.gates is not None:
    first = int(leaders(scored.gates[:1])[0])
    lead = experts[first] if first >= 0 else ""
    mean = np.mean(scored.gates, axis=0, dtype=np.float64).round(6).tolist()
    gates = dict(zip(experts, mean, strict=True))
  return {
    **arm._asdict(),
    "task": task,
    "row": question.name,
    "loss": loss,
    "tokens": len(scored.losses),
    "seconds": round(seconds, 6),
    "lead": lead,
    "gates": gates,
    "scores": {},
  }
