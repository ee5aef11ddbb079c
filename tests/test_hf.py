"""Hugging Face folders, against transformers' own models and configs."""

import json
import shutil

import numpy as np
import pytest
from refusals import refusal
from safetensors.numpy import load_file, save_file
import torch
import transformers

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.hf import parse_config
from tokenlora_jax.formats.locate import open_base
from tokenlora_jax.model.config import LlamaConfig, RopeScaling

SIZES = {
  "vocab_size": 50,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
}
MODELS = {
  "llama": transformers.LlamaConfig(**SIZES),
  "biased": transformers.LlamaConfig(
    **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
  ),
  "mistral": transformers.MistralConfig(
    **SIZES, head_dim=16, sliding_window=None
  ),
  "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
}
MODULES = {
  "self_attn.": "",
  "mlp.": "",
  "_proj": "",
  "model.": "",
  "embed_tokens": "embedding",
  "lm_head": "head",
  "input_layernorm": "attention_norm",
  "post_attention_layernorm": "mlp_norm",
}


def our_tensors(model):
  """The model's tensors under our names, in our layout, from its modules."""
  tensors = {}
  for path, module in model.named_modules():
    for old, new in MODULES.items():
      path = path.replace(old, new)
    if isinstance(module, torch.nn.Linear):
      leaf = "" if path == "head" else ".kernel"
      tensors[path + leaf] = module.weight.T
      if module.bias is not None:
        tensors[f"{path}.bias"] = module.bias
    elif getattr(module, "weight", None) is not None:
      tensors[path] = module.weight
  if model.config.tie_word_embeddings:
    del tensors["head"]
  return {name: t.detach().float().numpy() for name, t in tensors.items()}


def make(config):
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config)
  for parameter in model.parameters():  # biases start as zeros, norms as ones
    torch.nn.init.normal_(parameter)
  return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """One saved Llama, tied, that tests copy and spoil."""
  folder = tmp_path_factory.mktemp("saved")
  config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
  make(config).save_pretrained(folder)
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "model")


def change(path, **fields):
  values = json.loads(path.read_text()) | fields
  path.write_text(json.dumps(values))


def error(path):
  return refusal(open_base, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["1GB", "10KB"])
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_transformers_own(name, shards, dtype, tmp_path):
  model = make(MODELS[name]).to(dtype)
  model.save_pretrained(tmp_path, max_shard_size=shards)
  sharded = (tmp_path / "model.safetensors.index.json").exists()
  assert sharded == (shards == "10KB")
  reader = open_base(tmp_path)
  expected = our_tensors(model)
  assert reader.names == expected.keys()
  for key, value in expected.items():
    assert reader.shape(key) == value.shape, key
    read = reader.read(key)
    assert read.dtype == ("float32" if dtype == torch.float32 else "bfloat16")
    np.testing.assert_array_equal(read.astype(np.float32), value, key)


def test_parts_are_slices_of_the_whole(folder):
  reader = open_base(folder)
  for name in ("embedding", "layers.1.k.kernel", "layers.0.down.kernel"):
    whole = reader.read(name)
    for index in (
      (slice(None), slice(None)),
      (slice(3, 9), slice(None)),
      (slice(None), slice(-7, None)),
      (slice(0, 5), slice(2, 4)),
    ):
      np.testing.assert_array_equal(reader.read(name, index), whole[index])
  norm = reader.read("norm", (slice(4, 8),))
  np.testing.assert_array_equal(norm, reader.read("norm")[4:8])
  with pytest.raises(ValueError, match="steps"):
    reader.read("norm", (slice(0, 8, 2),))


def test_a_part_reads_no_more_than_itself(folder, monkeypatch):
  reader = open_base(folder)
  asked = []
  original = reader._read
  monkeypatch.setattr(
    reader,
    "_read",
    lambda key, index: asked.append(index) or original(key, index),
  )
  reader.read("layers.0.q.kernel", (slice(0, 4), slice(8, 24)))
  assert asked == [(slice(8, 24, 1), slice(0, 4, 1))]


def test_fingerprint_tells_bases_apart(folder):
  before = open_base(folder).fingerprint()
  assert len(before) == 64
  assert open_base(folder).fingerprint() == before
  path = folder / "model.safetensors"
  tensors = load_file(path)
  tensors["model.norm.weight"][-1] += 1
  save_file(tensors, path, {"format": "pt"})
  after = open_base(folder).fingerprint()
  change(folder / "config.json", rms_norm_eps=0.5)
  assert len({before, after, open_base(folder).fingerprint()}) == 3


def test_config_of_llama():
  config = transformers.LlamaConfig(
    **SIZES, head_dim=20, rms_norm_eps=1e-3, attention_bias=True
  )
  assert parse_config(config.to_dict(), "x") == LlamaConfig(
    vocab=50, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2,
    head_width=20, norm_eps=1e-3, qkv_bias=True, o_bias=True, max_length=128,
  )  # fmt: skip


def test_config_of_qwen2_and_mistral():
  qwen2 = parse_config(MODELS["qwen2"].to_dict(), "x")
  assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
  assert qwen2.norm_eps == 1e-6
  mistral = parse_config(MODELS["mistral"].to_dict(), "x")
  assert (mistral.qkv_bias, mistral.head_width) == (False, 16)


def test_config_of_the_first_llama_has_defaults():
  fields = SIZES | {"model_type": "llama", "rms_norm_eps": 1e-6}
  del fields["num_key_value_heads"]
  config = parse_config(fields, "x")
  assert (config.kv_heads, config.head_width) == (4, 8)
  assert (config.rope_theta, config.tied) == (10_000.0, False)


LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 2.0,
  "high_freq_factor": 5.0,
  "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
  ("fields", "theta", "scaling"),
  [
    ({}, 1e4, RopeScaling()),
    ({"rope_theta": 500}, 500, RopeScaling()),
    ({"rope_scaling": None, "rope_theta": 5e5}, 5e5, RopeScaling()),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
      5e5,
      RopeScaling("linear", 2.0),
    ),
    (
      {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5},
      5e5,
      RopeScaling("llama3", 8.0, 2.0, 5.0, 64),
    ),
    (
      {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
      7.0,
      RopeScaling(),
    ),
    (
      {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 7.0}},
      7.0,
      RopeScaling("llama3", 8.0, 2.0, 5.0, 64),
    ),
  ],
)
def test_rope_of_both_generations(fields, theta, scaling):
  values = MODELS["llama"].to_dict()
  del values["rope_parameters"]
  ours = parse_config(values | fields, "x")
  assert (ours.rope_theta, ours.rope_scaling) == (theta, scaling)
  # transformers understands the same from the same fields.
  theirs = transformers.LlamaConfig.from_dict(values | fields).rope_parameters
  assert theirs["rope_theta"] == theta
  assert theirs["rope_type"].replace("default", "none") == scaling.kind
  assert theirs.get("factor", 1.0) == scaling.factor


def test_configs_of_the_hub_are_read():
  # Fields that published folders carry beside the usual ones.
  extra = {
    "is_llama_config": True, "rope_interleaved": False,
    "transformers.js_config": {"dtype": "q4"}, "torch_dtype": "bfloat16",
    "pretraining_tp": 4, "max_sequence_length": 2048, "use_mrope": False,
    "max_window_layers": 21, "use_sliding_window": False,
  }  # fmt: skip
  for name in ("llama", "qwen2"):
    values = MODELS[name].to_dict()
    assert parse_config(values | extra, "x") == parse_config(values, "x")


@pytest.mark.parametrize("window", [..., None, 64])
def test_a_sliding_window_is_what_transformers_takes_it_for(window):
  values = MODELS["mistral"].to_dict()
  del values["sliding_window"]
  if window is not ...:
    values["sliding_window"] = window
  theirs = transformers.MistralConfig.from_dict(values).sliding_window
  assert parse_config(values, "x").sliding_window == theirs


@pytest.mark.parametrize(
  ("name", "fields", "told"),
  [
    ("llama", {"model_type": "lama"}, "'lama'.*llama, mistral, qwen2.*mean 'llama'"),
    ("llama", {"model_type": None}, "model_type None"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu", want "silu"'),
    ("llama", {"hidden_size": "32"}, 'hidden_size is "32", want a whole'),
    ("llama", {"hidden_size": True}, "hidden_size is true, want a whole"),
    ("llama", {"vocab_size": None}, "vocab_size is null"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("llama", {"num_key_value_heads": 3}, "kv_heads: 3"),
    ("llama", {"head_dim": 7}, "head_width: 7"),
    ("llama", {"head_dim": None, "hidden_size": 30}, "hidden_size is 30"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
    ("llama", {"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no"'),
    ("llama", {"sliding_window": 64}, "sliding_window is 64, want null"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, want a whole"),
    ("mistral", {"sliding_window": "64"}, 'sliding_window is "64", want a'),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types is "),
    ("mistral", {"attention_bias": True}, "attention_bias is true, want false"),
    ("qwen2", {"num_key_value_heads": ...}, "num_key_value_heads is null"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"quantization_config": {"bits": 4}}, 'config is {"bits": 4}'),
    ("llama", {"logit_scale": 2.0}, r"unknown fields.*logit_scale = 2\.0"),
    ("llama", {"rope_thetta": 9.0}, "rope_thetta = 9.0 .did you mean 'rope_the"),
    ("llama", {"rope_theta": 9.0}, "rope_parameters.rope_theta is 10000"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, 'type is "yarn", want'),
    ("llama", {"rope_parameters": {"rope_type": []}}, r"type is \[\], want"),
    ("llama", {"rope_parameters": {"type": "dynamic"}}, 'is "dynamic", want'),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
    ("llama", {"rope_parameters": {"beta_fast": 3}}, "rope_parameters.beta_fast"),
    (
      "llama",
      {"rope_parameters": {"rope_type": "linear", "factor": 0}},
      "rope_parameters.factor is 0, want",
    ),
    (
      "llama",
      {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1}},
      "high_freq_factor is 1.0, want more than 2",
    ),
    (
      "llama",
      {"rope_parameters": {"partial_rotary_factor": 0.25}},
      "rope_parameters.partial_rotary_factor is 0.25",
    ),
    (
      "llama",
      {"rope_scaling": {"type": "linear", "factor": 2}},
      "the same as rope_parameters",
    ),
  ],
)  # fmt: skip
def test_fields_that_change_the_model_are_errors(name, fields, told):
  values = MODELS[name].to_dict() | fields
  values = {key: value for key, value in values.items() if value is not ...}
  with pytest.raises(InputError, match=rf"^here: .*{told}"):
    parse_config(values, "here")


def test_all_tensors_that_do_not_fit_are_told_at_once(folder):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  del tensors["model.norm.weight"]
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
  tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 30), np.float32)
  tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((32, 48), np.int8)
  save_file(tensors, path)
  told = error(folder)
  assert "'model.norm.weight' is missing" in told
  assert "'model.layers.0.self_attn.q_proj.bias' has no place" in told
  assert "up_proj.weight' is [48, 30], want [48, 32]" in told
  assert "down_proj.weight' is I8, want BF16, F16, F32, F64" in told


def test_many_misfits_are_counted(folder):
  change(folder / "config.json", hidden_size=64)
  told = error(folder)
  assert told.count("want [") == 8
  # 2 norms and 7 maps a layer, the embedding and the last norm.
  assert told.endswith("; and 12 more")


def test_a_made_up_depth_is_not_counted_through(folder):
  change(folder / "config.json", num_hidden_layers=10**12)
  assert "1000000000000 layers" in error(folder)


def test_stored_copies_of_what_follows_are_ignored(folder):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  before = open_base(folder).names
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  save_file(tensors, path)
  assert open_base(folder).names == before
  tensors["lm_head.weight"][-1, -1] += 1
  save_file(tensors, path)
  assert "lm_head.weight' and 'model.embed_tokens.weight' differ" in error(
    folder
  )


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights(folder, size):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  assert "not a whole safetensors file" in error(folder)


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("{", "not JSON"),
    ("[1]", "a JSON list, want an object"),
    ("[" * 100_000, "not JSON"),
    ("\udcff", "not JSON"),
  ],
)
def test_damaged_config(folder, text, told):
  data = text.encode(errors="surrogateescape")
  (folder / "config.json").write_bytes(data)
  assert f"config.json: {told}" in error(folder)


def test_pickles_are_refused(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  assert "pytorch_model.bin is a pickle" in error(folder)
  (folder / "pytorch_model.bin").unlink()
  assert "has neither model.safetensors nor" in error(folder)


@pytest.mark.parametrize(
  ("shard", "told"),
  [
    ("../model.safetensors", "want names of"),
    ("/etc/x.safetensors", "want names of"),
    ("x.bin", "want names of"),
    ("a.safetensors", "there is no a.safetensors"),
  ],
)
def test_shards_stay_in_the_folder(folder, shard, told):
  shutil.copy(folder / "model.safetensors", folder.parent)
  (folder / "model.safetensors").unlink()
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
  assert told in error(folder)


def test_a_tensor_in_two_shards_and_an_empty_index(folder):
  weights = folder / "model.safetensors"
  shutil.copy(weights, folder / "b.safetensors")
  weights.rename(folder / "a.safetensors")
  index = folder / "model.safetensors.index.json"
  index.write_text(
    '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
  )
  assert "is in another shard too" in error(folder)
  index.write_text('{"weight_map": {}}')
  assert "weight_map is not" in error(folder)


@pytest.mark.realdata
def test_a_trained_folder(data_dir):
  reader = open_base(data_dir / "stories260K")
  c = reader.config
  assert (c.width, c.layers, c.heads, c.kv_heads, c.vocab) == (64, 5, 8, 4, 512)
  assert reader.read("layers.4.down.kernel").shape == (172, 64)
