"""Measures decoding and training speed against a lower bound and a peer.

  python -m benchmarks                       everything, JSON on standard output
  python -m benchmarks --peer peft_bench.py  and the peer, in the same run
  make benchmark PEER=peft_bench.py          the same, with huge pages on Linux

Random weights, float32 by default, one device. A decode step is timed as the
difference of two lengths, so that neither prefill nor dispatch counts. The
floor of a decode step is the time to read its bytes once: those of the base,
and of the base and the adapters.

The peer is a script that takes `decode --mode base|cat|tle --size S --prompt P
--new N --rank R --experts E` and `train --size S --seq T --batch B --rank R`
and prints one line of JSON with `seconds_a_step`. It runs without
GLIBC_TUNABLES, since huge pages, which speed up our training, slow down its.
Figures compare only within one run on one otherwise idle machine.
"""

from collections.abc import Sequence
import json
import os
from pathlib import Path
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_parser
from tokenlora_jax import (
  DecodeConfig,
  generate,
  load_base,
  make_router,
  random_adapters,
)
from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, DataConfig, LoraConfig
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training.step import init_state, make_step, put_batch


def nbytes(tree) -> int:
  """Returns the bytes of all arrays of a tree."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bandwidth() -> float:
  """Returns the bytes a second of a matrix-vector product beyond all caches."""
  matrix = jnp.ones((8192, 8192), jnp.float32)
  vector = jnp.ones((1, 8192), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  multiply(vector, matrix).block_until_ready()
  best = np.inf
  for _ in range(5):
    start = time.perf_counter()
    multiply(vector, matrix).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return matrix.nbytes / best


def decode(args) -> dict[str, dict]:
  """Returns the seconds a decode step: base, fixed and refreshed mixture."""
  base = load_base(f"random:{args.size}", args.dtype)
  adapters = random_adapters(base, args.experts, args.rank)
  rng = np.random.default_rng(0)
  vocab, width = base.config.vocab, base.config.width
  prompts = rng.integers(3, vocab, (args.batch, args.prompt)).tolist()
  constant = make_router("uniform")
  hidden = make_router(
    "centroid",
    centroids=rng.standard_normal((args.experts, width)),
    encoder="hidden",
  )
  cases = {
    "base": (None, None, 0),
    "mixture": (adapters, constant, 0),
    "mixture, hidden router every token": (adapters, hidden, 1),
  }
  rate = bandwidth()
  short, long = 16, 16 + args.new

  def seconds(adapters, router, refresh_every, new):
    config = DecodeConfig(max_new_tokens=new, refresh_every=refresh_every)
    out = generate(base, prompts, adapters, router, config)
    return out.stats["decode_seconds"]

  times = {name: {short: [], long: []} for name in cases}
  # Turn by turn, so that what else the machine does falls on all alike.
  for turn in range(args.repeat + 1):
    for name, case in cases.items():
      for new in (short, long):
        taken = seconds(*case, new)
        if turn:  # The first turn compiles.
          times[name][new].append(taken)
  results = {}
  for name, (some, _, _) in cases.items():
    step = (min(times[name][long]) - min(times[name][short])) / args.new
    read = nbytes(base) + (nbytes(some.layers) if some else 0)
    # An untied embedding is looked up, not read.
    if not base.config.tied:
      read -= base.embedding[...].nbytes
    results[name] = {
      "seconds_a_step": step,
      "tokens_a_second": args.batch / step,
      "bytes_read": read,
      "floor_seconds": read / rate,
    }
  return results


def train(args) -> dict[str, dict]:
  """Returns the tokens a second of training: one adapter, and all at once."""
  config = PRESETS[args.size]
  base = load_base(f"random:{args.size}", args.dtype, stacked=True)
  rng = np.random.default_rng(0)
  results = {}
  for experts, rows in (
    (1, args.rows),
    (args.experts, args.rows // args.experts),
  ):
    shape = (experts, rows, args.seq)
    run = Config(
      lora=LoraConfig(rank=args.rank),
      data=DataConfig(
        tasks=("gsm8k", "arc_challenge", "codealpaca", "squad")[:experts],
        rows=rows,
      ),
      remat=args.remat,
    )
    mesh = make_mesh(run.mesh, devices=jax.devices()[:1])
    batch = put_batch(
      {
        "tokens": rng.integers(3, config.vocab, shape).astype(np.int32),
        "positions": np.broadcast_to(
          np.arange(args.seq, dtype=np.int32), shape
        ),
        "segment_ids": np.ones(shape, np.int32),
        "loss_mask": np.ones(shape, np.float32),
      },
      mesh,
    )
    state, step = init_state(run, base, mesh), make_step(run, mesh)
    best = np.inf
    for turn in range(args.repeat + 1):
      start = time.perf_counter()
      state, metrics = step(state, base, batch)
      jax.block_until_ready(metrics)
      if turn:
        best = min(best, time.perf_counter() - start)
    tokens = experts * rows * args.seq
    results[f"{experts} x {rows} x {args.seq}"] = {
      "seconds_a_step": best,
      "tokens_a_second": tokens / best,
      "flops_a_second": 4 * config.matmul_parameters * tokens / best,
    }
  return results


def peer(args) -> dict[str, dict]:
  """Returns the peer's figures, measured in processes of its own."""
  sizes = ["--size", args.size, "--rank", str(args.rank), "--dtype", args.dtype]
  decoding = ["--prompt", str(args.prompt), "--experts", str(args.experts)]
  decoding += ["--batch", str(args.batch)]
  runs = {
    mode: ["decode", "--mode", mode, *sizes, *decoding]
    for mode in ("base", "cat", "tle")
  }
  runs["train"] = ["train", *sizes, "--seq", str(args.seq)]
  runs["train"] += ["--batch", str(args.rows)]
  environment = dict(os.environ)
  environment.pop("GLIBC_TUNABLES", None)
  results = {}
  for name, flags in runs.items():
    command = [sys.executable, args.peer, *flags]
    # The best of a few, as ours.
    best = min(
      (
        json.loads(
          subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env=environment,
          ).stdout.splitlines()[-1]
        )
        for _ in range(2)
      ),
      key=lambda found: found["seconds_a_step"],
    )
    results[name] = {
      "seconds_a_step": best["seconds_a_step"],
      "tokens_a_second": best["tokens_a_second"],
    }
  return results


def ratios(decoding: dict, training: dict, peer: dict) -> dict[str, float]:
  """Returns the speed-up over the peer, and a mixture's cost in base steps."""

  def step(results, name):
    return results[name]["seconds_a_step"]

  found = {
    "mixture step / base step": step(decoding, "mixture")
    / step(decoding, "base")
  }
  if peer:
    for mode in ("cat", "tle"):
      found[f"peer {mode} step / mixture step"] = step(peer, mode) / step(
        decoding, "mixture"
      )
    ours = next(iter(training.values()))["tokens_a_second"]
    theirs = peer["train"]["tokens_a_second"]
    found["training tokens/s, one adapter / peer"] = ours / theirs
  return found


def main(argv: Sequence[str]) -> None:
  """Runs the benchmarks and prints one JSON object."""
  parser = make_parser("benchmarks", __doc__)
  parser.add_argument("--size", choices=PRESETS, default="smollm2-135m")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--experts", type=int, default=4)
  parser.add_argument("--rank", type=int, default=64)
  parser.add_argument("--prompt", type=int, default=256, help="tokens")
  parser.add_argument("--new", type=int, default=32, help="steps timed")
  parser.add_argument("--batch", type=int, default=1, help="texts decoded")
  parser.add_argument("--seq", type=int, default=128, help="T in training")
  parser.add_argument("--rows", type=int, default=8, help="rows of a step")
  parser.add_argument("--remat", default="elementwise")
  parser.add_argument("--repeat", type=int, default=5, help="the best counts")
  parser.add_argument("--peer", help="path of a peer's script")
  args = parser.parse_args(argv)
  if args.peer and not Path(args.peer).is_file():
    parser.error(f"--peer {args.peer}: there is no such file")
  training = train(args)
  decoding = decode(args)
  theirs = peer(args) if args.peer else {}
  print(
    json.dumps(
      {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "settings": vars(args),
        "decode": decoding,
        "train": training,
        "peer": theirs,
        "ratios": ratios(decoding, training, theirs),
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  cli.run(main)
