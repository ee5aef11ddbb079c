"""A frozen mixture as one PEFT folder, against PEFT and dense matrices."""

import json
import tracemalloc

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from tokenlora_jax import forward
from tokenlora_jax.bank.export import export_mixture
from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.peft import load_adapters
from tokenlora_jax.model.lora import Adapters, Lora

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 11))
# Other ranks, scalings and projections; one on a layer alone.
EXPERTS = {
  "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
  "rslora": {
    "r": 3, "lora_alpha": 5, "use_rslora": True,
    "target_modules": ["v_proj", "o_proj", "up_proj"],
  },
  "patterns": {
    "r": 5, "target_modules": "all-linear", "layers_to_transform": None,
    "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 30},
  },
  "one layer": {"r": 1, "target_modules": ["k_proj"], "layers_to_transform": 1},
}  # fmt: skip
GATES = [0.4, -0.7, 0.25, 1.5]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=60, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, head_dim=10,
    )
  )  # fmt: skip
  for parameter in model.parameters():
    if parameter.ndim == 2:
      torch.nn.init.normal_(parameter, 0, 0.15)
  folder = tmp_path_factory.mktemp("base")
  model.save_pretrained(folder)
  return folder


def torch_base(folder):
  return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def adapters(base_folder, tmp_path_factory):
  root = tmp_path_factory.mktemp("adapters")
  for seed, (name, settings) in enumerate(EXPERTS.items()):
    torch.manual_seed(seed)
    config = peft.LoraConfig(
      init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    model = peft.get_peft_model(torch_base(base_folder), config)
    model.save_pretrained(root / name)
  return load_adapters([root / name for name in EXPERTS])


def logits_of(base_folder, folder):
  model = peft.PeftModel.from_pretrained(torch_base(base_folder), folder)
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


def dense(adapters, gates):
  """sum_e g_e s_e A_e^T B_e of every map, [in, out], the slow way."""
  return {
    (i, name): np.einsum(
      "e,eri,ero->io", np.asarray(gates) * lora.scaling, lora.a, lora.b
    )
    for i, layer in enumerate(adapters.layers)
    for name, lora in layer.items()
  }


def test_peft_makes_of_it_what_the_mixture_is(base_folder, adapters, tmp_path):
  base = load_base(str(base_folder), "float32")
  made = export_mixture(adapters, GATES, tmp_path / "x", base_name="some/base")
  want = forward(base, TOKENS, adapters, np.tile(GATES, (2, 1)))
  np.testing.assert_allclose(
    logits_of(base_folder, tmp_path / "x"), want, atol=1e-4
  )
  assert np.abs(want - forward(base, TOKENS)).max() > 1e-2
  # v is adapted by three, of ranks 4, 3 and 5.
  assert (made.rank, made.error) == (12, 0)
  assert set(made.errors.values()) == {0}
  # And here it is an adapter like any other.
  alone = load_adapters([tmp_path / "x"])
  got = forward(base, TOKENS, alone, np.ones((2, 1)))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_server_that_reads_no_patterns_reads_it(adapters, tmp_path):
  export_mixture(adapters, GATES, tmp_path, base_name="some/base")
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"]) == (12, 12)
  assert config["rank_pattern"] == config["alpha_pattern"] == {}
  assert config["base_model_name_or_path"] == "some/base"
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  assert len(tensors) == 2 * 2 * 7
  for name, tensor in tensors.items():
    assert tensor.shape["lora_B" in name] == 12
    assert tensor.dtype == np.float32


def test_every_map_is_the_sum(adapters, tmp_path):
  export_mixture(adapters, GATES, tmp_path)
  exact, alone = dense(adapters, GATES), load_adapters([tmp_path])
  for place, got in dense(alone, [1.0]).items():
    np.testing.assert_allclose(got, exact[place], atol=1e-5)
    assert np.abs(got).max() > 1e-2


@pytest.mark.parametrize("rank", [1, 3, 7, 40])
def test_a_smaller_rank_is_the_nearest_there_is(adapters, tmp_path, rank):
  made = export_mixture(adapters, GATES, tmp_path, rank=rank)
  exact = dense(adapters, GATES)
  got = dense(load_adapters([tmp_path]), [1.0])
  lost = total = 0.0
  for place, matrix in exact.items():
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    # The singular values that are left differ, or else there are two nearest.
    np.testing.assert_allclose(got[place], best, atol=1e-5)
    error = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
    assert made.errors[place] == pytest.approx(error, abs=1e-6)
    lost += np.linalg.norm(got[place] - matrix) ** 2
    total += np.linalg.norm(matrix) ** 2
  assert made.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
  assert made.rank == min(rank, 12)
  assert (made.error > 0.01) == (rank < 12)


def test_a_gate_of_zero_takes_no_rank(adapters, tmp_path):
  made = export_mixture(adapters, [0, 2.0, 0, 0], tmp_path)
  assert made.rank == 3
  got = dense(load_adapters([tmp_path]), [1.0])
  want = dense(adapters.select("rslora"), [2.0])
  assert {place for place, x in want.items() if x.any()} == got.keys()
  for place, matrix in got.items():
    np.testing.assert_allclose(matrix, want[place], atol=1e-5)


def test_bad_exports_are_one_line_and_overwrite_nothing(adapters, tmp_path):
  (tmp_path / "thesis.tex").write_text("years")
  for gates, rank, told in (
    ([1.0, 2.0], None, "gates: 2 numbers for 4 experts .plain, rslora"),
    ([np.nan, 1, 1, 1], None, r"gates: \[nan, .* want finite"),
    ([0, 0, 0, 0], None, "leave nothing of plain"),
    (GATES, 0, "rank: 0 is not allowed; want a whole number of at least 1"),
    (GATES, 1.5, "rank: 1.5"),
    (GATES, None, "holds something other than a PEFT adapter"),
  ):
    with pytest.raises(InputError, match=told) as caught:
      export_mixture(adapters, gates, tmp_path, rank)
    assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_dense_matrix_is_made(tmp_path):
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=(2, 2, 30_000)).astype(np.float32) for _ in "ab")
  wide = Adapters(("x", "y"), ({"q": Lora(a, b, np.ones(2, np.float32))},))
  tracemalloc.start()
  made = export_mixture(wide, [0.5, 0.5], tmp_path / "x", rank=3)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert 0.1 < made.error < 0.9
  assert peak < 100e6  # [30000, 30000] takes 3600e6.
