"""lm-eval's `--model_args` and `--gen_kwargs`, as settings of ours."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from tokenlora_jax.config import (
  BaseConfig,
  DecodeConfig,
  RouterConfig,
  check,
  check_choice,
)
from tokenlora_jax.mixing.rules import get_rule

# Tokens that are made where a task does not say how many, as in lm-eval's hf.
MAX_GEN_TOKS = 256


@dataclasses.dataclass(frozen=True)
class ModelArgs:
  """What `--model_args` says.

  Attributes:
    base: `base` is its path; `dtype` and `quantize` are named as they are.
    router: `router` is its name; the other fields are named as they are.
    bank: the folder of a bank; empty is the base alone.
    same_base: go on with a bank whose base has another fingerprint.
    refresh_every: tokens between two router calls; 0 is once, at the context.
    rule: what the gates mean.
    batch_size: texts that are read, or made, at once.
    max_length: the most tokens that are read; 0 is the base's own.
    add_bos_token: whether texts begin with BOS; None is as the tokenizer does.
    seed: of sampled text.
  """

  base: BaseConfig
  router: RouterConfig
  bank: str = ""
  same_base: bool = False
  refresh_every: int = DecodeConfig.refresh_every
  rule: str = "exact"
  batch_size: int = 8
  max_length: int = 0
  add_bos_token: bool | None = None
  seed: int = DecodeConfig.seed

  def __post_init__(self):
    get_rule(self.rule)
    for field, least in (
      ("refresh_every", 0), ("batch_size", 1), ("max_length", 0), ("seed", 0),
    ):  # fmt: skip
      value = getattr(self, field)
      check(value >= least, f"model_args {field}", value, f"{least} or more")


def _defaults(cls: type, *left_out: str) -> dict[str, Any]:
  fields = dataclasses.fields(cls)
  return {f.name: f.default for f in fields if f.name not in left_out}


_BASE = _defaults(BaseConfig, "path")
# Training and fitting alone make centroids; numbers left out are the router's.
_ROUTER = _defaults(RouterConfig, "name", "centroid_rows", "clusters")
_ROUTER |= {"top_k": 0, "temperature": 1.0}
_MODEL = _defaults(ModelArgs, "base", "router")
_ALL = {"base": "", "router": RouterConfig.name, **_MODEL, **_ROUTER, **_BASE}


def parse_model_args(given: Mapping[str, Any]) -> ModelArgs:
  """Returns the settings of a model.

  Args:
    given: names and values; None and "none" stand for the default.

  Raises:
    InputError: there is no such name, or a value is not allowed.

  Example:
    >>> args = parse_model_args({"base": "random:tiny", "batch_size": "4"})
    >>> args.batch_size, args.base.dtype
    (4, 'bfloat16')
  """
  said = {}
  for name, value in given.items():
    check_choice("model_args", name, tuple(_ALL))
    if value is not None and value != "none":
      said[name] = _typed(name, value, _ALL[name])
  check("base" in said, "model_args base", None, "the path of a base")
  if "bank" not in said:
    for name in {"router", *_ROUTER} & said.keys():
      check(False, f"model_args {name}", said[name], "a bank with it")

  def some(names):
    return {name: said[name] for name in names if name in said}

  return ModelArgs(
    BaseConfig(said["base"], **some(_BASE)),
    RouterConfig(said.get("router", RouterConfig.name), **some(_ROUTER)),
    **some(_MODEL),
  )


def _typed(name: str, value: Any, default: Any) -> Any:
  """Returns a value in its default's type; the command line guesses types."""
  field = f"model_args {name}"
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if default is None or isinstance(default, bool):
    check(isinstance(value, bool), field, value, "true or false")
    return value
  if isinstance(default, str):
    # A folder may be called 7.
    check(isinstance(value, str) or is_number, field, value, "a text")
    return str(value)
  if isinstance(default, int):
    is_whole = str(value).removeprefix("-").isdecimal()
    check(is_whole, field, value, "a whole number")
    return int(value)
  if isinstance(default, float):
    check(is_number, field, value, "a number")
    return float(value)
  numbers = list(value) if isinstance(value, list | tuple) else [value]
  allowed = all(isinstance(x, int | float) for x in numbers)
  check(allowed, field, value, "numbers, as in [0.5,0.5]")
  return tuple(float(x) for x in numbers)


def parse_gen_kwargs(
  given: Mapping[str, Any], refresh_every: int
) -> DecodeConfig:
  """Returns how a request wants its text made; greedy by default.

  Args:
    given: `until`, `max_gen_toks` (or one of lm-eval's other words for it),
      `do_sample`, `temperature`, `top_k`, `top_p`.
    refresh_every: tokens between two router calls.

  Raises:
    InputError: there is no such setting, or a value is not allowed.

  Example:
    >>> config = parse_gen_kwargs({"until": ["END"], "max_gen_toks": 8}, 2)
    >>> config.max_new_tokens, config.stop, config.temperature
    (8, ('END',), 0.0)
  """
  settings = dict(normalize_gen_kwargs(dict(given), MAX_GEN_TOKS))
  sampling = ("temperature", "top_k", "top_p")
  for name in settings:
    allowed = ("until", "max_gen_toks", "do_sample", *sampling)
    check_choice("gen_kwargs", name, allowed)
  return DecodeConfig(
    settings["max_gen_toks"],
    refresh_every,
    # An empty text stands for the end token, which ends a text anyway.
    stop=tuple(text for text in settings["until"] if text),
    **{name: settings[name] for name in sampling if name in settings},
  )
