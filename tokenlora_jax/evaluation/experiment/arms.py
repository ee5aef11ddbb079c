"""The arms of an experiment, which are the ways to mix that it compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from tokenlora_jax.config import InputError, RouterConfig, check_choice, nearest
from tokenlora_jax.evaluation.evaluator import Variant
from tokenlora_jax.mixing.mixture import resolve
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.mixing.shaping import shape_gates
from tokenlora_jax.model.lora import Adapters

CACHES = ("reuse", "recompute", "remix")

# The allowed variants; NAME is an expert, K a number of tokens.
VARIANTS = (
  "base", "own", "single", "adapter:NAME", "top1", "uniform", "sum", "prompt",
  "token:K",
)  # fmt: skip

# Rules that reproduce an adapter if its gate is 1 and the others are 0.
_SAME_ALONE = ("exact", "peft_linear", "probabilities")


class Arm(NamedTuple):
  """One way to mix: a line of the experiment's table.

  Attributes:
    variant: `base`; `own`, the adapter of the row's own task (see
      `own_experts`), an oracle, since no router knows the task; `adapter:NAME`,
      one adapter on all tasks; `top1`, the router's best adapter alone, chosen
      at the prompt; `uniform`; `sum`; `prompt`, the router's gates at the
      prompt; or `token:K`, new gates every K tokens.
    router: the router's name; "" without one.
    rule: how gates mix the adapters; "" without gates.
    cache: the policy for keys and values of older gates; "" if gates do not
      change.

  Example:
    >>> Arm("token:2", "centroid").pace, Arm("prompt", "centroid").pace
    (2, 0)
  """

  variant: str
  router: str = ""
  rule: str = ""
  cache: str = ""

  @property
  def label(self) -> str:
    """The arm's name in tables.

    Example:
      >>> Arm("token:2", "centroid", "exact", "reuse").label
      'token:2 centroid exact reuse'
    """
    return " ".join(part for part in self if part)

  @property
  def pace(self) -> int:
    """Tokens between two router calls; 0 is once, at the prompt."""
    kind, _, number = self.variant.partition(":")
    return int(number) if kind == "token" else 0


def own_experts(
  tasks: Sequence[str], experts: Mapping[str, str]
) -> dict[str, str]:
  """Returns each task's own expert.

  That is the expert with the task's name, or else the one trained on it.

  Args:
    tasks: the tasks.
    experts: {expert: the task it was trained on, or "" if unknown}.

  Raises:
    InputError: a task has no expert, or has several but none of its name.

  Example:
    >>> own_experts(["gsm8k", "squad"], {"mine": "gsm8k", "squad": ""})
    {'gsm8k': 'mine', 'squad': 'squad'}
  """
  own = {}
  for task in tasks:
    trained = [name for name, of in experts.items() if of == task]
    if task in experts:
      own[task] = task
    elif len(trained) == 1:
      (own[task],) = trained
    elif trained:
      raise InputError(
        f"--variants own: {', '.join(trained)} are of task {task!r}; choose one"
        f" with --variants adapter:{trained[0]}"
      )
    else:
      raise InputError(
        f"--variants own: {task!r} is not one of {', '.join(experts)}, nor does"
        f" the bank say it of one of them{nearest(task, experts)}"
      )
  return own


class Routers:
  """The routers of the arms; each is made once.

  Attributes:
    named: the arms' routers by name.
    own: {task: its own expert}; by default the expert of the task's name.

  Example:
    >>> routers = Routers({}, own={"gsm8k": "mine"})
    >>> variant = routers.variant(Arm("own", rule="exact"), "gsm8k")
    >>> variant.router.bind(["other", "mine"]).gates(1, (), None).tolist()
    [[0.0, 1.0]]
  """

  def __init__(
    self, named: Mapping[str, Router], own: Mapping[str, str] | None = None
  ):
    self.named = named
    self.own = own or {}
    self._made: dict[tuple[str, str], Router] = {}

  def variant(self, arm: Arm, task: str) -> Variant:
    """Returns the `Evaluator`'s variant for a cell.

    Args:
      arm: the arm.
      task: the rows' task, for `own`.
    """
    kind, _, name = arm.variant.partition(":")
    own = self.own.get(task, task)
    who = {"own": own, "adapter": name}.get(kind, arm.router)
    router = None
    if kind in ("prompt", "token"):
      router = self.named[arm.router]
    elif kind != "base":
      kind = "one-hot" if kind in ("own", "adapter") else kind
      if (kind, who) not in self._made:
        self._made[kind, who] = self._make(kind, who)
      router = self._made[kind, who]
    return Variant(router, arm.pace, arm.rule or "exact", arm.cache or "reuse")

  def _make(self, kind: str, who: str) -> Router:
    if kind == "top1":
      return shape_gates(self.named[who], top_k=1)
    return make_router(kind, **({"expert": who} if kind == "one-hot" else {}))


def router_config(
  text: str, default: RouterConfig
) -> tuple[RouterConfig, frozenset[str]]:
  """Parses one value of `--routers`.

  Args:
    text: a router's name, or `NAME:SETTING=VALUE,SETTING=VALUE`.
    default: the config's router settings, for those that are not given.

  Returns:
    (the settings, the names of those that the text gives).

  Raises:
    InputError: there is no such setting, or its value is not allowed.

  Example:
    >>> text = "centroid:encoder=hidden,top-k=2"
    >>> made, given = router_config(text, RouterConfig())
    >>> made.name, made.encoder, made.top_k, sorted(given)
    ('centroid', 'hidden', 2, ['encoder', 'top_k'])
  """
  name, _, rest = text.partition(":")
  hints = get_type_hints(type(default))
  # Commas separate settings, so no value may be a list.
  known = {
    field: get_args(hint) or (hint,)
    for field, hint in hints.items()
    if get_origin(hint) is not tuple and field != "name"
  }
  changes: dict[str, Any] = {"name": name}
  for part in filter(None, rest.split(",")):
    key, _, value = part.partition("=")
    field = key.replace("-", "_")
    check_choice(f"--routers {text}", field, list(known))
    number = next((x for x in (float, int) if x in known[field]), str)
    try:
      changes[field] = number(value)
    except ValueError:
      raise InputError(
        f"--routers {text}: {field} {value!r} is not allowed; want a number"
      ) from None
  return dataclasses.replace(default, **changes), frozenset(changes) - {"name"}


def make_arms(
  variants: Sequence[str],
  routers: Routers,
  rules: Sequence[str],
  caches: Sequence[str],
  adapters: Adapters,
) -> tuple[list[Arm], list[str]]:
  """Returns the arms to run, and one line for each that is left out.

  Args:
    variants: names as in `VARIANTS`; `single` is each adapter alone.
    routers: the routers, made for these adapters.
    rules: the rules to compare.
    caches: the cache policies to compare.
    adapters: the experts.

  Returns:
    (arms, each once, in the order of the variants; the reasons why other
    combinations are left out).

  Raises:
    InputError: a variant, rule or policy does not exist.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> wanted = ["base", "single"]
    >>> arms, _ = make_arms(wanted, Routers({}), ["exact"], [], adapters)
    >>> [arm.label for arm in arms]
    ['base', 'adapter:e0 exact', 'adapter:e1 exact']
  """
  for rule in rules:
    get_rule(rule)
  for cache in caches:
    check_choice("--caches", cache, CACHES)
  wanted: list[Arm] = []
  skipped: list[str] = []
  for variant in _spelled_out(variants, adapters.names):
    for arm, why in _arms_of(variant, routers.named, rules, caches):
      if arm in wanted:
        continue
      router = routers.variant(arm, adapters.names[0]).router
      if not why and router is not None:
        try:
          resolve(arm.rule, arm.cache, router, adapters)
        except InputError as error:
          why = str(error)
      if why:
        skipped.append(f"{arm.label} is left out: {why}")
      else:
        wanted.append(arm)
  return wanted, list(dict.fromkeys(skipped))


def _spelled_out(
  variants: Sequence[str], experts: Sequence[str]
) -> Iterator[str]:
  """Yields variants, `single` as one per adapter, or raises `InputError`."""
  for variant in variants:
    kind, colon, what = variant.partition(":")
    if variant == "single":
      yield from (f"adapter:{name}" for name in experts)
    elif kind == "adapter" and colon:
      check_choice("--variants adapter", what, experts)
      yield variant
    elif kind == "token" and colon:
      if not what.isdecimal() or int(what) < 1:
        raise InputError(
          f"--variants: {variant!r} is not allowed; want token:K, K tokens"
          " between two router calls, at least 1"
        )
      yield f"token:{int(what)}"
    elif variant in VARIANTS and not variant.endswith(("NAME", "K")):
      yield variant
    else:
      raise InputError(
        f"--variants: {variant!r} is not one of {', '.join(VARIANTS)}"
        f"{nearest(variant, VARIANTS)}"
      )


def _arms_of(
  variant: str,
  routers: Mapping[str, Router],
  rules: Sequence[str],
  caches: Sequence[str],
) -> Iterator[tuple[Arm, str]]:
  """Yields (an arm of a variant, the reason to leave it out or "")."""
  kind = variant.partition(":")[0]
  if kind == "base":
    yield Arm(variant), ""
  elif kind in ("own", "adapter"):
    alike = [rule for rule in rules if rule in _SAME_ALONE]
    for rule in rules:
      same = rule in alike[1:]
      why = f"the same as under {alike[0]}, an adapter alone" if same else ""
      yield Arm(variant, "", rule), why
  elif kind in ("uniform", "sum"):
    for rule in rules:
      same = kind == "sum" and get_rule(rule).of_outputs
      why = "weights of predictions have the sum 1: uniform" if same else ""
      yield Arm(variant, "", rule), why
  elif kind in ("top1", "prompt"):
    for router, rule in itertools.product(routers, rules):
      yield Arm(variant, router, rule), ""
  else:
    for name, rule, cache in itertools.product(routers, rules, caches):
      router, why = routers[name], ""
      if router.at_prompt_only or router.needs in ("nothing", "prompt"):
        when = "at each token" if router.prototypes else "at the prompt"
        why = f"this router decides {when} whatever K is, the same as prompt"
      elif get_rule(rule).of_outputs and cache != caches[0]:
        why = f"each expert reads alone, the same as {caches[0]}"
      yield Arm(variant, name, rule, cache), why
