"""Evaluation says of answers what decoding them, token by token, says.

Every router under every rule, cache policy and shape, and every rule under every
cache policy; `python -m benchmarks.agreement` takes all of them together.
"""

import itertools

import jax.numpy as jnp
import pytest
from slow import make_base

from benchmarks.agreement import CACHES, RULES, SHAPES, Pair, shaped
from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.mixture import resolve
from tokenlora_jax.mixing.shaping import ShapedRouter, Shaping

NAMES = (
  "base", "one-hot", "uniform", "sum", "fixed", "negative", "text", "hidden",
  "centroid", "cbtm", "ariadne", "lorauter", "classifier", "hilora", "logo",
  "posterior", "posterior of all", "arrow", "spectr", "phatgoose", "lora-flow",
  "switch", "x-lora",
)  # fmt: skip
# Shapes that are data of one program, then one of each other.
PLAIN = ({}, {"temperature": 0.3}, {"smoothing": 0.5})
GROUPS = (PLAIN, *((s,) for s in SHAPES if s not in PLAIN))


@pytest.fixture(scope="module")
def pair():
  return Pair(make_base(), alike=True)


def fits(pair, name, rule, cache, shape):
  """Whether these may be combined."""
  router = shaped(pair.routers[name], shape)
  if isinstance(router, str):
    return False
  try:
    resolve(rule, cache, router, pair.adapters)
  except InputError:
    return False
  return True


def turned(values, by):
  """Returns values from another one on, and then the first."""
  by %= len(values)
  return values[by:] + values[:by]


def combinations(pair, name):
  """Returns (rule, cache policy, shape)s of a router, few programs in all.

  The fewest, greedily, that have each rule, policy and shape that the router may
  have. From router to router others meet.
  """
  turn, programs = NAMES.index(name), []
  for rule, cache, shapes in itertools.product(
    turned(RULES, turn), turned(CACHES, turn // 4), turned(GROUPS, turn)
  ):
    fit = [(rule, cache, s) for s in shapes if fits(pair, name, rule, cache, s)]
    programs.append(fit)
  chosen, known = [], set()
  while True:
    new = [{str(x) for one in fit for x in one} - known for fit in programs]
    best = max(range(len(new)), key=lambda i: len(new[i]))
    if not new[best]:
      return chosen
    chosen += programs[best]
    known |= new[best]


def as_data(router, shape):
  """Returns a router with its gates shaped, of the group's one program."""
  if router.may_be_negative:
    return shaped(router, shape)
  numbers = {"temperature": 1.0, "smoothing": 0.0} | shape
  top_k = numbers.pop("top_k", 0)
  return ShapedRouter(
    router,
    Shaping(**{k: jnp.float32(v) for k, v in numbers.items()}, top_k=top_k),
  )


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_agrees_with_forced_decoding(pair, name):
  for rule, cache, shape in combinations(pair, name):
    router = as_data(pair.routers[name], shape)
    # Each router at one pace, every other at another.
    found = pair.compare(router, rule, cache, 1 + NAMES.index(name) % 2)
    assert not isinstance(found, str), found
    assert found.small, (rule, cache, shape, found)


def test_a_shaped_posterior_does_not_stay_at_one_expert(pair):
  """Its belief is not shaped, in evaluation as little as in decoding."""
  router = shaped(pair.routers["posterior"], {"top_k": 1})
  assert pair.compare(router, "exact", "reuse", 1).small


def test_what_may_be_combined_is(pair):
  """Each router meets each rule, policy and shape; each rule each policy."""
  together = set()
  for name in NAMES:
    done = combinations(pair, name)
    together |= {(rule, cache) for rule, cache, _ in done}
    may = [
      (rule, cache, shape)
      for rule, cache, shape in itertools.product(RULES, CACHES, SHAPES)
      if fits(pair, name, rule, cache, shape)
    ]
    for i in range(3):
      assert {str(x[i]) for x in done} == {str(x[i]) for x in may}, (name, i)
  assert together == set(itertools.product(RULES, CACHES))


@pytest.mark.parametrize("name", NAMES)
def test_both_refuse_the_same_in_one_line(pair, name):
  """Every rule and cache policy, with every shape."""
  assert list(pair.routers) == list(NAMES)
  for shape, rule, cache in itertools.product(SHAPES, RULES, CACHES):
    router = shaped(pair.routers[name], shape)
    if isinstance(router, str):
      assert "\n" not in router
      continue
    line = pair.refusal(router, rule, cache)
    assert ("\n" not in line) if line else fits(pair, name, rule, cache, shape)
