"""Measures tokens a second in batches, and for one prompt at a time.

  python -m benchmarks.batches --bank runs/demo/bank

Takes the demo's held-out prompts as `infer.py --prompts-file` would, makes their
texts with each `decode.batch` in turn, turn after turn, and says how many
tokens a second each makes, as infer.py says it: calls that compile are left out,
and so is the reading of the prompts. Greedy texts must be equal; where one is
not, the two tokens that part it are told with the gap of their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from benchmarks import make_parser, track
from tokenlora_jax import load_bank, load_base, load_tokenizer
from tokenlora_jax.commands import cli
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.data.tokens import encode_prompt
from tokenlora_jax.decoding import Decoder, filled_batches, joined_pace


def difference(
  ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> str:
  """Returns where two texts part, or "" where they are equal.

  Args:
    ours: int32[N] tokens and float32[N], their log-probabilities.
    theirs: the same of the other text.

  Example:
    >>> one, other = np.array([1, 2]), np.array([1, 3])
    >>> difference((one, np.array([-1, -0.5])), (other, np.array([-1, -0.75])))
    'token 1: 2 or 3, 2.5e-01 apart'
  """
  if np.array_equal(ours[0], theirs[0]):
    return ""
  count = min(len(ours[0]), len(theirs[0]))
  place = int(np.argmax(ours[0][:count] != theirs[0][:count]))
  gap = abs(float(ours[1][place] - theirs[1][place]))
  return (
    f"token {place}: {ours[0][place]} or {theirs[0][place]}, {gap:.1e} apart"
  )


def main(argv: Sequence[str]) -> None:
  """Prints a table."""
  parser = make_parser("benchmarks.batches", __doc__)
  parser.add_argument("--bank", required=True)
  parser.add_argument("--config", default="configs/demo.py")
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64])
  parser.add_argument("--new", type=int, default=48, help="tokens a text")
  parser.add_argument("--turns", type=int, default=2)
  parser.add_argument(
    "--whole", action="store_true", help="no end token ends a text"
  )
  args = parser.parse_args(argv)
  config = cli.read_config(args.config)
  base = load_base(config.base.path, config.base.dtype)
  tokenizer = load_tokenizer(config.base.path)
  bank = load_bank(args.bank, base)
  router = bank.router(config.router)
  tasks = config.data.tasks
  data = dataclasses.replace(config.data, eval_rows=args.prompts)
  found = [load_rows(data, task, "test") for task in tasks]
  # The tasks in turn, as in a file of anybody's prompts.
  prompts = [
    encode_prompt(row.prompt, tokenizer)
    for rows in zip(*found, strict=False)
    for row in rows
  ][: args.prompts]
  decode = dataclasses.replace(
    config.decode, max_new_tokens=args.new, stop_at_eos=not args.whole
  )
  sizes = [1, *args.sizes]
  told = {size: [] for size in sizes}
  made = {size: {} for size in sizes}
  for _ in track(range(args.turns), "turns"):
    for size in sizes:
      for places, batch in filled_batches(prompts, size):
        *_, out = Decoder(base, batch, bank.adapters, router, decode, tokenizer)
        told[size].append(out.stats)
        for i, place in enumerate(places):
          n = out.lengths[i]
          made[size][place] = out.tokens[i, :n], out.log_probs[i, :n]
  print("| decode.batch | tokens/s | times one at a time | texts that differ |")
  print("|---|---|---|---|")
  alone = joined_pace(told[1])["tokens_per_second"]
  parted = []
  for size in sizes:
    apart = [difference(made[1][i], made[size][i]) for i in made[1]]
    apart = [one for one in apart if one]
    parted += apart
    rate = joined_pace(told[size])["tokens_per_second"]
    print(f"| {size} | {rate:.1f} | {rate / alone:.2f} | {len(apart)} |")
  for one in parted:
    print(one)


if __name__ == "__main__":
  cli.run(main)
