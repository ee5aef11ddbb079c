"""Runs `infer.py --prompt ...`: generates texts and shows their gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

from tokenlora_jax import report
from tokenlora_jax.bank.bank import Bank
from tokenlora_jax.commands import cli
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.commands.prompts import encode_all, read_prompts
from tokenlora_jax.commands.wiring import load
from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.decoding import Decoder, Generation, make_batches
from tokenlora_jax.files import NewLines, check_new_file, write_atomically
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.report.trace import GateTrace

# Stats summed over all rows of a batch.
_TOLD = ("new_tokens", "timed_tokens", "tokens_per_second")


class Row(NamedTuple):
  """One generated text of a batch.

  Attributes:
    text: the decoded text.
    pieces: the N strings that its tokens add to the text.
    tokens: int32[N].
    gates: float32[N, E].
  """

  text: str
  pieces: list[str]
  tokens: np.ndarray
  gates: np.ndarray

  @classmethod
  def of(cls, out: Generation, i: int) -> Row:
    """Returns row `i` of a batch, without its padding."""
    n = out.lengths[i]
    return cls(out.texts[i], out.pieces[i], out.tokens[i, :n], out.gates[i, :n])


@dataclasses.dataclass(frozen=True)
class Maker:
  """Generates the texts of many prompts in batches.

  Attributes:
    base: the frozen model.
    tokenizer: the base's.
    bank: the experts.
    router: decides their gates.
    decode: the settings; `batch` is the largest batch.
  """

  base: Llama
  tokenizer: Tokenizer
  bank: Bank
  router: Router
  decode: DecodeConfig

  def rows(
    self, prompts: Sequence[Sequence[int]], told: list[dict[str, float]]
  ) -> Iterator[list[tuple[int, Row]]]:
    """Yields a list of (index of the prompt, its text) for each batch.

    Args:
      prompts: the tokens of each prompt.
      told: the stats of each batch are appended to it, without the rows that
        pad a batch.
    """
    for places, batch in batches(prompts, self.decode.batch):
      *_, out = self.start(batch)
      share = sum(out.lengths[: len(places)]) / sum(out.lengths)
      told.append(
        {
          name: value * (share if name.startswith(_TOLD) else 1)
          for name, value in out.stats.items()
        }
      )
      yield [(place, Row.of(out, i)) for i, place in enumerate(places)]

  def tables(
    self, prompts: Sequence[Sequence[int]]
  ) -> Iterator[list[tuple[int, Table]]]:
    """Yields (index of the prompt, table of its texts under several gates)."""
    adapters, decode = self.bank.adapters, self.decode
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
      ("router, at the prompt", adapters, self.router, once),
      (f"router, every {every}", adapters, self.router, refreshed),
    ]
    for places, batch in batches(prompts, decode.batch):
      tables = [Table("gates", "text", show_lines=True) for _ in places]
      for name, some, chosen, config in variants:
        *_, out = Decoder(
          self.base, batch, some, chosen, config, self.tokenizer
        )
        for i, table in enumerate(tables):
          row = Row.of(out, i)
          text = Text(row.text)
          if some is not None:
            text = report.trace(row.pieces, row.gates, adapters.names)
          table.add_row(Text(name), text)
      yield list(zip(places, tables, strict=True))

  def start(
    self, batch: Sequence[Sequence[int]], chunked: bool = False
  ) -> Decoder:
    """Returns the decoder of a batch."""
    return Decoder(
      self.base, batch, self.bank.adapters, self.router, self.decode,
      self.tokenizer, chunked,
    )  # fmt: skip


def batches(
  prompts: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
  """Yields each batch's prompts with their indices.

  Short batches are padded with their last prompt, so that all batches share one
  compiled program.

  Args:
    prompts: the tokens of each prompt.
    size: the largest batch.

  Example:
    >>> list(batches([[1], [2], [3]], size=2))
    [([0, 1], [[1], [2]]), ([2], [[3], [3]])]
  """
  parts = make_batches([len(prompt) for prompt in prompts], size)
  rows = max(map(len, parts))
  for places in parts:
    batch = [prompts[place] for place in places]
    yield places, batch + batch[-1:] * (rows - len(batch))


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
  if args.compare:
    check_files(args, (), "cannot be used with --compare; leave out one")
  check_files(args, ("output", "html", "png"))
  given = read_prompts(args)
  base, tokenizer, bank = load(args)
  router = bank.router(args.router, named)
  maker = Maker(base, tokenizer, bank, router, args.decode)
  encoded = encode_all(
    given, tokenizer, base.config, args.decode.max_new_tokens
  )
  texts = [text for text, _ in encoded]
  prompts = [tokens for _, tokens in encoded]
  console.print(report.legend(bank.adapters.names))
  if args.compare:
    for place, table in in_order(maker.tables(prompts), len(prompts)):
      say_prompt(texts[place], console)
      console.print(table)
    return
  maps = []
  with NewLines("--output", args.output) as output:
    try:
      for place, row in rows_shown(maker, prompts, texts, console):
        output.add(json.dumps(record(args, texts[place], row, bank)))
        if args.html or args.png:
          maps.append(
            report.HeatMap(
              texts[place], row.pieces, row.gates, bank.adapters.names,
              facts(args),
            )
          )  # fmt: skip
    except KeyboardInterrupt:
      wrote = f"; {output.count} of {len(prompts)} texts are in {args.output}"
      raise KeyboardInterrupt(
        "stopped" + (wrote if args.output else "")
      ) from None
  if args.html:
    write_atomically(Path(args.html), report.heatmap_html(maps))
  if args.png:
    write_atomically(Path(args.png), report.heatmap_png(maps))


def rows_shown(
  maker: Maker,
  prompts: Sequence[Sequence[int]],
  texts: Sequence[str],
  console: Console,
) -> Iterator[tuple[int, Row]]:
  """Prints texts as they finish and yields them in the prompts' order.

  A single text is printed token by token.

  Args:
    maker: generates the texts.
    prompts: the tokens of each prompt.
    texts: the prompts as text.
    console: prints the texts.
  """
  names = maker.bank.adapters.names
  if len(prompts) == 1:
    say_prompt(texts[0], console)
    shown = 0
    for out in maker.start(prompts, chunked=True):
      row = Row.of(out, 0)
      console.print(
        report.trace(row.pieces[shown:], row.gates[shown:], names),
        end="", soft_wrap=True,
      )  # fmt: skip
      shown = len(row.pieces)
    say_summary(row, names, console)
    console.print(report.speed(out.stats), style="dim")
    yield 0, row
    return
  told = []
  for place, row in in_order(maker.rows(prompts, told), len(prompts)):
    say_prompt(texts[place], console)
    console.print(
      report.trace(row.pieces, row.gates, names), end="", soft_wrap=True
    )
    say_summary(row, names, console)
    yield place, row
  console.rule()
  console.print(report.speed(joined(told)), style="dim")


def joined(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns the joint stats of several batches, for `report.speed`.

  Args:
    told: the `Generation.stats` of each batch.

  Example:
    >>> slow = {"new_tokens": 8, "timed_tokens": 0, "tokens_per_second": 1.0}
    >>> fast = {"new_tokens": 8, "timed_tokens": 8, "tokens_per_second": 4.0}
    >>> joined([slow, fast])["tokens_per_second"]
    4.0
  """
  key = "timed_tokens"
  if not any(stats[key] for stats in told):
    key = "new_tokens"  # Every batch compiled, so no token was timed.
  made = sum(stats[key] for stats in told)
  seconds = sum(stats[key] / stats["tokens_per_second"] for stats in told)
  return {
    "new_tokens": sum(stats["new_tokens"] for stats in told),
    "timed_tokens": sum(stats["timed_tokens"] for stats in told),
    "tokens_per_second": made / seconds,
  }


def in_order(
  batches: Iterator[Sequence[tuple[int, Any]]], count: int
) -> Iterator[tuple[int, Any]]:
  """Yields the pairs of batches in the order of their indices, from 0.

  Shows a progress bar on stderr.

  Args:
    batches: lists of (index, value).
    count: number of pairs in all.

  Example:
    >>> list(in_order((b for b in ([(1, "b")], [(0, "a")])), count=2))
    [(0, 'a'), (1, 'b')]
  """
  waiting, following = {}, 0
  bar = Progress(
    *Progress.get_default_columns(), MofNCompleteColumn(),
    console=cli.console(stderr=True), transient=True, redirect_stdout=False,
    disable=count == 1,
  )  # fmt: skip
  task = bar.add_task("texts", total=count)
  with contextlib.closing(batches):
    while following < count:
      # Hide the bar between batches: texts may be printed to its terminal.
      with bar:
        batch = next(batches)
      waiting |= dict(batch)
      bar.advance(task, len(batch))
      while following in waiting:
        yield following, waiting.pop(following)
        following += 1


def record(
  args: Arguments, prompt: str, row: Row, bank: Bank
) -> dict[str, Any]:
  """Returns a text's line of `--output`, as a JSON object."""
  return {
    "prompt": prompt,
    "text": row.text,
    "tokens": row.tokens.tolist(),
    "gates": row.gates.astype(float).round(6).tolist(),
    **GateTrace.of(row.gates).record(),
    "experts": bank.adapters.names,
    "router": dataclasses.asdict(args.router),
    "decode": dataclasses.asdict(args.decode),
  }


def say_prompt(text: str, console: Console) -> None:
  """Prints a prompt below a rule."""
  console.rule()
  console.print(text, style="dim", markup=False)


def say_summary(row: Row, names: Sequence[str], console: Console) -> None:
  """Prints each expert's share and the switches of a text, below it."""
  told = report.summary(row.gates, names)
  console.print(f"\n{told}", style="dim", markup=False)


def check_files(args: Arguments, taken: Sequence[str], why: str = "") -> None:
  """Raises `InputError` if an output flag is not allowed or its file exists.

  Args:
    args: the flags.
    taken: the output flags that are allowed.
    why: the error for the others.
  """
  for name in ("output", "html", "png"):
    path = getattr(args, name)
    if path and name not in taken:
      raise InputError(f"--{name}: {why}")
    check_new_file(f"--{name}", path)


def facts(args: Arguments) -> dict[str, str]:
  """Returns the settings that a heat map shows, by name."""
  router, every = args.router, args.decode.refresh_every
  often = "every token" if every == 1 else f"every {every} tokens"
  return {
    "router": f"{router.name} ({router.encoder})"
    if router.name == "centroid"
    else router.name,
    "gates refreshed": often if every else "once, at the prompt",
  }
