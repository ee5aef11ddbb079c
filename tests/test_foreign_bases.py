"""Bases as people have them on disk: what loads, and the line for the rest."""

import json
import shutil

import chex
import ml_dtypes
import numpy as np
import pytest
from refusals import refusal
from safetensors.numpy import load_file, save_file

from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.locate import open_base
from tokenlora_jax.formats.reader import parameter_shapes
from tokenlora_jax.formats.tensors import is_finite
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.lora import random_adapters

SHAPE = LlamaConfig(
  vocab=40, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2,
  head_width=8, max_length=64,
)  # fmt: skip
CONFIG = {
  "model_type": "llama",
  "vocab_size": 40,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 64,
  "tie_word_embeddings": False,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
THEIRS = {
  "embedding": EMBEDDING,
  "norm": "model.norm.weight",
  "head": HEAD,
}
MODULES = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  **{p: f"self_attn.{p}_proj" for p in "qkvo"},
  **{p: f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


def their_name(name):
  if name in THEIRS:
    return THEIRS[name]
  _, layer, module, *_ = name.split(".")
  return f"model.layers.{layer}.{MODULES[module]}.weight"


def numbers():
  rng = np.random.default_rng(0)
  return {
    their_name(name): rng.standard_normal(
      shape[::-1] if name == "head" or "kernel" in name else shape, np.float32
    )
    for name, shape in parameter_shapes(SHAPE).items()
  }


def save(folder, tensors, **changes):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIG | changes))
  save_file(tensors, folder / "model.safetensors")
  return str(folder)


def test_a_head_is_as_the_config_says_or_the_line_has_the_remedy(tmp_path):
  whole = numbers()
  headless = {k: v for k, v in whole.items() if k != HEAD}
  folder = tmp_path / "base"
  tied = {"tie_word_embeddings": True}
  assert open_base(save(folder, headless, **tied)).config.tied
  save(folder, headless | {HEAD: whole[EMBEDDING]}, **tied)
  assert open_base(folder).config.tied
  save(folder, whole, **tied)
  assert "set it to false to use the head, or remove" in refusal(
    open_base, folder
  )
  save(folder, headless)
  line = refusal(open_base, folder)
  assert "'lm_head.weight' is missing" in line
  assert '"tie_word_embeddings": true' in line
  save(folder, whole | {HEAD: np.ones((48, 32), np.float32)})
  assert "cut or pad it to the config's vocabulary" in refusal(
    open_base, folder
  )


def test_a_caches_scales_change_nothing(tmp_path):
  scales = {"model.layers.0.self_attn.k_scale": np.ones(1, np.float32)}
  read = open_base(save(tmp_path / "base", numbers() | scales)).read
  np.testing.assert_array_equal(read("embedding"), numbers()[EMBEDDING])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_found_by_their_bits(dtype, bad):
  values = np.random.default_rng(0).normal(size=(7, 9)).astype(dtype)
  values[0, 0] = ml_dtypes.finfo(dtype).max
  assert is_finite(values) and np.isfinite(values).all()
  assert is_finite(values[:0])
  values[5, 3] = bad
  # Strided, too: a transposed part.
  assert not is_finite(values.T[2:]) and not np.isfinite(values.T[2:]).all()


@pytest.mark.parametrize(
  "key", [EMBEDDING, "model.layers.1.self_attn.v_proj.weight", HEAD]
)
def test_a_base_with_a_number_that_is_none_is_refused_by_name(tmp_path, key):
  tensors = numbers()
  tensors[key][-1, 3] = np.nan
  line = refusal(load_base, save(tmp_path / "base", tensors), "float32")
  assert f"base/model.safetensors: {key!r} holds NaN" in line


def test_a_number_too_large_for_the_type_is_refused(tmp_path):
  tensors = numbers()
  tensors[EMBEDDING][2, 2] = 3.4e38
  base = save(tmp_path / "base", tensors)
  assert "too large for bfloat16" in refusal(load_base, base, "bfloat16")
  load_base(base, "float32")


def test_a_pointer_is_named_for_every_kind_of_file(tmp_path):
  file = tmp_path / "model.gguf"
  file.write_text(POINTER)
  assert "git lfs pull" in refusal(open_base, file)
  assert "git lfs pull" in refusal(load_tokenizer, file)
  folder = tmp_path / "base"
  save(folder, numbers())
  load_tokenizer("random:tiny").save_pretrained(folder)
  for name, call in (
    ("model.safetensors", open_base),
    ("config.json", open_base),
    ("tokenizer.json", load_tokenizer),
  ):
    copy = shutil.copytree(folder, tmp_path / name)
    (copy / name).write_text(POINTER)
    line = refusal(call, copy)
    assert name in line and "git lfs pull" in line


def test_several_gguf_files_are_listed_and_parts_named_with_the_tool(tmp_path):
  for names, parts in (
    (("a.Q4.gguf", "a.Q8.gguf"), ("name one of them: a.Q4.gguf; a.Q8.gguf",)),
    (
      ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"),
      ("llama-gguf-split --merge m-00001-of-00002.gguf",),
    ),
  ):
    folder = tmp_path / names[0]
    folder.mkdir()
    for name in names:
      (folder / name).write_bytes(b"GGUF")
    for call in (open_base, load_tokenizer):
      line = refusal(call, folder)
      assert all(part in line for part in parts)


def test_a_folder_in_a_files_place_is_named(tmp_path):
  folder = tmp_path / "base"
  save(folder, numbers())
  assert load_file(folder / "model.safetensors")
  (folder / "config.json").unlink()
  (folder / "config.json").mkdir()
  assert "config.json: is a folder" in refusal(open_base, folder)


def test_one_base_in_any_precision_has_one_fingerprint(tmp_path):
  """Claimed: bfloat16 numbers as float32 and float16, tiny ones included."""
  bf16 = {k: v.astype(ml_dtypes.bfloat16) for k, v in numbers().items()}
  # Rows at the very end of what float16 can tell.
  tiny = np.geomspace(2.0**-30, 2.0**-14, 32).astype(ml_dtypes.bfloat16)
  bf16[EMBEDDING][0], bf16[EMBEDDING][1] = tiny, -tiny
  found = set()
  for dtype in (ml_dtypes.bfloat16, np.float32, np.float16):
    tensors = {k: v.astype(dtype) for k, v in bf16.items()}
    found.add(open_base(save(tmp_path / "base", tensors)).fingerprint())
  harmless = {"max_position_embeddings": 32, "eos_token_id": 7}
  folder = save(tmp_path / "base", bf16, **harmless)
  found.add(open_base(folder).fingerprint())
  assert len(found) == 1
  # A whole float32 base and its rounded copy, too.
  whole = open_base(save(tmp_path / "whole", numbers())).fingerprint()
  rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in numbers().items()}
  assert whole == open_base(save(tmp_path / "half", rounded)).fingerprint()
  assert whole not in found


@pytest.mark.parametrize("key", sorted(numbers()))
@pytest.mark.parametrize("place", [0, -1])
def test_another_number_at_an_end_is_another_base(tmp_path, key, place):
  tensors = numbers()
  before = open_base(save(tmp_path / "base", tensors)).fingerprint()
  tensors[key].reshape(-1)[place] += 1
  assert open_base(save(tmp_path / "base", tensors)).fingerprint() != before
  theta = save(tmp_path / "base", numbers(), rope_theta=5e5)
  assert open_base(theta).fingerprint() != before


def test_a_bank_knows_its_base_by_either_fingerprint(tmp_path):
  folder = save(tmp_path / "base", numbers())
  base = load_base(folder, "float32")
  reader = open_base(folder)
  assert base.fingerprint == reader.fingerprint()
  assert base.fingerprint_1 == reader.fingerprint_1() != base.fingerprint
  adapters = random_adapters(base, 2, 4)
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in numbers().items()}
  other = load_base(save(tmp_path / "half", half), "float32")
  for fingerprint in (base.fingerprint, base.fingerprint_1):
    save_bank(tmp_path / "bank", Bank(adapters, folder, fingerprint, {}))
    assert load_bank(tmp_path / "bank", base).adapters.names == ("e0", "e1")
  line = refusal(load_bank, tmp_path / "bank", other)
  assert "where both are the same weights, say --same-base" in line
  assert base.fingerprint_1[:12] in line and other.fingerprint[:12] in line
  same = load_bank(tmp_path / "bank", other, same_base=True)
  chex.assert_trees_all_equal(same.adapters.layers, adapters.layers)
  save_bank(tmp_path / "bank", Bank(adapters, folder, base.fingerprint, {}))
  load_bank(tmp_path / "bank", other)


def test_fingerprints_stay_what_banks_on_disk_say(tmp_path):
  """A field that the config gets later must not make another base of it.

  The second is version 0.1.0's of the same files.
  """
  reader = open_base(save(tmp_path / "base", numbers()))
  assert (reader.fingerprint(), reader.fingerprint_1()) == (
    "907953e6d1075098fca88fd8549ed3e129107c3213b39f8b148dcd5e53c1ec05",
    "32ef05b952dade8a3cc259ef4751c162514c94f1e7a400248a7d79f0d9a961a8",
  )
