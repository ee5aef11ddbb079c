"""Prints plans as tables and writes them as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenlora_jax.files import check_new_file, write_atomically
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.plan.program import Program
from tokenlora_jax.plan.topology import Topology, get_topology
from tokenlora_jax.plan.training import Plan


def show_plans(
  make: Callable[[LlamaConfig, Topology], Sequence[tuple[Plan, Program]]],
  shape: LlamaConfig,
  name: str,
  file: str,
  console: Console,
) -> None:
  """Makes plans, prints them and, if a file is named, writes them.

  Args:
    make: plans the programs of an entry point, as `plan_training` does.
    shape: of the base.
    name: of the topology; see `get_topology`.
    file: a new JSON file, or "".
    console: prints the tables.

  Raises:
    InputError: there is no such topology, or the file exists or cannot be
      written.
  """
  check_new_file("--plan-json", file)
  topology = get_topology(name)
  with console.status(f"compiling for {name}"):
    plans = [plan for plan, _ in make(shape, topology)]
  for plan in plans:
    console.print(plan_table(plan))
    if not plan.fits:
      console.print(f"It does not fit: {plan.advice}.", soft_wrap=True)
  if file:
    write_atomically(Path(file), plans_json(plans))


def plan_table(plan: Plan) -> Table:
  """Returns a plan as a table: a chip's memory, a step's work and its time."""
  table = Table(
    f"{plan.program} on {plan.topology}", "a chip", title_justify="left"
  )
  for label, size in (
    ("base", plan.weights_bytes),
    ("adapters", plan.adapters_bytes),
    ("optimizer", plan.optimizer_bytes),
    ("batch, cache and results", plan.other_bytes),
    ("activations, gradients, scratch", plan.temporaries_bytes),
  ):
    table.add_row(label, gib(size))
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  table.add_row(
    "together",
    f"{gib(plan.peak_bytes)} of {gib(plan.capacity_bytes)}: {verdict}",
    end_section=True,
  )
  if plan.bound_by:
    ratio = plan.flops_per_token / (4 * plan.parameters)
    table.add_row(
      "FLOPs a token",
      f"{plan.flops_per_token:.3g}, {ratio:.2f} x 4N, N {plan.parameters:.3g}",
    )
    for one in plan.collectives:
      across = ", ".join(one["across"]) or "nothing"
      table.add_row(
        f"{one['of']}: {one['kind']} over {across}",
        f"{one['count']} times, {gib(one['bytes'])} received",
      )
    for kind in ("compute", "memory", "network"):
      seconds = getattr(plan, f"{kind}_seconds")
      table.add_row(f"{kind}, at peak", f"{1000 * seconds:.3g} ms")
    rate = plan.tokens / plan.least_step_seconds
    table.add_row(
      "a step takes at least",
      f"{1000 * plan.least_step_seconds:.3g} ms ({plan.bound_by} binds):"
      f" at most {rate:,.0f} tokens/s on all {plan.chips}",
    )
  table.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
  return table


def gib(size: float) -> str:
  """Returns a size of so many bytes as text.

  Example:
    >>> gib(3 * 2**29)
    '1.50 GiB'
  """
  return f"{size / 2**30:.2f} GiB"


def plans_json(plans: Sequence[Plan]) -> str:
  """Returns one plan as JSON, several as {program: plan}."""
  found = {plan.program: dataclasses.asdict(plan) for plan in plans}
  one = next(iter(found.values()))
  return json.dumps(one if len(found) == 1 else found, indent=2) + "\n"
