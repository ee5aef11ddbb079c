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
import dataclasses
import functools
import json
from pathlib import Path
import sys
from typing import Annotated

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text
import tyro

from tokenlora_jax import report
from tokenlora_jax.bank.bank import Bank, load_bank
from tokenlora_jax.commands import bank as bank_cli
from tokenlora_jax.commands import cli
from tokenlora_jax.commands.evaluate import Evaluation, evaluate
from tokenlora_jax.config import Config, InputError, nearest
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.decoding import Decoder, Generation
from tokenlora_jax.files import check_new_file, read_lines, write_atomically
from tokenlora_jax.formats.load import base_shape, load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.parallel.sharding import decoding_mesh
from tokenlora_jax.plan.decoding import plan_decoding
from tokenlora_jax.plan.report import show_plans
from tokenlora_jax.report.trace import GateTrace


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
  """What infer.py takes besides the config.

  Attributes:
    bank: the folder that train.py wrote; WORKDIR/bank by default.
    prompt: a prompt; may be given several times.
    prompts_file: a file with a prompt a line.
    examples: take the first so many held-out prompts of each task.
    compare: show base, each adapter, uniform, prompt-level and token-level
      gates side by side.
    output: write each text with its tokens, gates, and their entropy, switches
      and shares to this new JSONL file.
    html: draw each text, its tokens tinted by the expert that leads them, over
      the course of the gates, in this new file, a page that any browser shows.
    png: draw the same in this new file, a picture.
    plan: make no text, but compile the programs for hardware that need not be
      here and say whether they fit and what they take: v5e:1x1, h100:1. A
      prompt of data.length tokens is read, and decode.max-new-tokens are made.
    plan_json: write the plan to this new JSON file too.
  """

  bank: str = ""
  prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
  prompts_file: str = ""
  examples: int = 0
  compare: bool = False
  output: str = ""
  html: str = ""
  png: str = ""
  plan: str = ""
  plan_json: str = ""


def read_prompts(args: Arguments) -> list[str]:
  """Returns the prompts of a command line, or raises `InputError`."""
  if args.examples < 0:
    raise InputError(
      f"--examples: {args.examples} is not allowed; want 0 or more"
    )
  prompts = list(args.prompt)
  if args.prompts_file:
    file = Path(args.prompts_file)
    prompts += read_lines(file, f"--prompts-file {file}", "prompt")
  for task in args.data.tasks if args.examples else ():
    rows = load_rows(args.data, task, "test")[: args.examples]
    prompts += [row.prompt for row in rows]
  if not prompts and sys.stdin.isatty():
    raise InputError("--prompt: there is none; give one, or --examples 1")
  return prompts or read_lines(sys.stdin, "standard input", "prompt")


def generate(args: Arguments, console: Console) -> None:
  """Makes a text for each prompt."""
  if args.compare:
    check_files(args, (), "takes no --compare; leave out one of them")
  check_files(args, ("output", "html", "png"))
  prompts = read_prompts(args)
  base, tokenizer, bank = load(args)
  names = bank.adapters.names
  router = bank.router(args.router)
  records, maps = [], []
  console.print(report.legend(names))
  for prompt in prompts:
    console.rule()
    console.print(prompt, style="dim", markup=False)
    if args.compare:
      console.print(compare(args, base, tokenizer, bank, router, prompt))
      continue
    decoder = Decoder(
      base, [prompt], bank.adapters, router, args.decode, tokenizer,
      chunked=True,
    )  # fmt: skip
    shown = 0
    for out in decoder:
      pieces = token_pieces(tokenizer, out)
      console.print(
        report.trace(pieces[shown:], out.gates[0, shown : len(pieces)], names),
        end="", soft_wrap=True,
      )  # fmt: skip
      shown = len(pieces)
    gates = out.gates[0, : out.lengths[0]]
    speed = f"{out.stats['tokens_per_second']:.1f} tokens/s"
    console.print(
      f"\n{report.summary(gates, names)}", style="dim", markup=False
    )
    console.print(speed, style="dim")
    records.append(
      {
        "prompt": prompt,
        "text": out.texts[0],
        "tokens": out.tokens[0, : out.lengths[0]].tolist(),
        "gates": gates.astype(float).round(6).tolist(),
        **GateTrace.of(gates).record(),
        "experts": names,
        "router": dataclasses.asdict(args.router),
        "decode": dataclasses.asdict(args.decode),
      }
    )
    maps.append(report.HeatMap(prompt, pieces, gates, names, facts(args)))
  if args.output:
    lines = [json.dumps(record) + "\n" for record in records]
    write_atomically(Path(args.output), "".join(lines))
  if args.html:
    write_atomically(Path(args.html), report.heatmap_html(maps))
  if args.png:
    write_atomically(Path(args.png), report.heatmap_png(maps))


def check_files(args: Arguments, taken: Sequence[str], why: str = "") -> None:
  """Raises `InputError` unless the files to write are taken, and new."""
  for name in ("output", "html", "png"):
    path = getattr(args, name)
    if path and name not in taken:
      raise InputError(f"--{name}: {why}")
    check_new_file(f"--{name}", path)


def facts(args: Arguments) -> dict[str, str]:
  """Returns what a heat map says of how its gates came about."""
  router, every = args.router, args.decode.refresh_every
  often = "every token" if every == 1 else f"every {every} tokens"
  return {
    "router": f"{router.name} ({router.encoder})"
    if router.name == "centroid"
    else router.name,
    "gates refreshed": often if every else "once, at the prompt",
  }


def token_pieces(tokenizer, out: Generation) -> list[str]:
  """Returns what each token adds to the first text."""
  tokens = out.tokens[0, : out.lengths[0]].tolist()
  return report.token_pieces(tokenizer, tokens, out.texts[0])


def compare(args, base, tokenizer, bank: Bank, router, prompt: str) -> Table:
  """Returns one prompt's texts under different gates, as a table."""
  adapters, decode = bank.adapters, args.decode
  once = dataclasses.replace(decode, refresh_every=0)
  every = decode.refresh_every or 1
  refreshed = dataclasses.replace(decode, refresh_every=every)
  variants = [("base", None, None, once)]
  variants += [
    (name, adapters, make_router("one-hot", expert=name), once)
    for name in adapters.names
  ]
  variants += [
    ("uniform", adapters, make_router("uniform"), once),
    ("router, at the prompt", adapters, router, once),
    (f"router, every {every}", adapters, router, refreshed),
  ]
  table = Table("gates", "text", show_lines=True)
  for name, some, chosen, config in variants:
    *_, out = Decoder(base, [prompt], some, chosen, config, tokenizer)
    pieces = token_pieces(tokenizer, out)
    text = Text(out.texts[0])
    if some is not None:
      text = report.trace(pieces, out.gates[0, : len(pieces)], adapters.names)
    table.add_row(Text(name), text)
  return table


def plan(args: Arguments, console: Console) -> None:
  """Prints what decoding would take on hardware that need not be here."""
  make = functools.partial(plan_decoding, args)
  shape = base_shape(args.base.path)
  show_plans(make, shape, args.plan, args.plan_json, console)


def bank_folder(args: Arguments | Evaluation) -> Path:
  """Returns the bank's folder."""
  return Path(args.bank or Path(args.workdir) / "bank")


def load(args: Arguments | Evaluation):
  """Returns (base, tokenizer, bank), checked to belong together.

  The base is split between this machine's devices, by its kv heads.
  """
  tokenizer = load_tokenizer(args.base.path)
  path, quantize, mesh = args.base.path, args.base.quantize, None
  devices = jax.local_devices()
  if len(devices) > 1:
    mesh = decoding_mesh(base_shape(path), devices, quantize)
  base = load_base(path, args.base.dtype, mesh, quantize=quantize)
  return base, tokenizer, load_bank(bank_folder(args), base)


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
