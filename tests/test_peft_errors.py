"""What a PEFT folder may hold, and the one line that anything else gets."""

import itertools
import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.peft import load_adapters, save_adapter
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.model.lora import random_adapters


def key(layer, module, half):
  return f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"


@pytest.fixture
def folder(tmp_path):
  """A sound adapter of rank 4 on q and v of `random:tiny`, to be damaged."""
  folder = tmp_path / "plain"
  config = peft.LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
  )
  config.save_pretrained(folder)
  rng = np.random.default_rng(0)
  tensors = {}
  for layer, (module, out) in itertools.product(
    (0, 1), (("self_attn.q_proj", 64), ("self_attn.v_proj", 32))
  ):
    for half, shape in (("A", (4, 64)), ("B", (out, 4))):
      tensors[key(layer, module, half)] = rng.normal(size=shape).astype("f4")
  save_file(tensors, folder / "adapter_model.safetensors")
  return folder


def edit_config(folder, **changes):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
  path = folder / "adapter_model.safetensors"
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def assert_error(folders, *parts, names=None):
  """Loading fails with one line that has all the parts."""
  with pytest.raises(InputError) as error:
    load_adapters(folders, names)
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def assert_same(left, right):
  assert left.names == right.names
  assert jax.tree.structure(left.layers) == jax.tree.structure(right.layers)
  jax.tree.map(np.testing.assert_array_equal, left.layers, right.layers)


@pytest.mark.parametrize(
  "change",
  [
    {"use_dora": None, "modules_to_save": [], "something_new": {}},
    {"lora_dropout": 0.3, "base_model_name_or_path": "x", "revision": "y"},
    {"r": 4, "rank_pattern": None, "init_lora_weights": "gaussian"},
    {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    # A pattern is matched from a dot on, not anywhere.
    {"rank_pattern": {"proj": 3, "attn.q_proj": 3, "q": 3, "q_pro": 3}},
  ],
)
def test_fields_that_say_nothing(folder, change):
  before = load_adapters([folder])
  edit_config(folder, **change)
  assert_same(load_adapters([folder]), before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(folder, dtype):
  whole = load_adapters([folder])
  edit_tensors(
    folder,
    lambda tensors: tensors.update(
      {name: x.astype(dtype) for name, x in tensors.items()}
    ),
  )
  read = load_adapters([folder])
  pairs = zip(*map(jax.tree.leaves, (read.layers, whole.layers)), strict=True)
  for x, y in pairs:
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, y, rtol=1e-2)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("peft_type", "LOHA"),
    ("peft_type", None),
    ("use_dora", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("modules_to_save", ["lm_head"]),
    ("lora_bias", True),
    ("fan_in_fan_out", True),
    ("trainable_token_indices", [3]),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", 1),
    ("alora_invocation_tokens", [1, 2]),
    ("target_parameters", ["feed_forward.experts"]),
    ("use_qalora", True),
    ("megatron_config", {"tensor": 2}),
    ("use_something_new", 0.5),
    ("r", 0),
    ("r", 4.0),
    ("r", True),
    ("r", "4"),
    ("lora_alpha", "8"),
    ("lora_alpha", math.nan),
    ("lora_alpha", math.inf),
    ("lora_alpha", 10**400),
    ("use_rslora", "yes"),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"(": 4}),
    ("rank_pattern", [4]),
    ("alpha_pattern", {"q_proj": None}),
    ("alpha_pattern", {"q_proj)": 4}),
    ("target_modules", None),
    ("target_modules", []),
    ("target_modules", [1]),
    ("target_modules", "*"),
    ("exclude_modules", "["),
    ("layers_to_transform", [0.5]),
    ("layers_to_transform", "0"),
    ("layers_pattern", ["(?P<index>x)"]),
  ],
)
def test_a_field_that_is_not_obeyed(folder, field, value):
  edit_config(folder, **{field: value})
  shown = repr(value)[:200]
  assert_error(
    [folder], f"adapter_config.json: {field}: {shown} is not allowed; want "
  )


def test_layers_beside_a_regex(folder):
  edit_config(folder, target_modules=".*q_proj", layers_to_transform=[0])
  assert_error(
    [folder],
    "layers_to_transform: [0] is not allowed; want null, since target_modules"
    " is a regex",
  )


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "want an object, not list"),
    (b" " * (5 << 20), "5242880 bytes is too much"),
  ],
  ids=["cut", "binary", "deep", "list", "huge"],
)
def test_a_config_that_is_none(folder, content, message):
  (folder / "adapter_config.json").write_bytes(content)
  assert_error([folder], "adapter_config.json: ", message)


def test_every_tensor_without_a_place_is_named(folder):
  def damage(tensors):
    stray = np.ones((4, 64), np.float32)
    tensors["base_model.model.lm_head.lora_A.weight"] = stray
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = stray
    tensors[key(0, "mlp.up_proj", "A")] = stray
    tensors[key(1, "self_attn.c_attn", "A")] = stray
    tensors[key("01", "self_attn.q_proj", "A")] = stray
    tensors[key(10**9, "self_attn.q_proj", "A")] = stray
    del tensors[key(0, "self_attn.q_proj", "A")]
    del tensors[key(1, "self_attn.v_proj", "B")]

  edit_tensors(folder, damage)
  assert_error(
    [folder],
    "adapter_model.safetensors: ",
    "lm_head.lora_A.weight', ",
    "lora_embedding_A', ",
    f"{key(0, 'mlp.up_proj', 'A')}' is not a target in adapter_config.json",
    "c_attn.lora_A.weight', ",
    "layers.01.self_attn.q_proj.lora_A.weight', ",
    "layers.1000000000.self_attn.q_proj.lora_A.weight' is no LoRA tensor of a"
    " layer's linear map; ",
    f"; each of '{key(0, 'self_attn.q_proj', 'A')}',"
    f" '{key(1, 'self_attn.v_proj', 'B')}' is missing",
  )


def test_a_long_list_of_problems_is_cut(folder):
  names = [f"strange.{i:02}" for i in range(30)]
  strays = dict.fromkeys(names, np.ones(1))
  edit_tensors(folder, lambda tensors: tensors.update(strays))
  assert_error([folder], "strange.07' and 22 more is no LoRA tensor")


def test_a_target_that_has_no_tensors(folder):
  edit_config(folder, target_modules=["q_proj", "v_proj", "o_proj"])
  assert_error(
    [folder],
    *(
      f"'{key(layer, 'self_attn.o_proj', half)}'"
      for layer, half in itertools.product((0, 1), "AB")
    ),
    f"{key(1, 'self_attn.o_proj', 'B')}' is missing",
  )


@pytest.mark.parametrize(
  ("change", "rank"), [({"r": 5}, 5), ({"rank_pattern": {"q_proj": 3}}, 3)]
)
def test_a_rank_that_is_not_the_configs(folder, change, rank):
  edit_config(folder, **change)
  assert_error(
    [folder],
    "each of 'model.layers.0.self_attn.q_proj',"
    " 'model.layers.1.self_attn.q_proj' has A [4, 64] and B [64, 4], but"
    f" adapter_config.json gives it rank {rank}: want [{rank}, in],"
    f" [out, {rank}]",
  )


@pytest.mark.parametrize(
  ("tensor", "message"),
  [
    (np.ones((4, 64), np.int32), "is I32, not one of F64, F32"),
    (np.ones((4, 8, 8), np.float32), "has A [4, 8, 8]"),
    (np.ones(4, np.float32), "has A [4]"),
    (np.ones((), np.float32), "has A []"),
  ],
  ids=["int", "3-d", "1-d", "0-d"],
)
def test_a_tensor_that_is_no_matrix_of_floats(folder, tensor, message):
  name = key(1, "self_attn.q_proj", "A")
  edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
  assert_error([folder], "layers.1.self_attn.q_proj", message)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "huge"])
def test_weights_that_are_no_safetensors(folder, damage):
  path = folder / "adapter_model.safetensors"
  whole = path.read_bytes()
  path.write_bytes({
    "truncated": whole[:-100],
    "garbage": b"\x80\x02}q\x00." * 50,
    "empty": b"",
    "huge": (1 << 60).to_bytes(8, "little") + whole[8:],
  }[damage])  # fmt: skip
  assert_error(
    [folder], "adapter_model.safetensors: not a whole safetensors file ("
  )


def test_no_tensors_at_all(folder):
  edit_tensors(folder, dict.clear)
  assert_error([folder], "adapter_model.safetensors: it has no tensors")


def test_what_is_missing_is_named_with_what_is_near(folder):
  assert_error(
    [folder.parent / "plane"], "no such folder (did you mean 'plain'?)"
  )
  assert_error([folder.parent / "no" / "plain"], "no such folder")
  for name, wrong in (
    ("adapter_config.json", "adapter_conf.json"),
    ("adapter_model.safetensors", "adapter_model.safetensor"),
  ):
    (folder / name).rename(folder / wrong)
    assert_error([folder], f"no {name} (did you mean '{wrong}'?)")
    (folder / wrong).rename(folder / name)


def test_a_pickle_is_not_opened(folder):
  weights = folder / "adapter_model.safetensors"
  weights.rename(folder / "adapter_model.bin")
  assert_error([folder], "adapter_model.bin is a pickle", "save_pretrained(")


def test_names(folder):
  other = shutil.copytree(folder, folder.parent / "other")
  assert_error([folder, other, folder], "2 experts are named 'plain'")
  assert_error([folder], "2 names for 1 folders", names=["x", "y"])
  assert_error([], "no folder is given")
  assert_error(str(folder), f"{str(folder)!r} is one folder; want a list")


def test_experts_of_different_bases(folder, tmp_path):
  base = load_base("random:tiny", "float32")
  save_adapter(random_adapters(base, 1, 2), 0, tmp_path / "other")
  name = key(1, "self_attn.q_proj", "A")
  wider = np.ones((4, 48), np.float32)
  edit_tensors(folder, lambda tensors: tensors.update({name: wider}))
  assert_error(
    [folder, tmp_path / "other"],
    "layer 1 q has different [in, out]: 'plain' [48, 64], 'other' [64, 64]",
  )
  # Alone it loads, and does not fit the base.
  with pytest.raises(
    InputError, match=r"layer 1 q is made for \[in, out\] = \[48, 64\]"
  ):
    forward(base, [[1, 2]], load_adapters([folder]), [[1.0]])
