"""Mixes a bank of LoRA adapters while a frozen Llama makes text.

  python infer.py --prompt TEXT ...       make text, with who led each token
  python infer.py evaluate ...            ways to mix compared on held-out rows
  python infer.py --plan v5e:1x1 ...      would it fit there, and how fast
  python infer.py bank ...                what is in a bank; bank-add and
                                          bank-drop change it
  python infer.py export ...              a mixture as one PEFT folder

Prompts come from --prompt, --prompts-file (a prompt a line), --examples, or
standard input (a prompt a line).
"""

from collections.abc import Sequence
import functools

from rich.console import Console

from tokenlora_jax.commands import bank as bank_cli
from tokenlora_jax.commands import cli
from tokenlora_jax.commands.evaluate import Evaluation, evaluate
from tokenlora_jax.commands.generate import generate
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.commands.wiring import bank_folder, load
from tokenlora_jax.config import InputError, nearest
from tokenlora_jax.formats.load import base_shape
from tokenlora_jax.plan.decoding import plan_decoding
from tokenlora_jax.plan.report import show_plans


def plan(args: Arguments, console: Console) -> None:
  """Prints what decoding would take on hardware that need not be here."""
  make = functools.partial(plan_decoding, args)
  shape = base_shape(args.base.path)
  show_plans(make, shape, args.plan, args.plan_json, console)


def main(argv: Sequence[str]) -> None:
  """Runs the program with these arguments."""
  argv = list(argv)
  command = "generate"
  if argv and not argv[0].startswith("-"):
    command = argv.pop(0)
  if command in bank_cli.COMMANDS:
    bank_cli.COMMANDS[command](argv, cli.console())
    return
  commands = "generate", "evaluate", *bank_cli.COMMANDS
  if command not in commands:
    raise InputError(
      f"{command!r}: is no command; want {', '.join(commands)}"
      f"{nearest(command, commands)}"
    )
  console = cli.console()
  if command == "evaluate":
    args = cli.parse(Evaluation, argv, __doc__)
    base, tokenizer, bank = load(args)
    folder = bank_folder(args)
    evaluate(args, base, tokenizer, bank.adapters, bank.router, folder, console)
    return
  args = cli.parse(Arguments, argv, __doc__)
  (plan if args.plan else generate)(args, console)


if __name__ == "__main__":
  cli.run(main)
