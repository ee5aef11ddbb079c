"""Runs `infer.py --prompt ...`: generates texts and shows their gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

from tokenlora_jax import report
from tokenlora_jax.commands import cli
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.commands.prompts import encode_all, read_prompts
from tokenlora_jax.commands.wiring import load
from tokenlora_jax.config import DecodeConfig, InputError, RouterConfig
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.decoding import (
  Decoder,
  MadeText,
  filled_batches,
  joined_pace,
)
from tokenlora_jax.files import NewLines, check_new_file, write_atomically
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters
from tokenlora_jax.report.trace import GateTrace


class Way(NamedTuple):
  """One way to mix the experts.

  Attributes:
    name: its name in a table.
    adapters: the experts; None is the base alone.
    router: decides their gates; None without adapters.
    decode: the settings; `batch` is the largest batch.
  """

  name: str
  adapters: Adapters | None
  router: Router | None
  decode: DecodeConfig


@dataclasses.dataclass(frozen=True)
class Maker:
  """Generates the texts of many prompts in batches.

  Attributes:
    base: the frozen model.
    tokenizer: the base's.
    ways: the ways to mix; each of them generates a text for each prompt.
  """

  base: Llama
  tokenizer: Tokenizer
  ways: Sequence[Way]

  def start(
    self, batch: Sequence[Sequence[int]], way: Way, chunked: bool = False
  ) -> Decoder:
    """Returns the decoder of a batch of prompts, given as tokens."""
    return Decoder(
      self.base, batch, way.adapters, way.router, way.decode, self.tokenizer,
      chunked,
    )  # fmt: skip

  def texts(
    self, prompts: Sequence[Sequence[int]], told: list[dict[str, float]]
  ) -> Iterator[list[MadeText]]:
    """Yields each prompt's texts, one for each way, in the prompts' order.

    Shows a progress bar on stderr.

    Args:
      prompts: the tokens of each prompt.
      told: the stats of each batch are appended to it, without the rows that
        pad a batch.
    """
    waiting, following = {}, 0
    bar = Progress(
      *Progress.get_default_columns(), MofNCompleteColumn(),
      console=cli.console(stderr=True), transient=True, redirect_stdout=False,
      disable=len(prompts) == 1,
    )  # fmt: skip
    task = bar.add_task("texts", total=len(prompts))
    size = self.ways[0].decode.batch
    for places, batch in filled_batches(prompts, size):
      # Hide the bar between batches: texts may be printed to its terminal.
      with bar:
        made = [[*self.start(batch, way)][-1] for way in self.ways]
      told += [out.pace(len(places)) for out in made]
      for i, place in enumerate(places):
        waiting[place] = [out.row(i) for out in made]
      bar.advance(task, len(places))
      while following in waiting:
        yield waiting.pop(following)
        following += 1


def generate(
  args: Arguments, console: Console, named: Set[str] = frozenset()
) -> None:
  """Generates, prints and writes a text for each prompt.

  Args:
    args: the flags.
    console: prints the texts.
    named: the settings of the router that the command line names.

  Raises:
    InputError: a prompt, the base or the bank cannot be read, or an output file
      exists.
    KeyboardInterrupt: on Ctrl-C; says how many texts are written.
  """
  for name in ("output", "html", "png"):
    path = getattr(args, name)
    if args.compare and path:
      raise InputError(
        f"--{name}: cannot be used with --compare; leave out one"
      )
    check_new_file(f"--{name}", path)
  given = read_prompts(args)
  base, tokenizer, bank = load(args)
  decode, names = args.decode, bank.adapters.names
  router = bank.router(args.router, named)
  way = Way("", bank.adapters, router, decode)
  encoded = encode_all(given, tokenizer, base.config, decode.max_new_tokens)
  texts, prompts = zip(*encoded, strict=True)
  console.print(report.legend(names))
  if args.compare:
    maker = Maker(base, tokenizer, compared(way))
    for text, made in zip(texts, maker.texts(prompts, []), strict=True):
      say_prompt(text, console)
      console.print(comparison(maker.ways, made))
    return
  made = shown(Maker(base, tokenizer, [way]), prompts, texts, console)
  about = {
    "experts": names,
    "router": dataclasses.asdict(args.router),
    "decode": dataclasses.asdict(decode),
  }
  told, maps = facts(args.router, decode.refresh_every), []
  with NewLines("--output", args.output) as output:
    try:
      for text, row in zip(texts, made, strict=True):
        output.add(json.dumps(record(text, row) | about))
        if args.html or args.png:
          maps.append(report.HeatMap(text, row.pieces, row.gates, names, told))
    except KeyboardInterrupt:
      wrote = f"; {output.count} of {len(prompts)} texts are in {args.output}"
      raise KeyboardInterrupt(
        "stopped" + (wrote if args.output else "")
      ) from None
  if args.html:
    write_atomically(Path(args.html), report.heatmap_html(maps))
  if args.png:
    write_atomically(Path(args.png), report.heatmap_png(maps))


def shown(
  maker: Maker,
  prompts: Sequence[Sequence[int]],
  texts: Sequence[str],
  console: Console,
) -> Iterator[MadeText]:
  """Prints texts as they finish and yields them in the prompts' order.

  A single text is printed token by token.

  Args:
    maker: generates the texts, in one way.
    prompts: the tokens of each prompt.
    texts: the prompts as text.
    console: prints the texts.
  """
  (way,) = maker.ways
  names = way.adapters.names
  if len(prompts) == 1:
    say_prompt(texts[0], console)
    count = 0
    for out in maker.start(prompts, way, chunked=True):
      row = out.row(0)
      say_text(row.pieces[count:], row.gates[count:], names, console)
      count = len(row.pieces)
    say_summary(row, names, console)
    console.print(report.speed(out.stats), style="dim")
    yield row
    return
  told = []
  with contextlib.closing(maker.texts(prompts, told)) as made:
    for text, (row,) in zip(texts, made, strict=True):
      say_prompt(text, console)
      say_text(row.pieces, row.gates, names, console)
      say_summary(row, names, console)
      yield row
  console.rule()
  console.print(report.speed(joined_pace(told)), style="dim")


def compared(way: Way) -> list[Way]:
  """Returns the ways that --compare shows beside a way to mix."""
  adapters, router, decode = way.adapters, way.router, way.decode
  once = dataclasses.replace(decode, refresh_every=0)
  every = decode.refresh_every or 1
  refreshed = dataclasses.replace(decode, refresh_every=every)
  return [
    Way("base", None, None, once),
    *(
      Way(name, adapters, make_router("one-hot", expert=name), once)
      for name in adapters.names
    ),
    Way("uniform", adapters, make_router("uniform"), once),
    Way("router, at the prompt", adapters, router, once),
    Way(f"router, every {every}", adapters, router, refreshed),
  ]


def comparison(ways: Sequence[Way], made: Sequence[MadeText]) -> Table:
  """Returns a table of a prompt's texts, a row a way to mix."""
  table = Table("gates", "text", show_lines=True)
  for way, row in zip(ways, made, strict=True):
    text = Text(row.text)
    if way.adapters is not None:
      text = report.trace(row.pieces, row.gates, way.adapters.names)
    table.add_row(Text(way.name), text)
  return table


def record(prompt: str, row: MadeText) -> dict[str, object]:
  """Returns a text's own part of its line of `--output`."""
  return {
    "prompt": prompt,
    "text": row.text,
    "tokens": row.tokens.tolist(),
    "gates": row.gates.astype(float).round(6).tolist(),
    **GateTrace.of(row.gates).record(),
  }


def facts(router: RouterConfig, every: int) -> dict[str, str]:
  """Returns the settings that a heat map shows, by name.

  Args:
    router: the settings of the router.
    every: the number of tokens between two refreshes of the gates.

  Example:
    >>> facts(RouterConfig("uniform"), every=1)
    {'router': 'uniform', 'gates refreshed': 'every token'}
  """
  often = f"every {every} tokens"
  if every < 2:
    often = "every token" if every else "once, at the prompt"
  named = router.name
  if named == "centroid":
    named += f" ({router.encoder})"
  return {"router": named, "gates refreshed": often}


def say_prompt(text: str, console: Console) -> None:
  """Prints a prompt below a rule."""
  console.rule()
  console.print(text, style="dim", markup=False)


def say_text(
  pieces: Sequence[str],
  gates: np.ndarray,
  names: Sequence[str],
  console: Console,
) -> None:
  """Prints tokens of a text, each in the colour of its expert."""
  told = report.trace(pieces, gates, names)
  console.print(told, end="", soft_wrap=True)


def say_summary(row: MadeText, names: Sequence[str], console: Console) -> None:
  """Prints each expert's share and the switches of a text, below it."""
  told = report.summary(row.gates, names)
  console.print(f"\n{told}", style="dim", markup=False)
