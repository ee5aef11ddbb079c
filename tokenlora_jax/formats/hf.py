"""Reads Hugging Face folders: config.json and safetensors, whole or sharded.

Every field of config.json is used, is known not to change the calculation, or
raises an error that names it: skipping a field could silently run another
model. Pickles (.bin, .pt) are never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
import re
from typing import Any

import ml_dtypes
import numpy as np

from tokenlora_jax.config import InputError, nearest
from tokenlora_jax.formats.reader import (
  END,
  BaseReader,
  Fields,
  Stored,
  one_line,
  part_of_file,
  shorten,
)
from tokenlora_jax.formats.tensors import check_fetched, open_tensors
from tokenlora_jax.model.config import LlamaConfig, RopeScaling

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Our module names -> Hugging Face's; {} is the layer's number.
_LAYER = "model.layers.{}"
_MODULES = {
  "embedding": "model.embed_tokens",
  "norm": "model.norm",
  "head": "lm_head",
  "attention_norm": f"{_LAYER}.input_layernorm",
  "mlp_norm": f"{_LAYER}.post_attention_layernorm",
  "q": f"{_LAYER}.self_attn.q_proj",
  "k": f"{_LAYER}.self_attn.k_proj",
  "v": f"{_LAYER}.self_attn.v_proj",
  "o": f"{_LAYER}.self_attn.o_proj",
  "gate": f"{_LAYER}.mlp.gate_proj",
  "up": f"{_LAYER}.mlp.up_proj",
  "down": f"{_LAYER}.mlp.down_proj",
}
_FLOATS = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}
# A table of rotary frequencies in old checkpoints; it follows from the config.
_ROTARY = re.compile(
  r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
).fullmatch

# Quantisation of a server's KV cache; transformers does not read it.
_CACHE_SCALE = re.compile(
  r"model\.layers\.\d+\.self_attn\.[kv](_proj\.[kv])?_scale"
).fullmatch

_MODELS = ("llama", "mistral", "qwen2")
# Hugging Face's names of the rotary types -> ours.
_ROPES = {"default": "none", "linear": "linear", "llama3": "llama3"}
# Fields that do not change the map from tokens to logits.
_HARMLESS = frozenset([
  "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
  "_flash_attn_2_enabled", "_name_or_path", "architectures",
  "attention_dropout", "attn_implementation", "bad_words_ids",
  "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
  "cross_attention_hidden_size", "decoder_start_token_id",
  "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
  "encoder_no_repeat_ngram_size", "eos_token_id",
  "exponential_decay_length_penalty", "finetuning_task",
  "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout", "id2label",
  "ignore_index", "initializer_range", "is_decoder", "is_llama_config",
  "label2id", "length_penalty", "max_length", "max_new_tokens",
  "max_sequence_length", "max_window_layers", "min_length", "mlp_dropout",
  "model_max_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
  "num_labels", "num_return_sequences", "output_attentions",
  "output_hidden_states", "output_scores", "pad_token_id", "prefix",
  "pretraining_tp", "problem_type", "remove_invalid_values",
  "repetition_penalty", "resid_pdrop", "return_dict",
  "return_dict_in_generate", "sep_token_id", "suppress_tokens",
  "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
  "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
  "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
  "unsloth_version", "use_bfloat16", "use_cache",
])  # fmt: skip


def parse_config(values: Mapping[str, Any], where: str) -> LlamaConfig:
  """Parses the fields of a config.json of transformers 4 or 5.

  Args:
    values: the fields.
    where: the file, for errors.

  Returns:
    The shape of the Llama.

  Raises:
    InputError: a field is missing, out of range, unsupported or unknown; names
      field and value.
  """
  fields = Fields(values, where)
  model = fields.take("model_type")
  if model not in _MODELS:
    raise InputError(
      f"{where}: model_type {model!r} is not one of {', '.join(_MODELS)}"
      f"{nearest(str(model), _MODELS)}"
    )
  is_llama, is_qwen2 = model == "llama", model == "qwen2"
  width = fields.integer("hidden_size")
  heads = fields.integer("num_attention_heads")
  length = fields.integer("max_position_embeddings")
  # Transformers reads an absent field as null for Llama alone.
  is_shared = is_llama or "num_key_value_heads" in values
  kv_heads = fields.integer("num_key_value_heads", heads if is_shared else None)
  if "head_dim" not in fields and width % heads:
    raise fields.error("hidden_size", width, f"a multiple of {heads} heads")
  head_width = fields.integer("head_dim", width // heads)
  theta, scaling = _parse_rope(fields, where, length)
  biased = is_llama and fields.flag("attention_bias")
  shape = {
    "vocab": fields.integer("vocab_size"),
    "width": width,
    "mlp_width": fields.integer("intermediate_size"),
    "layers": fields.integer("num_hidden_layers"),
    "heads": heads,
    "kv_heads": kv_heads,
    "head_width": head_width,
    "norm_eps": fields.real("rms_norm_eps"),
    "rope_theta": theta,
    "rope_scaling": scaling,
    "tied": fields.flag("tie_word_embeddings"),
    "qkv_bias": biased or is_qwen2,
    "o_bias": biased,
    "mlp_bias": is_llama and fields.flag("mlp_bias"),
    "max_length": length,
  }
  if model == "mistral" and values.get("sliding_window", "absent") is not None:
    # In transformers null means no window, and an absent field means its own
    # default.
    shape["sliding_window"] = fields.integer("sliding_window", 4096)
  fields.only("use_sliding_window", False)
  if is_qwen2:
    # Unused while use_sliding_window is false.
    fields.take("sliding_window")
  else:
    fields.only("sliding_window")
  kinds = fields.take("layer_types", [])
  if not isinstance(kinds, list) or any(k != "full_attention" for k in kinds):
    raise fields.error("layer_types", kinds, "full_attention in every layer")
  fields.only("hidden_act", "silu", "swish")
  fields.only("partial_rotary_factor", 1)
  fields.only("quantization_config")
  fields.only("pruned_heads", {})
  for name in (
    "add_cross_attention", "attention_bias", "is_encoder_decoder", "mlp_bias",
    "rope_interleaved", "tie_encoder_decoder", "use_mrope",
  ):  # fmt: skip
    fields.only(name, False)
  fields.finish(_HARMLESS)
  try:
    return LlamaConfig(**shape)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def _parse_rope(
  fields: Fields, where: str, length: int
) -> tuple[float, RopeScaling]:
  """Takes the rotary fields: theta and the scaling of the frequencies."""
  theta = (
    fields.real("rope_theta", 10_000.0) if "rope_theta" in fields else None
  )
  old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
  if old and new and old != new:
    raise fields.error("rope_scaling", old, "the same as rope_parameters")
  name = "rope_scaling" if old else "rope_parameters"
  values = old or new or {}
  if not isinstance(values, dict):
    raise fields.error(name, values, "an object or null")
  rope = Fields(values, where, f"{name}.")
  inner = rope.real("rope_theta", theta or 10_000.0)
  if theta is not None and inner != theta:
    raise rope.error("rope_theta", inner, f"rope_theta's own {theta}")
  old_kind = rope.take("type", "default")
  kind = rope.take("rope_type", old_kind)
  if str(kind) not in _ROPES or old_kind not in ("default", kind):
    raise rope.error("rope_type", kind, f"one of {', '.join(_ROPES)}")
  rope.only("partial_rotary_factor", 1)
  scaling = {}
  if kind != "default":
    scaling["factor"] = rope.real("factor")
  if kind == "llama3":
    low = rope.real("low_freq_factor")
    high = rope.real("high_freq_factor")
    if high <= low:
      raise rope.error("high_freq_factor", high, f"more than {low}")
    scaling |= {
      "low_frequency_factor": low,
      "high_frequency_factor": high,
      "original_length": rope.integer(
        "original_max_position_embeddings", length
      ),
    }
  rope.finish()
  return inner, RopeScaling(_ROPES[kind], **scaling)


class HfReader(BaseReader):
  """Reads a base from a Hugging Face folder; reads only requested slices.

  Args:
    folder: config.json with model.safetensors, or with shards and
      model.safetensors.index.json.

  Raises:
    InputError: a file is missing, damaged or a pickle, the config asks for
      something that is not supported, or tensors and config disagree.
  """

  def __init__(self, folder: Path):
    where = str(folder)
    config = parse_config(read_json(folder / _CONFIG), str(folder / _CONFIG))
    self._places = {}
    stored = {}
    for path in _weight_files(folder):
      file = open_tensors(path)
      offsets = _offsets(path)
      for key in file.keys():  # noqa: SIM118 (it is no mapping)
        if key in stored:
          raise InputError(f"{path}: {key!r} is in another shard too")
        part = file.get_slice(key)
        stored[key] = Stored(tuple(part.get_shape()), part.get_dtype())
        self._places[key] = path, offsets[key]

    def ignore(key):
      is_head = config.tied and key == "lm_head.weight"
      return is_head or _ROTARY(key) or _CACHE_SCALE(key)

    super().__init__(where, config, _MODULES, stored, _FLOATS, ignore)
    if config.tied and "lm_head.weight" in stored:
      self._check_tie(where)

  def _check_tie(self, where: str) -> None:
    """Raises `InputError` if a tied head is stored with other values."""
    theirs = "lm_head.weight", "model.embed_tokens.weight"
    equal = len({self._stored[key] for key in theirs}) == 1
    vocab = self.config.vocab
    for start in range(0, vocab, 4096):
      rows = slice(start, min(start + 4096, vocab)), slice(None)
      equal = equal and np.array_equal(*(self._read(k, rows) for k in theirs))
    if not equal:
      raise InputError(
        f"{where}: tie_word_embeddings is true, but {theirs[0]!r} and"
        f" {theirs[1]!r} differ; set it to false to use the head, or remove the"
        " head to use the embedding"
      )

  def _read(self, key, index):
    path, offset = self._places[key]
    shape, dtype = self._stored[key]
    return part_of_file(path, _FLOATS[dtype], offset, shape, index)

  def _file(self, key):
    return str(self._places[key][0])

  def _ends(self, key):
    shape = self._stored[key].shape
    rows = max(1, END // max(1, 2 * int(np.prod(shape[1:]))))
    rows = min(rows, shape[0])
    ends = slice(rows), slice(shape[0] - rows, None)
    head, tail = (self._read(key, end) for end in ends)
    return head.tobytes(), tail.tobytes()


def _offsets(path: Path) -> dict[str, int]:
  """Returns the offset of each tensor in a safetensors file.

  The library does not give offsets, and for a part of a tensor it maps the
  whole file or reads the whole tensor.
  """
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
  header.pop("__metadata__", None)
  return {k: 8 + size + v["data_offsets"][0] for k, v in header.items()}


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Args:
    path: the file.

  Raises:
    InputError: the file is missing, is not JSON, or is not a JSON object.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
    ...   _ = Path(file.name).write_text('{"vocab_size": 260}')
    ...   read_json(Path(file.name))
    {'vocab_size': 260}
  """
  check_fetched(path)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise InputError(f"{path}: there is no such file") from error
  # RecursionError: brackets are nested too deep.
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: not JSON ({one_line(error)})") from error
  if not isinstance(content, dict):
    raise InputError(f"{path}: a JSON {type(content).__name__}, want an object")
  return content


def _weight_files(folder: Path) -> list[Path]:
  """Returns the safetensors files of a folder, or raises `InputError`."""
  if (folder / _WEIGHTS).is_file():
    return [folder / _WEIGHTS]
  if (folder / _INDEX).is_file():
    return _shards(folder)
  pickles = sorted(
    p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
  )
  if pickles:
    raise InputError(
      f"{folder}: {pickles[0]} is a pickle, which can run code and is never"
      " opened; convert the folder to safetensors with"
      " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)"
    )
  raise InputError(f"{folder}: has neither {_WEIGHTS} nor {_INDEX}")


def _shards(folder: Path) -> list[Path]:
  path = folder / _INDEX
  weight_map = read_json(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(f"{path}: weight_map is not an object of tensor: file")
  names = {str(name) for name in weight_map.values()}
  # A bare name cannot lead out of the folder.
  wrong = [
    n for n in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", n)
  ]
  if wrong:
    raise InputError(
      f"{path}: {shorten(sorted(map(repr, wrong)))}: want names of .safetensors"
      " files in this folder"
    )
  absent = sorted(name for name in names if not (folder / name).is_file())
  if absent:
    raise InputError(f"{path}: there is no {shorten(absent)}")
  return [folder / name for name in sorted(names)]
