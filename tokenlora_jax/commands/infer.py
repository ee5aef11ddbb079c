"""Mixes a bank of LoRA adapters while a frozen Llama generates text.

  python infer.py --prompt TEXT ...       generates; shows each token's expert
  python infer.py evaluate ...            compares ways to mix on held-out rows
  python infer.py --plan v5e:1x1 ...      estimates memory and time
  python infer.py bank ...                shows a bank; bank-add and bank-drop
                                          change it
  python infer.py export ...              writes a mixture as one PEFT folder

Prompts come from --prompt, --prompts-file, --examples, or standard input, one a
line. In a .jsonl file, or on standard input if its first line is JSON, it is
{"prompt": "..."}, which may hold newlines, or
{"messages": [{"role": "user", "content": "..."}]}.
"""

from collections.abc import Sequence
import functools

from rich.console import Console

from tokenlora_jax.commands import cli
from tokenlora_jax.commands.evaluate_args import Evaluation
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.commands.memory import needing_memory
from tokenlora_jax.config import InputError, nearest

# Heavy modules are imported where they are used, so that --help is fast.

# Subcommands on a bank; `commands/bank.py` has a function for each.
BANK = ("bank", "bank-add", "bank-drop", "export")
COMMANDS = ("generate", "evaluate", *BANK)


def main(argv: Sequence[str]) -> None:
  """Runs infer.py.

  Args:
    argv: the arguments, without the program's name.

  Raises:
    InputError: a flag, a file or the bank is not as it must be.
  """
  argv, command, console = list(argv), "generate", cli.console()
  if argv and not argv[0].startswith("-"):
    command = argv.pop(0)
  if command in BANK:
    from tokenlora_jax.commands import bank

    bank.COMMANDS[command](argv, console)
  elif command == "evaluate":
    _evaluate(cli.parse(Evaluation, argv, __doc__), argv, console)
  elif command == "generate":
    args = cli.parse(Arguments, argv, __doc__)
    if args.plan:
      _plan(args, console)
    else:
      _generate(args, argv, console)
  else:
    raise InputError(
      f"{command!r}: is not a command; want {', '.join(COMMANDS)}"
      f"{nearest(command, COMMANDS)}"
    )


def named(argv: Sequence[str]) -> frozenset[str]:
  """Returns the settings of the router that a command line names.

  Example:
    >>> named(["--router.top-k", "2", "--seed=1"])
    frozenset({'top_k'})
  """
  head = "--router."
  return frozenset(
    argument.partition("=")[0].removeprefix(head).replace("-", "_")
    for argument in argv
    if argument.startswith(head)
  )


def _generate(args: Arguments, argv: Sequence[str], console: Console) -> None:
  from tokenlora_jax.commands.generate import generate

  cli.keep_programs(args.compilation_cache)
  with needing_memory(
    "choose a smaller --decode.batch, fewer --decode.max-new-tokens, or"
    " --base.quantize int8"
  ):
    generate(args, console, named(argv))


def _evaluate(args: Evaluation, argv: Sequence[str], console: Console) -> None:
  from tokenlora_jax.commands.evaluate import evaluate
  from tokenlora_jax.commands.wiring import bank_folder, load

  cli.keep_programs(args.compilation_cache)
  with needing_memory(
    "choose --base.quantize int8, or leave out long rows with a smaller"
    " --data.length"
  ):
    base, tokenizer, bank = load(args)
    evaluate(
      args, base, tokenizer, bank, bank_folder(args), named(argv), console
    )


def _plan(args: Arguments, console: Console) -> None:
  """Prints the plan of a prefill and a decode step on absent hardware."""
  from tokenlora_jax.formats.load import base_shape
  from tokenlora_jax.plan.decoding import plan_decoding
  from tokenlora_jax.plan.report import show_plans

  make = functools.partial(plan_decoding, args)
  shape = base_shape(args.base.path)
  show_plans(make, shape, args.plan, args.plan_json, console)


def script() -> None:
  """Runs infer.py, or tokenlora-infer, as a program, with its exit status."""
  cli.run(main)
