"""Checks the posterior's bound, best expert's loss plus log E, on each row.

  python -m benchmarks.posterior --bank runs/reproduce/bank --data-dir data

The router `posterior` with the rule `probabilities`, refreshed at every token, is
a Bayesian mixture of the experts: of any text its loss is at most that of the best
expert plus log E nats. Checked on held-out rows, the whole text from its second
token on and the answer alone; a row that breaks the bound ends the program. Then
the mean losses an answer token beside the own adapter, uniform and the paper's
router, in nats.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from benchmarks import add_bank, make_parser, track
from tokenlora_jax import load_bank, load_base, load_tokenizer, make_router
from tokenlora_jax.commands import cli
from tokenlora_jax.config import DataConfig, RouterConfig
from tokenlora_jax.data.examples import Example, held_out
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.evaluation.evaluator import BATCH, Evaluator, Variant

# Two sums of float32 in another order.
ROUNDING = 1e-3


def losses(
  evaluator: Evaluator, variant: Variant, rows: Sequence[Example]
) -> np.ndarray:
  """Returns the loss of each row's answer, float64[rows], nats."""
  found = np.zeros(len(rows))
  for batch in evaluator.score(variant, rows):
    for one in batch:
      found[one.place] = one.losses.sum(dtype=np.float64)
  return found


def main(argv: Sequence[str]) -> None:
  """Checks the bound and prints a table."""
  parser = make_parser("benchmarks.posterior", __doc__)
  add_bank(parser)
  parser.add_argument("--rows", type=int, default=100, help="a task")
  args = parser.parse_args(argv)
  base, tokenizer = load_base(args.base, "float32"), load_tokenizer(args.base)
  bank = load_bank(args.bank, base)
  experts = bank.adapters.names
  data = DataConfig(
    source="local", dir=args.data_dir, tasks=experts, eval_rows=args.rows,
    bad_rows="skip",
  )  # fmt: skip
  evaluator = Evaluator(base, bank.adapters, tokenizer)
  alone = {
    name: Variant(make_router("one-hot", expert=name)) for name in experts
  }
  posterior = Variant(make_router("posterior"), 1, "probabilities")
  paper = RouterConfig(minilm=args.minilm)
  named = {
    "uniform": Variant(make_router("uniform")),
    "the paper's router, at the prompt": Variant(bank.router(paper)),
    "the paper's gates, `probabilities`": Variant(
      bank.router(paper), 0, "probabilities"
    ),
    "posterior, `probabilities`": posterior,
    "posterior from the paper's gates, `probabilities`": Variant(
      bank.router(dataclasses.replace(paper, name="posterior", prior="centroid")),
      1, "probabilities",
    ),
  }  # fmt: skip
  table = {name: [] for name in ("own adapter", *named)}
  worst, count, bound = {"text": 0.0, "answer": 0.0}, 0, math.log(len(experts))
  for task in experts:
    held = held_out(load_rows(data, task, "test"), tokenizer, data)
    names, rows = list(held), list(held.values())
    count += len(rows)
    tokens = sum(len(row.tokens) - row.prompt_length for row in rows)
    sums = dict.fromkeys(table, 0.0)
    parts = range(0, len(rows), BATCH)
    for start in track(parts, task):
      part = rows[start : start + BATCH]
      texts = [row._replace(prompt_length=1) for row in part]
      for what, some in (("text", texts), ("answer", part)):
        each = [losses(evaluator, one, some) for one in alone.values()]
        found = losses(evaluator, posterior, some) - np.min(each, axis=0)
        worst[what] = max(worst[what], found.max())
        for row, more in zip(names[start:], found, strict=False):
          if more > bound + ROUNDING:
            raise SystemExit(
              f"{task} {row}: the {what}'s loss is {more:.4f} nats above"
              f" the best expert's, more than log E = {bound:.4f}"
            )
      for name, variant in {"own adapter": alone[task], **named}.items():
        sums[name] += losses(evaluator, variant, part).sum()
    for name, total in sums.items():
      table[name].append(total / tokens)
  print(
    f"{count} rows: a text's loss exceeds the best expert's by at most"
    f" {worst['text']:.4f} nats, an answer's by {worst['answer']:.4f};"
    f" log E = {bound:.4f}\n"
  )
  print(f"| gates | {' | '.join(experts)} | average |")
  print("|---" * (len(experts) + 2) + "|")
  for name, found in table.items():
    cells = [f"{loss:.3f}" for loss in (*found, np.mean(found))]
    print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
  cli.run(main)
