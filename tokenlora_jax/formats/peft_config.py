"""Reads and writes PEFT's adapter_config.json, and reads mlx-lm's.

Every field is used, is known not to change the map from inputs to outputs, or
raises an error: skipping a field could silently load another adapter.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.tensors import check_fetched

_LARGEST_FILE = 1 << 22  # bytes

_IGNORED = frozenset([
  "auto_mapping", "corda_config",
  "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config",
  "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
  "qalora_group_size", "revision", "runtime_config", "task_type",
])  # fmt: skip
# Values that an unsupported field may have.
_EMPTY = (None, False, "none", [], {})

# Initialisations that leave the base unchanged. The others (pissa, olora,
# corda, loftq, ...) subtract the initial adapter from the base.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


def _pattern_regex(key: str) -> re.Pattern:
  """Returns the regex with which rank_pattern or alpha_pattern match modules."""
  return re.compile(rf"(.*\.)?({key})$")


def _layer_regex(pattern: str) -> re.Pattern:
  """Returns the regex with which layers_pattern finds a layer's number."""
  return re.compile(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.")


def _is_regex(x, wrap=re.compile) -> bool:
  try:
    return isinstance(x, str) and wrap(x) is not None
  except (re.error, OverflowError, RecursionError):
    return False


def _is_int(x) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _is_rank(x) -> bool:
  return _is_int(x) and 1 <= x <= 1 << 20


def _is_alpha(x) -> bool:
  # This comparison is false for NaN.
  return (_is_int(x) or isinstance(x, float)) and abs(x) <= 1e9


def _is_list(x, is_item) -> bool:
  return isinstance(x, list) and all(map(is_item, x))


def _is_modules(x) -> bool:
  return _is_regex(x) or _is_list(x, lambda y: isinstance(y, str))


def _is_layers(x) -> bool:
  return x is None or _is_int(x) or _is_list(x, _is_int)


def _is_layer_patterns(x) -> bool:
  patterns = [x] if isinstance(x, str) else x
  return not x or _is_list(patterns, lambda y: _is_regex(y, _layer_regex))


def _is_pattern(is_value):
  return lambda x: (
    isinstance(x, dict)
    and all(
      _is_regex(key, _pattern_regex) and is_value(value)
      for key, value in x.items()
    )
  )


# Field -> (whether a value is supported, the supported values in words).
_CHECKS = {
  "peft_type": (lambda x: x == "LORA", "LORA"),
  "r": (_is_rank, "a whole number of at least 1"),
  "lora_alpha": (_is_alpha, "a finite number"),
  "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
  "rank_pattern": (_is_pattern(_is_rank), "{regex: rank of at least 1}"),
  "alpha_pattern": (_is_pattern(_is_alpha), "{regex: finite number}"),
  "target_modules": (
    lambda x: bool(x) and _is_modules(x),
    "a list of module names, a regex or all-linear",
  ),
  "exclude_modules": (_is_modules, "a list of module names or a regex"),
  "layers_to_transform": (_is_layers, "a layer number or a list of them"),
  "layers_pattern": (_is_layer_patterns, "a regex or a list of them"),
  "base_model_name_or_path": (lambda x: isinstance(x, str), "a path or hub id"),
  "init_lora_weights": (
    lambda x: isinstance(x, (bool, str)) and x in _INITS,
    "true, false, gaussian, orthogonal or eva, which leave the base as it is",
  ),
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The supported fields, under PEFT's own names and with its defaults.

  Example:
    >>> config = PeftConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    >>> path = "model.layers.0.self_attn.q_proj"
    >>> config.is_target(path), config.rank_and_scaling(path)
    (True, (8, 2.0))
  """

  peft_type: str = ""
  r: int = 8
  lora_alpha: float = 8
  use_rslora: bool = False
  rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
  target_modules: str | list[str] = ""
  exclude_modules: str | list[str] = ""
  layers_to_transform: int | list[int] | None = None
  layers_pattern: str | list[str] = ""
  init_lora_weights: bool | str = True
  # Does not change the adapter; `add_expert` compares it with the bank's base.
  base_model_name_or_path: str = ""

  @classmethod
  def read(cls, path: Path) -> PeftConfig:
    """Reads and checks an adapter_config.json.

    Args:
      path: the file.

    Raises:
      InputError: the file is not a JSON object, or a field's value is not
        supported.
    """
    given = _read_object(path)

    def fail(name, wanted):
      value = repr(given.get(name))[:200]
      raise InputError(f"{path}: {name}: {value} is not allowed; want {wanted}")

    # As in PEFT, null means the default.
    config = cls(**{
      name: given[name] for name in _CHECKS if given.get(name) is not None
    })  # fmt: skip
    for name, (is_fine, wanted) in _CHECKS.items():
      if not is_fine(getattr(config, name)):
        fail(name, wanted)
    for name, value in given.items():
      if name not in _CHECKS and name not in _IGNORED and value not in _EMPTY:
        fail(name, "none: it is not supported")
    is_regex = isinstance(config.target_modules, str)
    if is_regex and config.layers_to_transform is not None:
      fail("layers_to_transform", "null, since target_modules is a regex")
    return config

  def is_target(self, path: str) -> bool:
    """Returns whether a linear map is adapted.

    Args:
      path: the module's path, such as "model.layers.0.self_attn.q_proj".
    """

    def is_among(modules):
      if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
      return any(path == name or path.endswith(f".{name}") for name in modules)

    targets, layers = self.target_modules, self.layers_to_transform
    is_all = isinstance(targets, str) and targets.lower() == "all-linear"
    if is_among(self.exclude_modules) or not (is_all or is_among(targets)):
      return False
    if layers is None or layers == []:
      return True
    patterns = self.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
      match = _layer_regex(pattern).match(path)
      if match:
        return int(match["index"]) in ([layers] if _is_int(layers) else layers)
    return False

  def rank_and_scaling(self, path: str) -> tuple[int, float]:
    """Returns a module's R and alpha / R, or alpha / sqrt(R) with rsLoRA.

    Args:
      path: the module's path.
    """

    def first_match(pattern, default):
      matches = (
        value
        for key, value in pattern.items()
        if _pattern_regex(key).match(path)
      )
      return next(matches, default)

    rank = first_match(self.rank_pattern, self.r)
    alpha = first_match(self.alpha_pattern, self.lora_alpha)
    return rank, alpha / (rank**0.5 if self.use_rslora else rank)


def read_mlx(path: Path, modules: Collection[str]) -> PeftConfig:
  """Reads mlx-lm's adapter_config.json as a `PeftConfig`.

  Its `scale` is PEFT's alpha / r. The adapted maps follow from the tensors.

  Args:
    path: the file.
    modules: paths of the maps that have tensors.

  Raises:
    InputError: the file is not a JSON object, or its type is not LoRA.
  """
  given = _read_object(path)
  kind = given.get("fine_tune_type", "lora")
  if kind != "lora":
    raise InputError(f"{path}: fine_tune_type: {kind!r:.60}; want 'lora'")
  about = given.get("lora_parameters")
  about = about if isinstance(about, dict) else {}
  rank, scale = about.get("rank"), about.get("scale")
  for name, fine in (
    ("rank", _is_rank(rank)),
    ("scale", _is_alpha(scale)),
    # Early versions also multiplied by alpha / rank.
    ("alpha", about.get("alpha") is None),
  ):
    if not fine:
      raise InputError(
        f"{path}: lora_parameters.{name}: {about.get(name)!r:.60} is not"
        " allowed; want mlx-lm's rank and scale as numbers, and no alpha"
      )
  base = given.get("model")
  return PeftConfig(
    peft_type="LORA",
    r=rank,
    lora_alpha=scale * rank,
    target_modules=sorted(modules),
    base_model_name_or_path=base if isinstance(base, str) else "",
  )


def _read_object(path: Path) -> dict[str, Any]:
  check_fetched(path)
  size = path.stat().st_size
  if size > _LARGEST_FILE:
    raise InputError(f"{path}: {size} bytes is too much for a config")
  try:
    given = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: not JSON ({error})") from error
  if not isinstance(given, dict):
    raise InputError(f"{path}: want an object, not {type(given).__name__}")
  return given


def describe(
  modules: Mapping[str, tuple[int, float]], base_name: str
) -> dict[str, Any]:
  """Returns the adapter_config.json for exactly these modules.

  Args:
    modules: each module's path, R and scaling.
    base_name: the base's path or hub id; may be empty.

  Example:
    >>> about = describe({"model.layers.0.self_attn.q_proj": (8, 2.0)}, "mine")
    >>> about["r"], about["lora_alpha"], about["target_modules"]
    (8, 16, ['q_proj'])
  """
  ranks = {path: rank for path, (rank, _) in modules.items()}
  # A float32 scaling times a rank is exact in float64, so alpha / r returns the
  # scaling bit for bit.
  alphas = {
    path: int(alpha) if (alpha := scaling * rank).is_integer() else alpha
    for path, (rank, scaling) in modules.items()
  }
  common_rank, other_ranks = _common_and_others(ranks)
  common_alpha, other_alphas = _common_and_others(alphas)
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_name or None,
    "inference_mode": True,
    "bias": "none",
    "use_rslora": False,
    "r": common_rank,
    "rank_pattern": other_ranks,
    "lora_alpha": common_alpha,
    "alpha_pattern": other_alphas,
    **_targets(modules),
  }


def _common_and_others(values: Mapping[str, Any]):
  common, _ = collections.Counter(values.values()).most_common(1)[0]
  return common, {path: x for path, x in values.items() if x != common}


def _targets(modules: Mapping[str, Any]) -> dict[str, Any]:
  """Returns short names and layer numbers if those suffice, else paths."""
  places = [path.split(".") for path in modules]
  layers = sorted({int(place[2]) for place in places})
  names = sorted({place[-1] for place in places})
  if len(layers) * len(names) == len(places):
    # The layers are always listed, since the base's number of layers is unknown
    # here: without a list PEFT would add new maps to any other layers.
    return {"target_modules": names, "layers_to_transform": layers}
  return {"target_modules": sorted(modules)}
