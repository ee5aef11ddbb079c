"""How many centroids an expert, and how sharp? Chosen on training rows alone.

  python -m benchmarks.clusters --data-dir data

c-BTM's gates for MiniLM's vectors of prompts. Centroids are of the first two
thirds of each task's training file, and the prompts of its end: files are sorted,
so that SQuAD's prompts there are about other articles. Prints the mean over the
tasks of the log of the own expert's gate, which chooses, that gate as a geometric
mean, and how many of the prompts it leads.
"""

from collections.abc import Sequence
import itertools

import jax.numpy as jnp
import numpy as np

from benchmarks import add_texts, make_parser
from tokenlora_jax import cli, make_router
from tokenlora_jax.config import DataConfig
from tokenlora_jax.data import load_rows, sample_rows
from tokenlora_jax.interop.minilm import load_minilm
from tokenlora_jax.mixing.routers import fit_centroids


def main(argv: Sequence[str]) -> None:
  """Prints a table, the best line last."""
  parser = make_parser("benchmarks.clusters", __doc__)
  add_texts(parser)
  parser.add_argument("--texts", type=int, default=128, help="a task")
  parser.add_argument("--prompts", type=int, default=64, help="a task")
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
  encoder = load_minilm(args.minilm)
  texts, prompts = [], []
  for task in data.tasks:
    rows = load_rows(data, task, "train")
    # Neighbours in a file are of one article: a few between are left out.
    cut, gap = 2 * len(rows) // 3, len(rows) // 30
    known = sample_rows(rows[:cut], args.texts)
    texts.append(encoder.embed([row.text for row in known]))
    asked = sample_rows(rows[cut + gap :], args.prompts)
    prompts.append(encoder.embed([row.prompt for row in asked]))
  print(f"| clusters | temperature | mean log | {' | '.join(data.tasks)} |")
  print("|---" * (3 + len(data.tasks)) + "|")
  found = []
  for count, temperature in itertools.product(args.clusters, args.temperatures):
    router = make_router(
      "cbtm",
      centroids=fit_centroids(texts, count),
      encoder="hidden",  # The vectors are at hand.
      temperature=temperature,
    )
    logs, cells = [], []
    for expert, vectors in enumerate(prompts):
      gates = np.asarray(router.gates(len(vectors), (), jnp.asarray(vectors)))
      logs.append(np.log(gates[:, expert]).mean())
      led = int((gates.argmax(axis=1) == expert).sum())
      cells.append(f"{np.exp(logs[-1]):.2f}, {led} of {len(vectors)}")
    line = f"| {count} | {temperature} | {np.mean(logs):.3f} |"
    found.append((np.mean(logs), f"{line} {' | '.join(cells)} |"))
    print(found[-1][1])
  print(f"\nbest:\n{max(found)[1]}")


if __name__ == "__main__":
  cli.run(main)
