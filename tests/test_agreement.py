"""Evaluation says of answers what decoding them, token by token, says.

Every router under every rule, cache policy and shape, and every rule under every
cache policy; `python -m benchmarks.agreement` takes all of them together.

Compiling is nearly all that this costs. So routers of one kind are one program
here, which is given which of them to ask, and so are the shapes.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from slow import make_base

from benchmarks.agreement import CACHES, RULES, SHAPES, Pair, shaped
from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.mixture import resolve
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.shaping import ShapedRouter, Shaping

# Routers of one kind: what they look at, and where they decide.
KINDS = (
  (
    "base", "one-hot", "uniform", "sum", "fixed", "negative", "text",
    "ariadne", "lorauter", "logo",
  ),
  ("hidden", "centroid", "cbtm", "classifier"),
  ("posterior", "posterior of all"),
  ("hilora",),
  ("arrow", "spectr", "phatgoose", "switch"),
  ("lora-flow",),
  ("x-lora",),
)  # fmt: skip
NAMES = tuple(itertools.chain(*KINDS))
KIND = {name: i for i, kind in enumerate(KINDS) for name in kind}


def pick(which, choices):
  """Returns what one of the choices returns, in the graph or outside."""
  if isinstance(which, jax.core.Tracer):
    return jax.lax.switch(which, choices)
  return choices[int(which)]()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneOf(Router):
  """One of several routers of a kind; which, is data.

  Attributes:
    routers: of one kind.
    which: int32[].
  """

  routers: tuple[Router, ...]
  which: jax.Array

  @property
  def needs(self):
    return self.routers[0].needs

  @property
  def experts(self):
    return self.routers[0].experts

  # Whose these are is asked outside the graph alone.
  @property
  def prior(self):
    return self.routers[int(self.which)].prior

  @property
  def counts_prompt(self):
    return self.routers[int(self.which)].counts_prompt

  @property
  def prototypes(self):
    return tuple(
      {name: tuple(one[name] for one in layer) for name in layer[0]}
      for layer in zip(*(r.prototypes for r in self.routers), strict=True)
    )

  def bind(self, names):
    routers = tuple(router.bind(names) for router in self.routers)
    return dataclasses.replace(self, routers=routers)

  def gates(self, batch, observation, seen):
    return pick(
      self.which,
      [lambda r=r: r.gates(batch, observation, seen) for r in self.routers],
    )

  def position_gates(self, prototype, lora, x, low):
    return pick(
      self.which,
      [
        lambda r=r, p=p: r.position_gates(p, lora, x, low)
        for r, p in zip(self.routers, prototype, strict=True)
      ],
    )

  def learn(self, belief, log_probs):
    return pick(
      self.which, [lambda r=r: r.learn(belief, log_probs) for r in self.routers]
    )


@pytest.fixture(scope="module")
def pair():
  return Pair(make_base(), alike=True)


def fits(pair, name, rule, cache, shape):
  """Whether these may be combined."""
  return _fits(pair, name, rule, cache, SHAPES.index(shape))


@functools.cache
def _fits(pair, name, rule, cache, shape):
  router = shaped(pair.routers[name], SHAPES[shape])
  if isinstance(router, str):
    return False
  try:
    resolve(rule, cache, router, pair.adapters)
  except InputError:
    return False
  return True


def as_data(pair, name, rule, shape):
  """Returns a router with its gates shaped, of its kind's one program."""
  kind, router = KINDS[KIND[name]], pair.routers[name]
  if len(kind) > 1 and kind != KINDS[0]:
    routers = tuple(pair.routers[n] for n in kind)
    router = OneOf(routers, jnp.int32(kind.index(name)))
  # What each is where it is off.
  numbers = {"threshold": -jnp.inf, "smoothing": 0.0, "temperature": 1.0}
  numbers |= {"top_k": len(pair.adapters.names)} | shape
  if router.may_be_negative:
    del numbers["temperature"], numbers["top_k"]
  if rule == "probabilities":
    del numbers["threshold"]
  return ShapedRouter(
    router,
    Shaping(**{name: jnp.asarray(value) for name, value in numbers.items()}),
  )


def turned(values, by):
  """Returns values from another one on, and then the first."""
  by %= len(values)
  return values[by:] + values[:by]


def combinations(pair, name):
  """Returns (rule, cache policy, shape)s of a router, few programs in all.

  A pair of a rule and a policy is a program of the router's kind: each rule has
  one, and each policy, which differ from kind to kind. The shapes take turns.
  """
  kind, turn = KIND[name], KINDS[KIND[name]].index(name)
  every = [
    (rule, turned(CACHES, kind + i + j)[0])
    for j in range(len(CACHES))
    for i, rule in enumerate(RULES)
  ]
  may = [(r, c) for r, c in every if fits(pair, name, r, c, {})]
  programs, rules, caches = [], set(), set()
  for rule, cache in may:
    if rule not in rules or cache not in caches:
      programs.append((rule, cache))
      rules.add(rule)
      caches.add(cache)
  chosen, met = [], dict.fromkeys(programs, 0)
  for shape in turned(SHAPES, turn):
    fit = [p for p in programs if fits(pair, name, *p, shape)]
    if fit:
      program = min(fit, key=met.get)
      met[program] += 1
      chosen.append((*program, shape))
  return chosen + [(*program, {}) for program in programs if not met[program]]


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_agrees_with_forced_decoding(pair, name):
  for rule, cache, shape in combinations(pair, name):
    router = as_data(pair, name, rule, shape)
    # Some rules at one pace, the others at another.
    found = pair.compare(router, rule, cache, 1 + RULES.index(rule) % 2)
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
  assert sorted(pair.routers) == sorted(NAMES)
  for shape in SHAPES:
    router = shaped(pair.routers[name], shape)
    if isinstance(router, str):
      assert "\n" not in router
      continue
    for rule, cache in itertools.product(RULES, CACHES):
      line = pair.refusal(router, rule, cache)
      fit = fits(pair, name, rule, cache, shape)
      assert "\n" not in line
      assert fit == (not line)
