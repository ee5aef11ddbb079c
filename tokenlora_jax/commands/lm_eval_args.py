"""Parses lm-eval's `--model_args` and `--gen_kwargs` into our configs."""

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

# New tokens if a task sets no number, as in lm-eval's `hf` model.
MAX_GEN_TOKS = 256


@dataclasses.dataclass(frozen=True)
class ModelArgs:
  """The settings of `--model_args`.

  Attributes:
    base: its path is the key `base`; `dtype` and `quantize` are keys too.
    router: its name is the key `router`; its other fields are keys too.
    given: the fields of `router` that were given.
    bank: the folder of a bank; empty is the base alone.
    same_base: accept a bank whose base has another fingerprint.
    refresh_every: tokens between two router calls; 0 is once, at the context.
    rule: how gates mix the adapters.
    batch_size: texts in a batch.
    max_length: the most tokens of a text; 0 is the base's own limit.
    add_bos_token: whether texts begin with BOS; None is the tokenizer's choice.
    seed: of sampling.
  """

  base: BaseConfig
  router: RouterConfig
  given: tuple[str, ...] = ()
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
# Not settings of decoding: centroid_rows and clusters. A number that is left
# out is the router's own.
_ROUTER = _defaults(RouterConfig, "name", "centroid_rows", "clusters")
_ROUTER |= {"top_k": 0, "temperature": 1.0}
_MODEL = _defaults(ModelArgs, "base", "router", "given")
_ALL = {"base": "", "router": RouterConfig.name, **_MODEL, **_ROUTER, **_BASE}


def parse_model_args(given: Mapping[str, Any]) -> ModelArgs:
  """Parses the settings of a model.

  Args:
    given: {name: value}; None and "none" are the default.

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
    given=tuple(sorted(said.keys() & _ROUTER.keys())),
  )


def _typed(name: str, value: Any, default: Any) -> Any:
  """Returns a value in its default's type; lm-eval's parser guesses types."""
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
  """Parses the decode settings of a request; greedy by default.

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
    # An empty string stands for the end token, which stops a text anyway.
    stop=tuple(text for text in settings["until"] if text),
    **{name: settings[name] for name in sampling if name in settings},
  )
