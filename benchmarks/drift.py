"""Measures how far outputs with an older cache drift from a recomputed one.

  python -m benchmarks.drift --bank runs/smollm2_135m/bank --data-dir data

When gates change, the cache policy `reuse` keeps older keys and values, `remix`
applies the current gates to the values, and `recompute` runs the whole text
again. The first two are compared with the last on held-out prompts of four tasks,
with the true answers forced and the paper's router refreshed every 1, 2, 4, 8, 16
tokens or once. For each answer token: KL(recompute || policy) of the next-token
distributions in nats, whether the likeliest token is the same, and the loss.

`recompute` is a forward pass of the whole text for each answer token, so answers
are cut to --answer tokens. Writes OUTPUT.json, .md and .png.
"""

import collections
from collections.abc import Sequence
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import add_bank, make_parser, track
from tokenlora_jax import load_bank, load_base, load_tokenizer
from tokenlora_jax.commands import cli
from tokenlora_jax.config import DataConfig, RouterConfig
from tokenlora_jax.data.examples import held_out
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.evaluation.evaluator import Evaluator
from tokenlora_jax.mixing.mixture import Mixture
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask

BATCH = 8
# Texts are padded to a multiple of this, so that few shapes compile.
STEP = 64


@functools.partial(jax.jit, static_argnames="remix")
def read(base, loras, gates, tokens, remix):
  """Returns the last hidden states [B, T, D], gates [B, E] or [B, T, E]."""
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mixture = Mixture(get_rule("exact"), gates)
  hidden, _ = base(
    tokens, places, causal_mask(jnp.ones_like(tokens)),
    loras=loras, adapt=mixture, remix=mixture if remix else None,
  )  # fmt: skip
  return hidden


@jax.jit
def compare(base, true, other, targets):
  """Returns KL(true || other), top-1 agreement and both losses, each [N]."""
  p, q = (jax.nn.log_softmax(base.logits(x)) for x in (true, other))
  kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
  at = targets[:, None]
  losses = (-jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (p, q))
  return kl, same, *losses


def onward(base, loras, tokens, first, gates, remix) -> np.ndarray:
  """Returns an answer's hidden states [K, N, D] under K sequences of gates.

  The text is read once under each sequence [N, E] of the gates [K, N, E]; the
  prompt is read under the first.
  """
  ahead = np.repeat(gates[:, :1], first - 1, axis=1)
  table = pad(list(np.concatenate([ahead, gates], axis=1)))
  texts = pad([tokens[:-1]] * len(gates))
  hidden = read(base, loras, table, texts, remix)
  return np.asarray(hidden[:, first - 1 : len(tokens) - 1])


def anew(base, loras, tokens, first, gates) -> np.ndarray:
  """Returns an answer's hidden states [N, N, D] under each token's gates [N, E].

  At a refresh, `recompute` reads the text from the start under that token's
  gates; the tokens up to the next refresh use that reading.
  """
  found = []
  for start in range(0, len(gates), BATCH):
    part = gates[start : start + BATCH]
    filled = np.concatenate([part, np.tile(part[-1], (BATCH - len(part), 1))])
    hidden = read(base, loras, filled, pad([tokens[:-1]] * BATCH), False)
    found += list(np.asarray(hidden[: len(part), first - 1 : len(tokens) - 1]))
  return np.stack(found)


def pad(rows) -> np.ndarray:
  """Stacks arrays of different lengths, with zeros behind."""
  size = -(-max(map(len, rows)) // STEP) * STEP
  out = np.zeros((len(rows), size, *rows[0].shape[1:]), rows[0].dtype)
  for row, values in zip(out, rows, strict=True):
    row[: len(values)] = values
  return out


def measure(args) -> dict:
  """Returns {pace: {policy: figures}}, means over all answer tokens."""
  base = load_base(args.base, "float32")
  tokenizer = load_tokenizer(args.base)
  bank = load_bank(args.bank, base)
  router = bank.router(RouterConfig(minilm=args.minilm))
  names, loras = bank.adapters.names, bank.adapters.layers
  data = DataConfig(
    source="local", dir=args.data_dir, tasks=names, eval_rows=args.rows,
    bad_rows="skip", length=args.length,
  )  # fmt: skip
  rows = []
  for task in names:
    found = held_out(load_rows(data, task, "test"), tokenizer, data)
    for example in found.values():
      first = example.prompt_length
      rows.append(
        example._replace(tokens=example.tokens[: first + args.answer])
      )
  evaluator = Evaluator(base, bank.adapters, tokenizer)
  sums = collections.defaultdict(lambda: collections.defaultdict(float))
  for example in track(rows, "texts"):
    tokens, first = np.asarray(example.tokens), example.prompt_length
    targets = tokens[first:]
    places = np.arange(len(targets))
    # Where the gates of each token were decided, by pace.
    starts = [places // (n or len(places)) * n for n in args.every]
    gates = evaluator.gates(router, 1, [example])[0]
    courses = np.stack([gates[start] for start in starts])
    true = anew(base, loras, tokens, first, gates)
    fill = ((0, -len(targets) % 8), (0, 0))
    for policy in ("reuse", "remix"):
      others = onward(base, loras, tokens, first, courses, policy == "remix")
      for pace, start, course, other in zip(
        args.every, starts, courses, others, strict=True
      ):
        found = compare(
          base, np.pad(true[start, places], fill), np.pad(other, fill),
          np.pad(targets, fill[0]),
        )  # fmt: skip
        own = sums[f"{pace} {policy}"]
        parts = ("kl", "top1", "loss_recompute", "loss")
        for name, values in zip(parts, found, strict=True):
          own[name] += float(np.asarray(values)[: len(targets)].sum())
        own["tokens"] += len(targets)
        own["moved"] += float(np.abs(np.diff(course, axis=0)).sum() / 2)
  table = {
    key: {name: value / own["tokens"] for name, value in own.items()}
    | {"tokens": own["tokens"]}
    for key, own in sums.items()
  }
  return {"texts": len(rows), "settings": vars(args), "figures": table}


def markdown(result: dict) -> str:
  """Returns the figures as a table."""
  lines = [
    "| refresh every | policy | KL to recompute, nats | top-1 agreement | "
    "loss | loss of recompute |",
    "|---|---|---|---|---|---|",
  ]
  policies, figures = ("reuse", "remix"), result["figures"]
  for pace, policy in itertools.product(result["settings"]["every"], policies):
    own = figures[f"{pace} {policy}"]
    lines.append(
      f"| {pace or 'prompt'} | {policy} | {own['kl']:.6f} | {own['top1']:.2%} |"
      f" {own['loss']:.4f} | {own['loss_recompute']:.4f} |"
    )
  return "\n".join(lines) + "\n"


def plot(result: dict, file: Path) -> None:
  """Draws KL and loss by pace."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
  figures = result["figures"]
  paces = [p for p in result["settings"]["every"] if p]
  ticks = range(len(paces))
  for policy, colour, mark in (
    ("reuse", "#0072b2", "o"),
    ("remix", "#e69f00", "s"),
  ):
    own = [figures[f"{pace} {policy}"] for pace in paces]
    left.plot(ticks, [x["kl"] for x in own], color=colour, marker=mark,
              label=policy)  # fmt: skip
    right.plot(ticks, [x["loss"] for x in own], color=colour, marker=mark,
               label=policy)  # fmt: skip
  true = [figures[f"{pace} reuse"]["loss_recompute"] for pace in paces]
  right.plot(ticks, true, color="black", marker="^", label="recompute")
  left.set_ylabel("KL(recompute || policy), nats a token")
  right.set_ylabel("held-out loss, nats a token")
  for axes in (left, right):
    axes.set_xticks(list(ticks), [str(pace) for pace in paces])
    axes.set_xlabel("tokens between two refreshes")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
  left.set_ylim(bottom=0)
  figure.tight_layout()
  figure.savefig(file, dpi=150)


def main(argv: Sequence[str]) -> None:
  """Measures and writes."""
  parser = make_parser("benchmarks.drift", __doc__)
  add_bank(parser)
  parser.add_argument("--rows", type=int, default=25, help="prompts a task")
  parser.add_argument("--length", type=int, default=256, help="most tokens")
  parser.add_argument("--answer", type=int, default=24, help="tokens of each")
  parser.add_argument(
    "--every", type=int, nargs="+", default=[0, 16, 8, 4, 2, 1]
  )
  parser.add_argument("--output", default="drift")
  args = parser.parse_args(argv)
  result = measure(args)
  output = Path(args.output)
  output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
  output.with_suffix(".md").write_text(markdown(result))
  plot(result, output.with_suffix(".png"))
  print(markdown(result))


if __name__ == "__main__":
  cli.run(main)
