"""Which map a tensor of an adapter belongs to, by any name it is saved under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import re
from typing import NamedTuple

# Our linear maps and the modules inside a layer.
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

# What torch.compile, FSDP, activation checkpointing and DDP put into a path.
_WRAPPERS = re.compile(
  r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|^module\."
)
# PEFT's own prefix may be missing, and so may the `model.` of a causal LM: an
# adapter trained on AutoModel has none. PEFT leaves out the adapter's name, but
# a state_dict has it. Layer numbers have at most three digits, so that a
# made-up one cannot make the bank endlessly deep.
_KEY = re.compile(
  r"(?:base_model\.model\.)?(model\.)?layers\.(0|[1-9][0-9]{0,2})"
  rf"\.({'|'.join(map(re.escape, _PROJECTION_OF))})"
  r"\.(?:lora_(A|B)(?:\.(\w+))?\.weight|lora_(a|b))"
)
# How many tensors an error names for one reason.
_SHOWN = 8


class Place(NamedTuple):
  """The map, and the half of it, that a tensor is.

  Attributes:
    root: of the layers' paths, `model.` or "".
    layer: its number.
    projection: by our name.
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
  """Returns what a tensor's name says, or None if it is no map of a layer.

  Args:
    key: its name in the file.

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
  """Returns the reason why a tensor's name is not understood."""
  if "language_model." in key:
    return (
      "is of the language model inside a multimodal one; if the base is that"
      " language model alone, remove `language_model.` from the names"
    )
  return "is no LoRA tensor of a layer's linear map"


def tell(problems: Mapping[str, Sequence[str]]) -> str:
  """Joins what is wrong: each reason once, after the names it is true of.

  Args:
    problems: names by reason, which begins with a verb.

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
