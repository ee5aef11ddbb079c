"""Runs `infer.py evaluate`: scores rows, writes tables and plots."""

from __future__ import annotations

from collections.abc import Set
import contextlib
import dataclasses
from pathlib import Path

from rich.console import Console

from tokenlora_jax.bank.bank import Bank
from tokenlora_jax.commands.evaluate_args import Evaluation
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
from tokenlora_jax.model.llama import Llama


def evaluate(
  args: Evaluation,
  base: Llama,
  tokenizer: Tokenizer,
  bank: Bank,
  folder: Path,
  given: Set[str],
  console: Console,
) -> None:
  """Compares ways to mix on held-out rows.

  Args:
    args: the flags.
    base: with its layers in a list.
    tokenizer: the base's.
    bank: the experts.
    folder: the folder that the bank was read from.
    given: the settings of the router that the command line names.
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
  adapters, own = bank.adapters, {}
  if "own" in args.variants:
    experts = {name: expert.task for name, expert in bank.experts.items()}
    own = own_experts(data.tasks, experts)
  named = {}
  for name in args.routers or (args.router.name,):
    config, more = router_config(name, args.router)
    named[name] = bank.router(config, given | more)
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
        "bank": digest_bank(folder),
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
      arms, tests, routers, evaluator, adapters.names, judge, log, console
    )
    results = summarise(log.rows)
    if args.output:
      output = Path(args.output)
      with writing(output, AGAIN):
        write_tables(results, output)
        write_plots(log.rows, results, output)
  for table in terminal_tables(results):
    console.print(table)
  console.print(NOTE, style="dim")
