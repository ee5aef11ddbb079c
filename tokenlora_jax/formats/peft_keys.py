"""Parses names of adapter tensors: PEFT's, mlx-lm's and those of wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import NamedTuple

# Our linear maps -> the modules inside a layer.
MODULES = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
_PROJECTION_OF = {module: name for name, module in MODULES.items()}

# Parts of a path from torch.compile, FSDP, activation checkpointing and DDP.
_WRAPPERS = re.compile(
  r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|^module\."
)
# PEFT's own prefix may be missing, and so may the `model.` of a causal LM: an
# adapter trained on AutoModel has none. PEFT's files omit the adapter's name, a
# state_dict has it. Layer numbers have at most three digits, so that a forged
# one cannot allocate a huge bank.
_KEY = re.compile(
  r"(?:base_model\.model\.)?(model\.)?layers\.(0|[1-9][0-9]{0,2})"
  rf"\.({'|'.join(map(re.escape, _PROJECTION_OF))})"
  r"\.(?:lora_(A|B)(?:\.(\w+))?\.weight|lora_(a|b))"
)
# The most tensors that an error names for one reason.
_SHOWN = 8


class Place(NamedTuple):
  """The map that an adapter's tensor belongs to, and its half, A or B.

  Attributes:
    root: start of the layers' paths, `model.` or "".
    layer: the layer's number.
    projection: our name of the linear map.
    half: A or B.
    adapter: the adapter's name, or "".
    is_mlx: whether the name is mlx-lm's, which stores both halves transposed.
  """

  root: str
  layer: int
  projection: str
  half: str
  adapter: str
  is_mlx: bool


def parse_key(key: str) -> Place | None:
  """Parses a tensor's name; returns None if it is not a map of a layer.

  Args:
    key: the tensor's name in the file.

  Example:
    >>> parse_key("_orig_mod.model.layers.3.mlp.up_proj.lora_A.default.weight")
    ... # doctest: +NORMALIZE_WHITESPACE
    Place(root='model.', layer=3, projection='up', half='A', adapter='default',
      is_mlx=False)
  """
  match = _KEY.fullmatch(_WRAPPERS.sub("", key))
  if match is None:
    return None
  root, layer, module, half, adapter, mlx_half = match.groups("")
  return Place(
    root,
    int(layer),
    _PROJECTION_OF[module],
    (half or mlx_half).upper(),
    adapter,
    bool(mlx_half),
  )


def why_unknown(key: str) -> str:
  """Returns the reason why a tensor's name cannot be parsed.

  Args:
    key: the tensor's name in the file.

  Example:
    >>> why_unknown("something")
    "is no LoRA tensor of a layer's linear map"
  """
  if "language_model." in key:
    return (
      "is of the language model inside a multimodal one; if the base is that"
      " language model alone, remove `language_model.` from the names"
    )
  return "is no LoRA tensor of a layer's linear map"


def tell(problems: Mapping[str, Sequence[str]]) -> str:
  """Joins problems into one line: each reason once, after its tensors' names.

  Args:
    problems: names by reason; a reason begins with a verb.

  Example:
    >>> tell({"is missing": ["a", "b"], "is empty": ["c"]})
    "each of 'a', 'b' is missing; 'c' is empty"
  """
  return "; ".join(
    f"{_some(names)} {reason}" for reason, names in problems.items()
  )


def _some(names: Sequence[str]) -> str:
  if len(names) == 1:
    return repr(names[0])
  shown, more = ", ".join(map(repr, names[:_SHOWN])), len(names) - _SHOWN
  return f"each of {shown}" + (f" and {more} more" if more > 0 else "")
