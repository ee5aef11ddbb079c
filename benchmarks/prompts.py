"""Selects the router that finds a prompt's task best, on training rows alone.

  python -m benchmarks.prompts --data-dir data

c-BTM's gates, by clusters and temperature, and the classifier's, for both encoders.
Routers are fitted on the first two thirds of each task's training file, and the
prompts are from its end: files are sorted, so SQuAD's prompts there are about
other articles. Prints the log of the own expert's gate, averaged over tasks, which
is the criterion; and for each task the geometric mean of that gate, and the number
of prompts that the own expert leads.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks import add_texts, make_parser, track
from tokenlora_jax import load_base, load_tokenizer, make_router
from tokenlora_jax.commands import cli
from tokenlora_jax.config import DataConfig
from tokenlora_jax.data.rows import load_rows, sample_rows
from tokenlora_jax.encoders import HiddenEncoder
from tokenlora_jax.formats.minilm import load_minilm
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import fit_centroids, fit_classifier


def routers(args, texts, prompts) -> Iterator[tuple[str, Router]]:
  """Yields routers that know vectors of texts and of their prompts, by label."""
  # The vectors that they are asked about are at hand.
  at_hand = {"encoder": "hidden"}
  for count in args.clusters:
    table = {"centroids": fit_centroids(texts, count)}
    for temperature in args.temperatures:
      yield (
        f"cbtm, clusters {count}, temperature {temperature}",
        make_router("cbtm", temperature=temperature, **table, **at_hand),
      )
  both = [np.concatenate(pair) for pair in zip(texts, prompts, strict=True)]
  yield (
    "classifier",
    make_router("classifier", **fit_classifier(both), **at_hand),
  )


def main(argv: Sequence[str]) -> None:
  """Prints a table, the best line last."""
  parser = make_parser("benchmarks.prompts", __doc__)
  add_texts(parser)
  parser.add_argument("--rows", type=int, default=128, help="known, a task")
  parser.add_argument("--prompts", type=int, default=64, help="asked, a task")
  parser.add_argument(
    "--clusters", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32]
  )
  parser.add_argument(
    "--temperatures",
    type=float,
    nargs="+",
    default=[0.1, 0.07, 0.05, 0.035, 0.025],
  )
  args = parser.parse_args(argv)
  data = DataConfig(source="local", dir=args.data_dir, bad_rows="skip")
  known, asked = [], []
  for task in data.tasks:
    rows = load_rows(data, task, "train")
    # Neighbours in a file are of one article: a few between are left out.
    cut, gap = 2 * len(rows) // 3, len(rows) // 30
    known.append(sample_rows(rows[:cut], args.rows))
    asked.append(sample_rows(rows[cut + gap :], args.prompts))
  base, tokenizer = load_base(args.base, "float32"), load_tokenizer(args.base)
  encoders = {
    "minilm": load_minilm(args.minilm),
    "hidden": HiddenEncoder(base, tokenizer, data.length),
  }
  print(f"| encoder | router | mean log | {' | '.join(data.tasks)} |")
  print("|---" * (3 + len(data.tasks)) + "|")
  found = []
  for name, encoder in encoders.items():
    texts, prompts, others = (
      [encoder.embed(some) for some in track(every, f"{name} vectors")]
      for every in (
        [[row.text for row in rows] for rows in known],
        [[row.prompt for row in rows] for rows in known],
        [[row.prompt for row in rows] for rows in asked],
      )
    )
    for label, router in routers(args, texts, prompts):
      logs, cells = [], []
      for expert, vectors in enumerate(others):
        gates = np.asarray(router.gates(len(vectors), (), jnp.asarray(vectors)))
        logs.append(np.log(gates[:, expert]).mean())
        led = int((gates.argmax(axis=1) == expert).sum())
        cells.append(f"{np.exp(logs[-1]):.2f}, {led} of {len(vectors)}")
      line = f"| {name} | {label} | {np.mean(logs):.3f} | {' | '.join(cells)} |"
      found.append((np.mean(logs), line))
      print(line)
  print(f"\nbest:\n{max(found)[1]}")


if __name__ == "__main__":
  cli.run(main)
