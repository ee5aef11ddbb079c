"""Checks that evaluation scores answers as token-by-token decoding does.

  python -m benchmarks.agreement
  python -m benchmarks.agreement --routers hidden,arrow

Every router under every shaping, rule and cache policy scores the same answers
twice, at a tiny base: by the evaluator, and by the decoder with the answers
forced. What one refuses the other must refuse in the same words. What was
compared, and the largest differences of losses and gates, is printed a line a
router; a difference beyond what float32 explains is printed with its combination
and is exit status 1. A router that looks inside the graph compiles anew for
each, so that all takes an hour of one core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_parser
from tokenlora_jax import load_base, load_tokenizer
from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.examples import LENGTH_STEP, Example
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.evaluation.evaluator import BATCH, Evaluator, Variant
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.mixing.shaping import shape_gates
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, Lora

RULES = ("exact", "peft_linear", "peft040", "probabilities")
CACHES = ("reuse", "recompute", "remix")
SHAPES = (
  {}, {"top_k": 1}, {"temperature": 0.3}, {"threshold": 0.4},
  {"smoothing": 0.5}, {"top_k": 2, "temperature": 2.0, "smoothing": 0.25},
)  # fmt: skip
# What float32 explains, of nats and of gates.
LOSSES, GATES = 2e-4, 5e-5
EXPERTS = 3
# Rows of tokens, and how many of each are the prompt's.
ROWS = (
  ([1, 104, 50, 120, 88, 60, 61, 2], 5), ([1, 99, 70, 71, 72, 2], 2),
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turning(Router):
  """A person's own router: gates turn with the text, or with hidden states.

  Attributes:
    turns: float32[E], how fast.
    needs: `text` or `hidden`.
  """

  turns: jax.Array
  needs: str = dataclasses.field(metadata={"static": True})

  @property
  def experts(self):
    return self.turns.shape[0]

  def observe(self, texts):
    if self.needs != "text":
      return ()
    return np.array([float(sum(map(ord, t)) % 97) for t in texts], np.float32)

  def gates(self, batch, observation, seen):
    x = observation if self.needs == "text" else seen.sum(axis=-1)
    return jax.nn.softmax(2 * jnp.sin(x[:, None] * self.turns))


def random_routers(
  adapters: Adapters, width: int, seed: int = 5
) -> dict[str, Router]:
  """Returns a router of every kind, by name.

  Args:
    adapters: E = 3 experts, `y` among them.
    width: of the base.
    seed: of what is fitted.
  """
  rng = np.random.default_rng(seed)
  turns = jnp.array([0.3, 1.1, 2.3])
  near = rng.normal(size=(EXPERTS, width)).astype(np.float32)
  inside = {
    f"layers.{i}.{name}.{field}": rng.normal(size=shape).astype(np.float32)
    for i, layer in enumerate(adapters.layers)
    for name, lora in layer.items()
    for field, shape in {
      "weights": (EXPERTS, lora.a.shape[-1]), "bias": (EXPERTS,)
    }.items()
  }  # fmt: skip
  weights = {k: v for k, v in inside.items() if k.endswith("weights")}
  vectors = {k.replace("weights", "vectors"): v for k, v in weights.items()}
  text, hidden = Turning(turns, "text"), {"encoder": "hidden"}
  layers = {"adapters": adapters}
  return {
    "base": make_router("base"),
    "one-hot": make_router("one-hot", expert="y"),
    "uniform": make_router("uniform"),
    "sum": make_router("sum"),
    "fixed": make_router("fixed", gates=[0.5, 0.2, 0.3]),
    "negative": make_router("fixed", gates=[0.5, -0.2, 0.3]),
    "text": text,
    "hidden": Turning(turns, "hidden"),
    "centroid": make_router("centroid", centroids=near, **hidden),
    "cbtm": make_router("cbtm", centroids=near, **hidden),
    "ariadne": make_router("ariadne", centroids=near, **hidden),
    "lorauter": make_router("lorauter", tasks=near, **hidden),
    "classifier": make_router(
      "classifier", weights=9 * near, bias=np.zeros(EXPERTS), **hidden
    ),
    "hilora": make_router(
      "hilora",
      means=near,
      variances=np.full_like(near, 0.1),
      **hidden,
      **layers,
    ),
    "logo": make_router("logo", **layers),
    "posterior": make_router("posterior", prior=text, share=0.1),
    "posterior of all": make_router("posterior", evidence="all"),
    "arrow": make_router("arrow", **layers),
    "spectr": make_router("spectr", **layers),
    "phatgoose": make_router("phatgoose", arrays=vectors, **layers),
    "lora-flow": make_router("lora-flow", arrays=inside, **layers),
    "switch": make_router("switch", arrays=weights, **layers),
    "x-lora": make_router("x-lora", arrays=inside, **layers),
  }


def random_experts(base: Llama, seed: int = 3) -> Adapters:
  """Returns three adapters that each say something else, and loudly."""
  rng = np.random.default_rng(seed)

  def lora(name):
    wide, out = base.config.projection_shapes[name]
    a = rng.normal(size=(EXPERTS, 2, wide)) / np.sqrt(wide)
    b = 2 * rng.normal(size=(EXPERTS, 2, out)) / np.sqrt(wide)
    return Lora(
      jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32),
      jnp.array([1.0, 0.5, 2.0]),
    )  # fmt: skip

  layers = [{n: lora(n) for n in ("q", "v")} for _ in range(base.config.layers)]
  return Adapters(("x", "y", "z"), tuple(layers))


class Difference(dict):
  """The largest differences: `losses` in nats, and `gates`."""

  @property
  def small(self) -> bool:
    """Whether float32 rounding explains them; False for NaN."""
    return self["losses"] <= LOSSES and self["gates"] <= GATES


class Pair:
  """Decoding and evaluation at one base, to be compared.

  Args:
    base: with its layers in a list.
    alike: decode batches of the evaluator's shape, so that a router that the
      evaluator follows by decoding compiles once; and then agrees to the bit.
  """

  def __init__(self, base: Llama, alike: bool = False):
    self.base = base
    self.alike = alike
    self.adapters = random_experts(base)
    self.routers = random_routers(self.adapters, base.config.width)
    self.tokenizer: Tokenizer = load_tokenizer("random:tiny")

  @functools.cached_property
  def _evaluator(self) -> Evaluator:
    return Evaluator(self.base, self.adapters, self.tokenizer)

  def compare(
    self, router: Router, rule: str, cache: str, every: int
  ) -> Difference | str:
    """Scores the rows both ways.

    Args:
      router: who decides the gates.
      rule: what they mean.
      cache: the cache policy.
      every: tokens between two router calls.

    Returns:
      How far the two are apart, or the line in which both refuse.

    Raises:
      AssertionError: one refuses, or another line than the other.
    """
    decoded = _told(lambda: self._decode(router, rule, cache, every))
    scored = _told(lambda: self._score(router, rule, cache, every))
    if isinstance(decoded, str) or isinstance(scored, str):
      assert decoded == scored, (decoded, scored)
      return decoded
    apart = Difference(losses=0.0, gates=0.0)
    for one in scored:
      tokens, size = ROWS[one.place]
      made = slice(len(tokens) - size)
      for name, ours, theirs in (
        ("losses", one.losses, -decoded.log_probs[one.place, made]),
        ("gates", one.gates, decoded.gates[one.place, made]),
      ):
        assert ours.shape == theirs.shape
        # One that is no number stays the largest.
        found = np.append(np.abs(ours - theirs), apart[name])
        apart[name] = float(found.max())
    return apart

  def refusal(self, router: Router, rule: str, cache: str) -> str:
    """Returns the line in which both refuse these, "" if neither does.

    Raises:
      AssertionError: one refuses, or in another line than the other.
    """
    variant = Variant(router, 1, rule, cache)
    config = DecodeConfig(2, 1, rule=rule, cache=cache)
    decoder = _told(
      lambda: Decoder(
        self.base, [[1]], self.adapters, router, config, self.tokenizer
      )
    )
    scored = _told(lambda: list(self._evaluator.score(variant, [])))
    if isinstance(decoder, str) or isinstance(scored, str):
      assert decoder == scored, (decoder, scored)
      return decoder
    return ""

  def _score(self, router, rule, cache, every):
    examples = [
      Example(np.array(t, np.int32), np.ones(len(t), np.float32), n)
      for t, n in ROWS
    ]
    variant = Variant(router, every, rule, cache)
    return [*itertools.chain(*self._evaluator.score(variant, examples))]

  def _decode(self, router, rule, cache, every):
    rows, longest = [*ROWS], max(len(t) - n for t, n in ROWS)
    length = longest
    if self.alike:
      rows, length = rows + rows[-1:] * (BATCH - len(rows)), LENGTH_STEP
    forced = np.zeros((len(rows), length), np.int32)
    for row, (tokens, size) in zip(forced, rows, strict=True):
      row[: len(tokens) - size] = tokens[size:]
    *_, out = Decoder(
      self.base, [t[:n] for t, n in rows], self.adapters, router,
      DecodeConfig(longest, every, rule=rule, cache=cache, stop_at_eos=False),
      self.tokenizer, forced=forced,
    )  # fmt: skip
    return out


def _told(run):
  """Returns a run's result, or the error line that refused it."""
  try:
    return run()
  except InputError as error:
    return str(error)


def shaped(router: Router, shape: Mapping[str, float]) -> Router | str:
  """Returns a router with its gates shaped, or the line that refused it."""
  return _told(lambda: shape_gates(router, **shape))


def main(argv: Sequence[str]) -> int:
  """Compares all, and returns the exit status."""
  parser = make_parser("benchmarks.agreement", __doc__)
  parser.add_argument("--routers", help="NAME,NAME; left out, all")
  parser.add_argument(
    "--every", type=int, default=1, help="decode.refresh-every"
  )
  args = parser.parse_args(argv)
  pair = Pair(load_base("random:tiny", "float32"))
  wrong = 0
  for name in args.routers.split(",") if args.routers else pair.routers:
    compared, refused, worst = 0, 0, Difference(losses=0.0, gates=0.0)
    for shape, rule, cache in itertools.product(SHAPES, RULES, CACHES):
      router = shaped(pair.routers[name], shape)
      found = router
      if not isinstance(router, str):
        found = pair.compare(router, rule, cache, args.every)
      if isinstance(found, str):
        refused += 1
        continue
      compared += 1
      worst = Difference({k: max(v, found[k]) for k, v in worst.items()})
      if not found.small:
        wrong += 1
        print(f"{name} {shape} {rule} {cache}: {dict(found)}", flush=True)
    # Their programs are of no use to another router.
    jax.clear_caches()
    print(
      f"{name}: {compared} compared, {refused} refused; losses within"
      f" {worst['losses']:.1e}, gates within {worst['gates']:.1e}",
      flush=True,
    )
  return int(wrong > 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
