"""Runs `infer.py evaluate`: scores rows, writes tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
import contextlib
import dataclasses
from pathlib import Path

from rich.console import Console

from tokenlora_jax.commands.evaluate_args import Evaluation
from tokenlora_jax.config import RouterConfig
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.evaluation.evaluator import Evaluator
from tokenlora_jax.evaluation.experiment.answers import Judge
from tokenlora_jax.evaluation.experiment.arms import (
  Routers,
  make_arms,
  own_experts,
  router_config,
)
from tokenlora_jax.evaluation.experiment.plots import write_plots
from tokenlora_jax.evaluation.experiment.questions import (
  digest_questions,
  questions,
)
from tokenlora_jax.evaluation.experiment.results import summarise
from tokenlora_jax.evaluation.experiment.rows import (
  AGAIN,
  RowLog,
  digest_bank,
  open_rows,
)
from tokenlora_jax.evaluation.experiment.run import run_cells
from tokenlora_jax.evaluation.experiment.tables import (
  NOTE,
  terminal_tables,
  write_tables,
)
from tokenlora_jax.files import writing
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters


def evaluate(
  args: Evaluation,
  base: Llama,
  tokenizer: Tokenizer,
  adapters: Adapters,
  experts: Mapping[str, str],
  make_router: Callable[[RouterConfig, Set[str]], Router],
  given: Set[str],
  bank: Path,
  console: Console,
) -> None:
  """Compares ways to mix on held-out rows.

  Args:
    args: the flags.
    base: with its layers in a list.
    tokenizer: the base's.
    adapters: the experts.
    experts: by expert, the task it was trained on; "" if unknown.
    make_router: makes a router for them, as `Bank.router`.
    given: the settings of the router that the command line names.
    bank: the folder that they come from.
    console: prints the tables.

  Raises:
    InputError: the settings do not fit the bank or each other, or `--output`
      holds another experiment.
  """
  data = dataclasses.replace(
    args.data,
    tasks=args.tasks or args.data.tasks,
    eval_rows=args.rows or args.data.eval_rows,
  )
  own = own_experts(data.tasks, experts) if "own" in args.variants else {}
  named = {}
  for name in args.routers or (args.router.name,):
    config, more = router_config(name, args.router)
    named[name] = make_router(config, given | more)
  routers = Routers(named, own)
  arms, skipped = make_arms(
    args.variants, routers, args.rules, args.caches, adapters
  )
  for line in skipped:
    console.print(line, style="dim", markup=False, soft_wrap=True)
  tests = {
    task: questions(load_rows(data, task, "test"), tokenizer, data)
    for task in data.tasks
  }
  evaluator, judge = Evaluator(base, adapters, tokenizer), None
  if args.generate:
    judge = Judge(
      base, adapters, tokenizer, evaluator, args.decode, args.run_code
    )
    for task in tests:
      judge.check(task, tests[task])
  with contextlib.ExitStack() as stack:
    log = RowLog()
    if args.output:
      about = {
        "base": dataclasses.asdict(args.base),
        "router": dataclasses.asdict(args.router),
        "bank": digest_bank(bank),
        "rows": {task: digest_questions(tests[task]) for task in tests},
      }
      if judge is not None:
        # The decode settings that arms do not vary.
        once = dataclasses.replace(
          args.decode, refresh_every=0, rule="", cache="reuse"
        )
        about["generate"] = dataclasses.asdict(once)
        del about["generate"]["batch"]  # Of infer.py's own prompts.
      log = stack.enter_context(open_rows(Path(args.output), about))
    run_cells(
      arms,
      tests,
      routers,
      evaluator,
      adapters.names,
      judge,
      log,
      console,
    )
    results = summarise(log.rows)
    if args.output:
      folder = Path(args.output)
      with writing(folder, AGAIN):
        write_tables(results, folder)
        write_plots(log.rows, results, folder)
  for table in terminal_tables(results):
    console.print(table)
  console.print(NOTE, style="dim")
