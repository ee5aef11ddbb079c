"""`infer.py --prompt ...`: a text a prompt, and who led each of its tokens."""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenlora_jax import report
from tokenlora_jax.bank.bank import Bank
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.commands.wiring import load
from tokenlora_jax.config import InputError
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.files import check_new_file, read_lines, write_atomically
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.report.trace import GateTrace


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
      pieces = out.pieces[0]
      console.print(
        report.trace(pieces[shown:], out.gates[0, shown : len(pieces)], names),
        end="", soft_wrap=True,
      )  # fmt: skip
      shown = len(pieces)
    gates = out.gates[0, : out.lengths[0]]
    speed = report.speed(out.stats)
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
    pieces = out.pieces[0]
    text = Text(out.texts[0])
    if some is not None:
      text = report.trace(pieces, out.gates[0, : len(pieces)], adapters.names)
    table.add_row(Text(name), text)
  return table
