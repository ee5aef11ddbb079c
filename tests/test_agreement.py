"""Evaluation says of answers what decoding them, token by token, says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import make_base

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.examples import LENGTH_STEP, Example
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.evaluation.evaluator import BATCH, Evaluator, Variant
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.mixing.shaping import shape_gates
from tokenlora_jax.model.lora import Adapters, Lora

# Rows of tokens, and how many of each are the prompt's.
ROWS = [
  ([1, 104, 50, 120, 88, 60, 61, 2], 5), ([1, 99, 70, 71, 72, 2], 2),
]  # fmt: skip
EXPERTS = 3
RULES = ("exact", "peft_linear", "peft040", "probabilities")
CACHES = ("reuse", "recompute", "remix")
SHAPES = (
  {}, {"top_k": 1}, {"temperature": 0.3}, {"threshold": 0.4},
  {"smoothing": 0.5}, {"top_k": 2, "temperature": 2.0, "smoothing": 0.25},
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turning(Router):
  """A person's own router: gates turn with the text, or with hidden states."""

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


@pytest.fixture(scope="module")
def base():
  return make_base()


@pytest.fixture(scope="module")
def adapters(base):
  """Three adapters that each say something else."""
  rng = np.random.default_rng(3)

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


@pytest.fixture(scope="module")
def routers(base, adapters):
  rng = np.random.default_rng(5)
  turns = jnp.array([0.3, 1.1, 2.3])
  near = rng.normal(size=(EXPERTS, base.config.width)).astype(np.float32)
  spread = np.full_like(near, 0.1)
  inside = {
    f"layers.{i}.{name}.{field}": rng.normal(size=shape).astype(np.float32)
    for i, layer in enumerate(adapters.layers)
    for name, lora in layer.items()
    for field, shape in {
      "weights": (EXPERTS, lora.a.shape[-1]), "bias": (EXPERTS,)
    }.items()
  }  # fmt: skip
  weights = {k: v for k, v in inside.items() if k.endswith("weights")}
  hidden = {"encoder": "hidden"}
  text = Turning(turns, "text")
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
      "hilora", means=near, variances=spread, adapters=adapters, **hidden
    ),
    "logo": make_router("logo", adapters=adapters),
    "posterior": make_router("posterior", prior=text, share=0.1),
    "posterior of all": make_router("posterior", evidence="all"),
    "arrow": make_router("arrow", adapters=adapters),
    "spectr": make_router("spectr", adapters=adapters),
    "lora-flow": make_router("lora-flow", adapters=adapters, arrays=inside),
    "switch": make_router("switch", adapters=adapters, arrays=weights),
    "x-lora": make_router("x-lora", adapters=adapters, arrays=inside),
  }


NAMES = (
  "base", "one-hot", "uniform", "sum", "fixed", "negative", "text", "hidden",
  "centroid", "cbtm", "ariadne", "lorauter", "classifier", "hilora", "logo",
  "posterior", "posterior of all", "arrow", "spectr", "lora-flow", "switch",
  "x-lora",
)  # fmt: skip


# Each kind of router, rule, cache policy and shape, paired as they compile to
# different programs. The first is what once stayed at one expert for ever.
COMBINATIONS = (
  ("posterior", "exact", "reuse", {"top_k": 1}, 1),
  ("posterior", "probabilities", "reuse", {"temperature": 0.3}, 2),
  ("posterior of all", "peft040", "reuse", {"smoothing": 0.5}, 1),
  ("text", "exact", "remix", SHAPES[5], 2),
  ("negative", "peft_linear", "reuse", {}, 1),
  ("hidden", "probabilities", "recompute", {}, 1),
  ("hilora", "exact", "reuse", {"top_k": 1}, 2),
  ("arrow", "exact", "reuse", {"threshold": 0.4}, 1),
  ("x-lora", "peft_linear", "recompute", {"temperature": 0.3}, 1),
)


def told(run):
  """What came of a run: arrays, or the line that refused it."""
  try:
    return run()
  except InputError as error:
    return str(error)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_evaluation_agrees_with_forced_decoding(
  base, adapters, routers, combination
):
  name, rule, cache, shape, every = combination
  router = shape_gates(routers[name], **shape)
  tokenizer = load_tokenizer("random:tiny")
  evaluator = Evaluator(base, adapters, tokenizer)
  examples = [
    Example(np.array(t, np.int32), np.ones(len(t), np.float32), n)
    for t, n in ROWS
  ]
  # Of the evaluator's shape, so that what it follows compiles once.
  rows = [*ROWS, *ROWS[-1:] * (BATCH - len(ROWS))]
  forced = np.zeros((BATCH, LENGTH_STEP), np.int32)
  for row, (tokens, size) in zip(forced, rows, strict=True):
    row[: len(tokens) - size] = tokens[size:]
  longest = max(len(t) - n for t, n in ROWS)
  *_, out = Decoder(
    base, [t[:n] for t, n in rows], adapters, router,
    DecodeConfig(longest, every, rule=rule, cache=cache, stop_at_eos=False),
    tokenizer, forced=forced,
  )  # fmt: skip
  scored = evaluator.score(Variant(router, every, rule, cache), examples)
  for one in itertools.chain(*scored):
    tokens, size = ROWS[one.place]
    count = len(tokens) - size
    np.testing.assert_allclose(
      one.losses, -out.log_probs[one.place, :count], atol=2e-4
    )
    np.testing.assert_allclose(
      one.gates, out.gates[one.place, :count], atol=5e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_both_refuse_the_same_in_one_line(base, adapters, routers, name):
  """Every rule and cache policy, with every shape."""
  tokenizer = load_tokenizer("random:tiny")
  evaluator = Evaluator(base, adapters, tokenizer)
  for shape, rule, cache in itertools.product(SHAPES, RULES, CACHES):
    router = told(lambda: shape_gates(routers[name], **shape))  # noqa: B023
    if isinstance(router, str):
      continue
    config = DecodeConfig(2, 1, rule=rule, cache=cache)
    variant = Variant(router, 1, rule, cache)
    decoder = told(
      lambda: Decoder(base, [[1]], adapters, router, config, tokenizer)  # noqa: B023
    )
    scored = told(lambda: list(evaluator.score(variant, [])))  # noqa: B023
    if isinstance(decoder, str) or isinstance(scored, str):
      assert decoder == scored
      assert "\n" not in scored
