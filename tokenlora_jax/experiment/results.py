"""What the rows of an experiment say: a pure function of them, and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from tokenlora_jax.experiment.arms import Arm
from tokenlora_jax.experiment.rows import arm_of


def mean_losses(
  rows: Sequence[Mapping[str, Any]],
) -> dict[Arm, dict[str, float]]:
  """Returns the mean loss of each cell whose rows are all there.

  The mean is over the answer tokens of all rows, nats a token. A task's rows
  are those that any arm has.

  Args:
    rows: of an experiment.
  """
  names: dict[str, set[str]] = {}
  cells: dict[tuple[Arm, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    names.setdefault(row["task"], set()).add(row["row"])
    cells.setdefault((arm_of(row), row["task"]), []).append(row)
  found: dict[Arm, dict[str, float]] = {}
  for (arm, task), some in cells.items():
    means = found.setdefault(arm, {})
    if len(some) == len(names[task]):
      loss, tokens = (sum(r[name] for r in some) for name in ("loss", "tokens"))
      means[task] = loss / tokens
  return found


def loss_table(rows: Sequence[Mapping[str, Any]]) -> Table:
  """Returns the table of losses, an arm a line, as a terminal shows it."""
  losses = mean_losses(rows)
  counts: dict[str, int] = {}
  for task, _ in dict.fromkeys((row["task"], row["row"]) for row in rows):
    counts[task] = counts.get(task, 0) + 1
  table = Table(title="held-out loss, nats an answer token")
  table.add_column("mixing")
  for task, count in counts.items():
    table.add_column(f"{task}\n({count} rows)", justify="right")
  table.add_column("average", justify="right")
  best = {
    task: min(means.get(task, np.inf) for means in losses.values())
    for task in counts
  }
  for arm, means in losses.items():
    cells = []
    for task in counts:
      text = f"{means[task]:.3f}" if task in means else ""
      cells.append(
        f"[bold]{text}[/]" if means.get(task) == best[task] else text
      )
    whole = len(means) == len(counts)
    average = f"{np.mean(list(means.values())):.3f}" if whole else ""
    table.add_row(arm.label, *cells, average)
  return table
