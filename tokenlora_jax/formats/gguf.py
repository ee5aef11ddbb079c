"""Reads llama.cpp's GGUF files: metadata and quantised tensors.

Only the requested rows of a tensor are read and dequantised.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from tokenlora_jax.config import InputError, nearest
from tokenlora_jax.formats.gguf_header import Header, Tensor, read_header
from tokenlora_jax.formats.reader import (
  END,
  BaseReader,
  Fields,
  Index,
  Stored,
  one_line,
  part_of_file,
)
from tokenlora_jax.formats.tensors import check_fetched
from tokenlora_jax.model.config import LlamaConfig, RopeScaling

# Our module names -> GGUF's; {} is the layer's number.
_MODULES = {
  "embedding": "token_embd",
  "norm": "output_norm",
  "head": "output",
  "attention_norm": "blk.{}.attn_norm",
  "mlp_norm": "blk.{}.ffn_norm",
  "q": "blk.{}.attn_q",
  "k": "blk.{}.attn_k",
  "v": "blk.{}.attn_v",
  "o": "blk.{}.attn_output",
  "gate": "blk.{}.ffn_gate",
  "up": "blk.{}.ffn_up",
  "down": "blk.{}.ffn_down",
}
_MODELS = ("llama", "qwen2")
# Llama-3's stretched rotary frequencies, as divisors of the plain ones.
_ROPE_FREQS = "rope_freqs.weight"


def open_gguf(path: Path) -> Header:
  """Reads a GGUF file's header.

  Args:
    path: the file.

  Raises:
    InputError: it is not a whole GGUF file of this machine's byte order, or it
      is one part of a split model.
  """
  check_fetched(path)
  try:
    file = read_header(path)
  except (OSError, RecursionError, ValueError) as error:
    raise InputError(
      f"{path}: not a whole GGUF file ({one_line(error)})"
    ) from error
  if metadata(file, "split.count", 0) not in (0, 1):
    raise split_error(path, path)
  return file


def split_error(where: Path, first: Path) -> InputError:
  """Returns the error for a model that is split into several GGUF files.

  Args:
    where: the given path.
    first: one of the files.
  """
  return InputError(
    f"{where}: is a model split into several .gguf files; join them with"
    f" llama.cpp's `llama-gguf-split --merge {first.name} merged.gguf`, where"
    " the first part is named, and give merged.gguf"
  )


def metadata(file: Header, name: str, default: Any = None) -> Any:
  """Returns a metadata value of an open file, or `default` if it is absent.

  Args:
    file: from `open_gguf`.
    name: the value's name.
    default: returned if the value is absent.

  Raises:
    InputError: a text is not UTF-8.
  """
  try:
    return _decoded(file.fields.get(name, default))
  except UnicodeDecodeError as error:
    raise InputError(f"GGUF {name}: no UTF-8 ({one_line(error)})") from error


def _decoded(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode()
  if not isinstance(value, list):
    return value
  # One loop without calls for a vocabulary.
  return [
    each.decode() if isinstance(each, bytes)
    else _decoded(each) if isinstance(each, list)
    else each
    for each in value
  ]  # fmt: skip


def parse_metadata(
  file: Header, stored: Mapping[str, Stored], where: str
) -> LlamaConfig:
  """Reads the shape of the Llama from GGUF metadata.

  Args:
    file: from `open_gguf`.
    stored: the file's tensors, which show ties and biases.
    where: the file, for errors.

  Raises:
    InputError: a value is missing, out of range or not supported; names it.
  """
  model = metadata(file, "general.architecture")
  if model not in _MODELS:
    raise InputError(
      f"{where}: general.architecture {model!r} is not one of"
      f" {', '.join(_MODELS)}{nearest(str(model), _MODELS)}"
    )
  general = Fields(
    {
      name: metadata(file, name)
      for name in ("general.type",)
      if name in file.fields
    },
    where,
  )
  general.only("general.type", "model")

  start = f"{model}."
  values = {
    name.removeprefix(start): metadata(file, name)
    for name in file.fields
    if name.startswith(start)
  }
  fields = Fields(values, where, start)
  width = fields.integer("embedding_length")
  heads = fields.integer("attention.head_count")
  head_width = fields.integer("attention.key_length", width // heads or None)
  fields.only("attention.value_length", head_width)
  # A smaller value rotates only part of each head.
  fields.only("rope.dimension_count", head_width)
  theta = fields.real("rope.freq_base", 10_000.0)
  embedding = stored.get("token_embd.weight")
  vocab = embedding.shape[0] if embedding and embedding.shape else None
  shape = {
    "vocab": fields.integer("vocab_size", vocab),
    "width": width,
    "mlp_width": fields.integer("feed_forward_length"),
    "layers": fields.integer("block_count"),
    "heads": heads,
    "kv_heads": fields.integer("attention.head_count_kv", heads),
    "head_width": head_width,
    "norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
    "rope_theta": theta,
    "rope_scaling": _parse_rope(fields),
    "tied": "output.weight" not in stored,
    "qkv_bias": model == "qwen2" or "blk.0.attn_q.bias" in stored,
    "o_bias": "blk.0.attn_output.bias" in stored,
    "mlp_bias": "blk.0.ffn_gate.bias" in stored,
    "max_length": fields.integer("context_length"),
  }
  if window := fields.take("attention.sliding_window", 0):  # 0 is none.
    if type(window) is not int or window < 0:
      raise fields.error(
        "attention.sliding_window", window, "a whole number of at least 0"
      )
    shape["sliding_window"] = window
  fields.only("attention.causal", True)
  fields.only("expert_count", 0)
  fields.only("expert_used_count", 0)
  fields.finish()
  try:
    return LlamaConfig(**shape)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def _parse_rope(fields: Fields) -> RopeScaling:
  """Takes the scaling of rotary frequencies, except Llama-3's tensor."""
  # Without a type, llama.cpp reads a factor as linear scaling; 0 is none.
  kind = fields.take("rope.scaling.type", "linear")
  if kind not in ("none", "linear"):
    raise fields.error("rope.scaling.type", kind, "none or linear")
  # Other types alone use these.
  fields.take("rope.scaling.original_context_length")
  fields.take("rope.scaling.finetuned")
  fields.only("rope.scaling.attn_factor", 1)
  old = fields.take("rope.scale_linear", 0) or 1.0
  factor = fields.take("rope.scaling.factor", 0) or old
  if not isinstance(factor, float) or not 0 < factor < 1e38:
    raise fields.error("rope.scaling.factor", factor, "a number above 0")
  if kind == "none" or factor == 1:
    return RopeScaling()
  return RopeScaling("linear", factor)


def _llama3_scaling(
  divisors: np.ndarray, config: LlamaConfig, where: str
) -> RopeScaling:
  """Derives Llama-3's scaling from its divisors; converters store only those.

  All models of the family share the two frequency factors and the original
  length, which are our defaults. So the largest divisor must be the factor, and
  the other divisors must follow from it.
  """
  scaling = RopeScaling("llama3", float(divisors.max(initial=1)))
  powers = np.arange(0, config.head_width, 2) / config.head_width
  waves = 2 * np.pi * config.rope_theta**powers
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  kept = (scaling.original_length / waves - low) / (high - low)
  kept = np.clip(kept, 0, 1)
  expected = 1 / ((1 - kept) / scaling.factor + kept)
  if divisors.shape != expected.shape or not np.allclose(
    divisors, expected, rtol=1e-4
  ):
    raise InputError(
      f"{where}: {_ROPE_FREQS} holds rotary frequencies other than Llama-3's"
      f" ({low:g}, {high:g}, {scaling.original_length}); use the model's Hugging"
      " Face folder"
    )
  return scaling if scaling.factor > 1 else RopeScaling()


class GgufReader(BaseReader):
  """Reads a base from a GGUF file; dequantises only the requested rows.

  Args:
    path: the file.

  Raises:
    InputError: the file is damaged, its metadata asks for something that is not
      supported, or tensors and metadata disagree.
  """

  def __init__(self, path: Path):
    where = str(path)
    file = open_gguf(path)
    self._path = path
    self._tensors = file.tensors
    stored = {
      name: Stored(tensor.shape, tensor.kind.name)
      for name, tensor in file.tensors.items()
    }
    config = parse_metadata(file, stored, where)
    # Converters reorder rows of q and k for llama.cpp's rotary embedding, which
    # rotates neighbours; for Qwen2 it rotates halves.
    self._interleaved = metadata(file, "general.architecture") == "llama"
    types = {tensor.kind for tensor in file.tensors.values()}
    readable = {t.name for t in types if _is_readable(t)}
    if _ROPE_FREQS in stored and stored[_ROPE_FREQS].dtype == "F32":
      divisors = self._blocks(self._tensors[_ROPE_FREQS])
      scaling = _llama3_scaling(divisors, config, where)
      config = dataclasses.replace(config, rope_scaling=scaling)
    super().__init__(
      where, config, _MODULES, stored, readable, lambda key: key == _ROPE_FREQS
    )

  def _read(self, key, index):
    tensor = self._tensors[key]
    rows = index[0]
    if self._interleaved and key.split(".")[2:3] in (["attn_q"], ["attn_k"]):
      rows = _half_order(tensor.shape[0], self.config.head_width)[rows]
    values = _dequantize(self._blocks(tensor, rows), tensor.kind)
    return values[:, index[1]] if len(index) > 1 else values

  def _blocks(self, tensor: Tensor, rows: Index = slice(None)) -> np.ndarray:
    return part_of_file(
      self._path, tensor.dtype, tensor.offset, tensor.stored, rows
    )

  def _ends(self, key):
    tensor = self._tensors[key]
    size = (math.prod(tensor.stored) * tensor.dtype.itemsize,)
    ends = slice(END), slice(-END, None)
    head, tail = (
      part_of_file(self._path, np.uint8, tensor.offset, size, end)
      for end in ends
    )
    return head.tobytes(), tail.tobytes()


def _half_order(rows: int, head_width: int) -> np.ndarray:
  """Returns the index, in neighbours' order, of each row in halves' order.

  Example:
    >>> _half_order(8, 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
  """
  pairs = np.arange(rows).reshape(-1, head_width // 2, 2)
  return pairs.swapaxes(1, 2).reshape(-1)


def _is_readable(tensor_type: Any) -> bool:
  from gguf import GGML_QUANT_SIZES

  _, block_bytes = GGML_QUANT_SIZES[tensor_type]
  try:
    _dequantize(np.zeros((1, block_bytes), np.uint8), tensor_type)
  except NotImplementedError:
    return False
  return True


def _dequantize(data: np.ndarray, tensor_type: Any) -> np.ndarray:
  from gguf import quants

  data = np.ascontiguousarray(data)
  if tensor_type.name == "Q4_1":
    return _dequantize_q4_1(data)
  return quants.dequantize(data, tensor_type)


def _dequantize_q4_1(data: np.ndarray) -> np.ndarray:
  """Dequantises Q4_1, the demo base's type, twice as fast as the package.

  A block is a float16 scale, a float16 offset and 32 numbers of 4 bits: the low
  halves of 16 bytes, then the high halves.
  """
  blocks = data.reshape(-1, 20)
  ends = blocks[:, :4].copy().view("<f2").astype(np.float32)
  values = np.empty((len(blocks), 2, 16), np.float32)
  values[:, 0], values[:, 1] = blocks[:, 4:] & 15, blocks[:, 4:] >> 4
  values *= ends[:, :1, None]
  values += ends[:, 1:, None]
  return values.reshape(*data.shape[:-1], data.shape[-1] // 20 * 32)
