"""Bases as people have them on disk: what loads, and the line for the rest."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.locate import open_base
from tokenlora_jax.formats.reader import parameter_shapes
from tokenlora_jax.formats.tensors import is_finite
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.model.config import LlamaConfig

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


def told(call, *args):
  with pytest.raises(InputError) as error:
    call(*args)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_head_is_as_the_config_says_or_the_line_has_the_remedy(tmp_path):
  whole = numbers()
  headless = {k: v for k, v in whole.items() if k != HEAD}
  folder = tmp_path / "base"
  tied = {"tie_word_embeddings": True}
  assert open_base(save(folder, headless, **tied)).config.tied
  save(folder, headless | {HEAD: whole[EMBEDDING]}, **tied)
  assert open_base(folder).config.tied
  save(folder, whole, **tied)
  assert "set it to false to use the head, or remove" in told(open_base, folder)
  save(folder, headless)
  line = told(open_base, folder)
  assert "'lm_head.weight' is missing" in line
  assert '"tie_word_embeddings": true' in line
  save(folder, whole | {HEAD: np.ones((48, 32), np.float32)})
  assert "cut or pad it to the config's vocabulary" in told(open_base, folder)


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
  line = told(load_base, save(tmp_path / "base", tensors), "float32")
  assert f"base/model.safetensors: {key!r} holds NaN" in line


def test_a_number_too_large_for_the_type_is_refused(tmp_path):
  tensors = numbers()
  tensors[EMBEDDING][2, 2] = 3.4e38
  base = save(tmp_path / "base", tensors)
  assert "too large for bfloat16" in told(load_base, base, "bfloat16")
  load_base(base, "float32")


def test_a_pointer_is_named_for_every_kind_of_file(tmp_path):
  file = tmp_path / "model.gguf"
  file.write_text(POINTER)
  assert "git lfs pull" in told(open_base, file)
  assert "git lfs pull" in told(load_tokenizer, file)
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
    line = told(call, copy)
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
      line = told(call, folder)
      assert all(part in line for part in parts)


def test_a_folder_in_a_files_place_is_named(tmp_path):
  folder = tmp_path / "base"
  save(folder, numbers())
  assert load_file(folder / "model.safetensors")
  (folder / "config.json").unlink()
  (folder / "config.json").mkdir()
  assert "config.json: is a folder" in told(open_base, folder)
