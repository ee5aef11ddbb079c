"""Adapters against PEFT itself: its folders here, and ours there."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.peft import load_adapters, save_adapter
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.model.lora import Adapters, Lora, random_adapters

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS += ["gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 11))

# What an adapter is made with, beside r 4, alpha 8 and the targets q and v.
CASES = {
  "plain": {},
  "rank 1": {"r": 1},
  "rank 7, all seven": {"r": 7, "lora_alpha": 5, "target_modules": LINEARS},
  "rslora": {"use_rslora": True},
  "all-linear": {"target_modules": "all-linear"},
  "rank pattern": {
    "target_modules": LINEARS,
    "rank_pattern": {"up_proj": 2, r"layers\.1\.self_attn\..*": 6},
  },
  "alpha pattern": {
    "target_modules": LINEARS,
    "alpha_pattern": {"layers.0.self_attn.q_proj": 32, "down_proj": 3},
  },
  "patterns and rslora": {
    "use_rslora": True,
    "rank_pattern": {"^model.layers.0.self_attn.v_proj": 3},
    "alpha_pattern": {"q_proj": 1.5},
  },
  "regex targets": {"target_modules": r".*\.[01]\.(self_attn\.k|mlp\.up)_proj"},
  "regex on one layer": {
    "target_modules": r"model\.layers\.1\..*(q|down)_proj"
  },
  "whole paths": {
    "target_modules": [
      "model.layers.0.self_attn.q_proj",
      "layers.1.mlp.up_proj",
    ]
  },
  "one layer": {"layers_to_transform": 1},
  "layers": {"layers_to_transform": [0]},
  "layers pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
  "excluded": {"target_modules": LINEARS, "exclude_modules": ["v_proj"]},
  "excluded regex": {
    "target_modules": LINEARS,
    "exclude_modules": r".*layers\.0\..*",
  },
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=60,
      hidden_size=40,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=10,
    )
  )
  for parameter in model.parameters():
    if parameter.ndim == 2:
      torch.nn.init.normal_(parameter, 0, 0.15)
  folder = tmp_path_factory.mktemp("base")
  model.save_pretrained(folder)
  return folder


@pytest.fixture
def torch_base(base_folder):
  """A new one each time: PEFT changes what it wraps."""
  return transformers.LlamaForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def base(base_folder):
  return load_base(str(base_folder), "float32")


@pytest.fixture(scope="module")
def made(base_folder, tmp_path_factory):
  """Returns the folder of a case's random adapter, made by PEFT."""
  root = tmp_path_factory.mktemp("adapters")

  def make(case, seed=0):
    folder = root / f"{case} {seed}"
    if not folder.exists():
      torch.manual_seed(100 + seed)
      settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
      }
      model = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base_folder),
        peft.LoraConfig(
          # Random B too, or no adapter would do anything.
          init_lora_weights=False,
          task_type="CAUSAL_LM",
          **settings | CASES[case],
        ),
      )
      model.save_pretrained(folder)
    return folder

  return make


def logits_of(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


def one_hot(index, experts):
  return np.tile(np.eye(experts, dtype=np.float32)[index], (len(TOKENS), 1))


def assert_same(left, right):
  assert left.names == right.names
  assert jax.tree.structure(left.layers) == jax.tree.structure(right.layers)
  jax.tree.map(np.testing.assert_array_equal, left.layers, right.layers)


class TestLoad:
  @pytest.mark.parametrize("case", CASES)
  def test_logits_are_those_of_peft(self, made, torch_base, base, case):
    model = peft.PeftModel.from_pretrained(torch_base, made(case))
    want = logits_of(model)
    got = forward(base, TOKENS, load_adapters([made(case)]), one_hot(0, 1))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want - forward(base, TOKENS)).max() > 1e-2

  def test_a_bank_gives_each_expert_back(self, made, base):
    """Experts of other ranks, scalings and maps share one bank."""
    cases = list(CASES)
    bank = load_adapters([made(case) for case in cases], cases)
    assert bank.names == tuple(cases)
    assert bank.layers[0]["q"].a.shape == (len(cases), 7, 40)
    assert bank.layers[1]["v"].b.shape == (len(cases), 7, 20)
    for i, case in enumerate(cases):
      alone = load_adapters([made(case)])
      np.testing.assert_allclose(
        forward(base, TOKENS, bank, one_hot(i, len(cases))),
        forward(base, TOKENS, alone, one_hot(0, 1)),
        atol=1e-5,
      )

  def test_maps_that_no_expert_adapts_are_absent(self, made):
    bank = load_adapters([made("one layer"), made("layers")], ["x", "y"])
    assert [sorted(layer) for layer in bank.layers] == [["q", "v"]] * 2
    # x adapts layer 1, y layer 0.
    for layer, missing in ((0, 0), (1, 1)):
      lora = bank.layers[layer]["q"]
      assert not lora.a[missing].any() and not lora.b[missing].any()
      assert lora.a[1 - missing].all() and lora.b[1 - missing].all()
    assert [len(x) for x in load_adapters([made("one layer")]).layers] == [0, 2]
    assert len(load_adapters([made("layers")]).layers) == 1

  def test_scaling_and_layout(self, made):
    folder = made("patterns and rslora")
    lora = load_adapters([folder]).layers[0]["v"]
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    np.testing.assert_array_equal(lora.a[0], tensors[key.format("A")])
    np.testing.assert_array_equal(lora.b[0], tensors[key.format("B")].T)
    np.testing.assert_allclose(lora.scaling, [8 / math.sqrt(3)], rtol=1e-6)

  def test_names_are_the_folders_names(self, made):
    folders = [made("plain"), str(made("rslora"))]
    assert load_adapters(folders).names == ("plain 0", "rslora 0")


class TestMixture:
  def test_exact_is_what_peft_calls_cat(self, made, torch_base, base):
    # Not rsLoRA first: PEFT then scales its own mixture by the root of its rank.
    cases = ["plain", "rank 7, all seven", "alpha pattern", "rslora"]
    gates = [0.4, 0.3, 0.2, 0.1]
    model = peft.PeftModel.from_pretrained(
      torch_base, made(cases[0]), adapter_name="0"
    )
    for i, case in enumerate(cases[1:], 1):
      model.load_adapter(made(case), adapter_name=str(i))
    model.add_weighted_adapter(
      list("0123"), gates, "mixed", combination_type="cat"
    )
    model.set_adapter("mixed")
    bank = load_adapters([made(case) for case in cases])
    got = forward(base, TOKENS, bank, np.tile(gates, (2, 1)))
    np.testing.assert_allclose(got, logits_of(model), atol=1e-4)
    # A sequence's gates are its own.
    other = [0.0, 0.0, 1.0, 0.0]
    both = forward(base, TOKENS, bank, np.array([gates, other]))
    np.testing.assert_allclose(both[0], got[0], atol=1e-5)
    model.set_adapter("2")
    np.testing.assert_allclose(both[1], logits_of(model)[1], atol=1e-4)

  @pytest.mark.parametrize(
    "gates", [[0.4, 0.3, 0.2, 0.1], [1.5, -0.3, 0.0, 0.2]]
  )
  def test_peft_linear_is_what_peft_calls_linear(
    self, made, torch_base, base, gates
  ):
    folders = [made("plain", seed) for seed in range(3)]
    folders.append(made("alpha pattern"))
    model = peft.PeftModel.from_pretrained(
      torch_base, folders[0], adapter_name="0"
    )
    for i, folder in enumerate(folders[1:], 1):
      model.load_adapter(folder, adapter_name=str(i))
    model.add_weighted_adapter(
      list("0123"), gates, "mixed", combination_type="linear"
    )
    model.set_adapter("mixed")
    bank = load_adapters(folders, list("0123"))
    # A sequence's gates are its own.
    both = np.array([gates, [0.0, 0.0, 1.0, 0.0]])
    got = forward(base, TOKENS, bank, both, rule="peft_linear")
    np.testing.assert_allclose(got[0], logits_of(model)[0], atol=1e-4)
    model.set_adapter("2")
    np.testing.assert_allclose(got[1], logits_of(model)[1], atol=1e-4)
    exact = forward(base, TOKENS, bank, both)
    assert np.abs(got[0] - exact[0]).max() > 1e-2


class TestSave:
  def test_peft_reads_what_we_write(self, torch_base, base, tmp_path):
    adapters = random_adapters(base, experts=3, rank=5, seed=3)
    save_adapter(adapters, "e1", tmp_path / "saved", base_name="some/base")
    config = peft.PeftConfig.from_pretrained(tmp_path / "saved")
    assert config.base_model_name_or_path == "some/base"
    model = peft.PeftModel.from_pretrained(torch_base, tmp_path / "saved")
    want = logits_of(model)
    got = forward(base, TOKENS, adapters, one_hot(1, 3))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want - forward(base, TOKENS)).max() > 1e-2

  @pytest.mark.parametrize("case", CASES)
  def test_loading_saving_and_loading_is_loading(
    self, made, torch_base, base, tmp_path, case
  ):
    """Out of a bank whose padding must not come along, and through PEFT."""
    bank = load_adapters([made("rank 7, all seven"), made(case, seed=1)])
    for i in (0, 1):
      save_adapter(bank, i, tmp_path / bank.names[i])
    again = load_adapters([tmp_path / name for name in bank.names])
    assert_same(bank, again)
    saved = tmp_path / bank.names[1]
    assert_same(load_adapters([saved]), load_adapters([made(case, seed=1)]))

    model = peft.PeftModel.from_pretrained(torch_base, saved)
    got = forward(base, TOKENS, bank, one_hot(1, 2))
    np.testing.assert_allclose(got, logits_of(model), atol=1e-4)
    # PEFT has no map that we did not write.
    maps = [name for name in model.state_dict() if "lora_A" in name]
    assert len(maps) == len(load_file(saved / "adapter_model.safetensors")) / 2

  def test_a_fresh_adapter_keeps_its_rank(self, tmp_path):
    """B is all zero then, and only rows where A is zero too are padding."""
    a = np.ones((1, 6, 8), np.float32)
    a[0, 2] = a[0, 4:] = 0
    fresh = Lora(
      a, np.zeros((1, 6, 4), np.float32), np.full(1, 0.3, np.float32)
    )
    save_adapter(Adapters(("x",), ({"q": fresh},)), "x", tmp_path / "x")
    lora = load_adapters([tmp_path / "x"]).layers[0]["q"]
    np.testing.assert_array_equal(lora.a, a[:, :4])
    assert lora.b.shape == (1, 4, 4)
    assert lora.scaling == np.float32(0.3)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {})
    assert config["lora_alpha"] / 4 == np.float32(0.3)

  def test_scalings_and_ranks_of_each_map_survive(self, tmp_path):
    rng = np.random.default_rng(0)
    layers = tuple(
      {
        name: Lora(
          *(rng.normal(size=(1, rank, 6)).astype(np.float32) for _ in "ab"),
          rng.normal(size=1).astype(np.float32),
        )
        for name, rank in names.items()
      }
      for names in ({"q": 3, "up": 2}, {}, {"q": 1}, {"down": 3})
    )
    bank = Adapters(("x",), layers)
    save_adapter(bank, 0, tmp_path / "x")
    assert_same(bank, load_adapters([tmp_path / "x"]))

  def test_an_adapter_is_replaced_and_its_neighbours_stay(self, base, tmp_path):
    adapters = random_adapters(base, experts=2, rank=3)
    save_adapter(adapters, 0, tmp_path / "deep" / "x")
    folder = tmp_path / "deep" / "x"
    (folder / "README.md").write_text("mine")
    (folder / "adapter_model.bin").write_text("stale")
    save_adapter(adapters, 1, folder)
    assert_same(
      load_adapters([folder], ["e1"]),
      adapters.select("e1"),
    )
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(p.name for p in folder.iterdir()) == [
      "README.md",
      "adapter_config.json",
      "adapter_model.safetensors",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["x"]

  @pytest.mark.parametrize("failing", ["save_file", "rename"])
  def test_a_failure_leaves_the_old_adapter(
    self, base, tmp_path, monkeypatch, failing
  ):
    adapters = random_adapters(base, experts=2, rank=3)
    folder = tmp_path / "x"
    save_adapter(adapters, 0, folder)

    def full(tensors, path, metadata=None):
      Path(path).write_bytes(b"half")
      raise OSError("no space left")

    rename = Path.rename

    def only_away(self, target):
      if self.name == "new":
        raise OSError("no space left")
      return rename(self, target)

    if failing == "save_file":
      monkeypatch.setattr("safetensors.numpy.save_file", full)
    else:
      monkeypatch.setattr(Path, "rename", only_away)
    with pytest.raises(OSError, match="no space left"):
      save_adapter(adapters, 1, folder)
    assert_same(load_adapters([folder], ["e0"]), adapters.select("e0"))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(OSError, match="no space left"):
      save_adapter(adapters, 1, tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]

  def test_other_folders_are_not_overwritten(self, base, tmp_path):
    adapters = random_adapters(base, experts=2, rank=3)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="thesis: holds something other"):
      save_adapter(adapters, 0, tmp_path / "thesis")
    with pytest.raises(InputError, match=r"thesis\.tex: is a file"):
      save_adapter(adapters, 0, tmp_path / "thesis" / "thesis.tex")
    with pytest.raises(InputError, match=r"'e3' is not one of e0, e1"):
      save_adapter(adapters, "e3", tmp_path / "new")
    silent = Adapters(
      ("x",), jax.tree.map(np.zeros_like, adapters.select(0).layers)
    )
    with pytest.raises(InputError, match="'x': all of it is zero"):
      save_adapter(silent, "x", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    save_adapter(adapters, 0, tmp_path / "empty")
    assert load_adapters([tmp_path / "empty"]).names == ("empty",)


@pytest.mark.realdata
def test_trained_adapters_give_the_logits_they_are_known_by(data_dir):
  base = load_base(str(data_dir / "stories260K"), "float32")
  known = np.load(data_dir / "peft_adapters/stories260K_expected_logits.npz")
  tokens, names = known["input_ids"], ("gsm8k", "codealpaca")
  bank = load_adapters(
    [data_dir / "peft_adapters" / f"stories260K-{name}" for name in names],
    names,
  )
  np.testing.assert_allclose(forward(base, tokens), known["base"], atol=1e-4)
  for name, gates in zip(names, np.eye(2), strict=True):
    got = forward(base, tokens, bank, gates[None])
    np.testing.assert_allclose(got, known[name], atol=1e-4)
