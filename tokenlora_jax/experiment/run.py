"""Runs the cells of an experiment that are not done, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from pathlib import Path
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

from tokenlora_jax.config import DataConfig
from tokenlora_jax.data import Example, Row, fitting, tokenize
from tokenlora_jax.evaluation import Evaluator, Scored
from tokenlora_jax.experiment.arms import Arm, variant_of
from tokenlora_jax.experiment.rows import RowLog, digest
from tokenlora_jax.mixing.routers import Router


@dataclasses.dataclass(frozen=True)
class Question:
  """One held-out row.

  Attributes:
    name: its place in the data, the same on any machine.
    example: its tokens.
  """

  name: str
  example: Example


def questions(
  rows: Sequence[Row], tokenizer: Any, config: DataConfig
) -> list[Question]:
  """Returns one task's first `config.eval_rows` rows that fit.

  Args:
    rows: of one task.
    tokenizer: a transformers-style tokenizer.
    config: of the data.

  Raises:
    InputError: no row is left.
  """
  folder = f"{Path(config.dir)}/"
  found = []
  for i in fitting(rows, tokenizer, config, config.eval_rows):
    example = tokenize(rows[i], tokenizer, config)
    # Cut before its answer, there is nothing to score.
    if len(example.tokens) > example.prompt_length:
      found.append(Question(rows[i].origin.removeprefix(folder), example))
  return found


def digest_questions(questions: Sequence[Question]) -> str:
  """Returns a fingerprint of names and tokens, and of where answers start."""
  return digest(
    part
    for one in questions
    for part in (
      one.name.encode(errors="replace"),
      one.example.tokens.tobytes(),
      str(one.example.prompt_length).encode(),
    )
  )


def run_cells(
  arms: Sequence[Arm],
  tests: Mapping[str, Sequence[Question]],
  routers: Mapping[str, Router],
  evaluator: Evaluator,
  experts: Sequence[str],
  log: RowLog,
  console: Console,
) -> None:
  """Scores what the log lacks of each arm on each task.

  Args:
    arms: in the order to run.
    tests: the held-out rows by task.
    routers: by name.
    evaluator: of the base and the experts.
    experts: their names.
    log: what is done; gets the rest.
    console: shows a bar, or a line a cell where it is no terminal.

  Raises:
    FloatingPointError: a loss is no number.
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
    # Over minutes, since cells differ in what a row takes.
    TimeRemainingColumn(compact=True),
    speed_estimate_period=600,
    console=console,
    disable=not console.is_terminal,
  ) as progress:
    bar = progress.add_task("", total=total, cell="")
    for number, (arm, task, left) in enumerate(work, 1):
      progress.update(bar, cell=f"{arm.label} {task}")
      variant = variant_of(arm, routers, task)
      loss = tokens = 0
      start = last = time.perf_counter()
      for batch in evaluator.score(variant, [one.example for one in left]):
        now = time.perf_counter()
        share, last = (now - last) / len(batch), now
        rows = [
          _row(arm, task, left[one.place], one, experts, share) for one in batch
        ]
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
  """Returns a row as it is kept."""
  loss = float(np.sum(scored.losses, dtype=np.float64))
  if not math.isfinite(loss):
    raise FloatingPointError(
      f"{arm.label}: the loss of {task} {question.name} is {loss}"
    )
  lead, gates = "", {}
  if scored.gates is not None:
    lead = experts[int(np.argmax(scored.gates[0]))]
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
