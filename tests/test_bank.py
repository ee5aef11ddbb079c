"""The bank: what is saved is what is loaded, and nothing else is."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tokenlora_jax.config import InputError, RouterConfig
from tokenlora_jax.interop.bank import Bank, load_bank, save_bank
from tokenlora_jax.interop.peft import load_adapters
from tokenlora_jax.mixing.routers import ConstantRouter, register_router
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, random_adapters

NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def base():
  return Llama(
    PRESETS["tiny"], lambda _, shape: jnp.ones(shape), fingerprint="f" * 64
  )


@pytest.fixture(scope="module")
def bank(base):
  adapters = random_adapters(base, experts=3, rank=4)
  rng = np.random.default_rng(0)
  tables = {"hidden": rng.normal(size=(3, 64)).astype(np.float32)}
  return Bank(Adapters(NAMES, adapters.layers), "some/base", "f" * 64, tables)


@pytest.fixture
def folder(bank, tmp_path):
  save_bank(tmp_path / "bank", bank)
  return tmp_path / "bank"


def edit_about(folder, **changes):
  file = folder / "bank.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, base, *told):
  with pytest.raises(InputError) as caught:
    load_bank(folder, base)
  message = str(caught.value)
  assert "\n" not in message
  for part in told:
    assert part in message, message


def test_a_bank_comes_back_whole(bank, folder, base, tmp_path):
  again = load_bank(folder, base)
  assert again.adapters.names == NAMES
  assert (again.base, again.fingerprint) == ("some/base", "f" * 64)
  jax.tree.map(
    np.testing.assert_array_equal, again.adapters.layers, bank.adapters.layers
  )
  assert again.centroids.keys() == {"hidden"}
  np.testing.assert_array_equal(
    again.centroids["hidden"], bank.centroids["hidden"]
  )
  # Each expert is a PEFT folder for itself, and names its base.
  alone = load_adapters([folder / "beta"])
  jax.tree.map(
    np.testing.assert_array_equal,
    alone.layers,
    bank.adapters.select("beta").layers,
  )
  config = json.loads((folder / "beta" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "some/base"
  # Nothing temporary stays.
  assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_a_new_bank_replaces_the_old_one_whole(bank, folder, base):
  only = Bank(bank.adapters.select("beta"), "b", "f" * 64, {})
  save_bank(folder, only)
  again = load_bank(folder, base)
  assert again.adapters.names == ("beta",)
  assert not (folder / "alpha").exists()
  assert [path.name for path in folder.parent.iterdir()] == ["bank"]


def test_what_is_no_bank_is_never_replaced(bank, tmp_path):
  other = tmp_path / "thesis"
  other.mkdir()
  (other / "text.tex").write_text("years of work")
  with pytest.raises(InputError, match=r"thesis: exists and is not a bank"):
    save_bank(other, bank)
  assert (other / "text.tex").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_bank(bank, folder, base):
  broken = Bank(bank.adapters, "b", "f", {"hidden": object()})
  with pytest.raises(Exception, match="object"):
    save_bank(folder, broken)
  assert load_bank(folder, base).base == "some/base"
  assert [path.name for path in folder.parent.iterdir()] == ["bank"]


def test_a_bank_of_another_base_is_refused(bank, folder, base):
  edit_about(folder, base={"path": "his/base", "fingerprint": "e" * 64})
  refused(folder, base, "trained on his/base", "eeeeeeeeeeee", "ffffffffffff")
  assert load_bank(folder).base == "his/base"


def test_peft_folders_of_another_base_are_refused(bank, folder, base):
  """One fingerprint is in bank.json, but the adapters say otherwise."""
  narrow = jax.tree.map(
    lambda x: x[..., :32] if x.ndim == 3 else x, bank.adapters.layers
  )
  save_bank(folder, Bank(Adapters(NAMES, narrow), "b", "f" * 64, {}))
  refused(
    folder, base, "layer 0 q is made for [in, out] = [32, 32]", "[64, 64]"
  )
  # Or one of them.
  other = folder.parent / "other"
  save_bank(other, bank)
  shutil.rmtree(other / "beta")
  shutil.copytree(folder / "beta", other / "beta")
  refused(other, base, "layer 0 q has different [in, out]", "'beta' [32, 32]")


def test_damaged_tensors_are_refused(bank, folder, base):
  weights = folder / "gamma" / "adapter_model.safetensors"
  whole = weights.read_bytes()
  for size in (0, 7, 100, len(whole) - 1):
    weights.write_bytes(whole[:size])
    refused(folder, base, str(weights), "not a whole safetensors file")
  weights.write_bytes(whole)
  table = folder / "centroids.safetensors"
  whole = table.read_bytes()
  table.write_bytes(whole[:-1])
  refused(folder, base, str(table), "cannot be read")
  table.unlink()
  refused(folder, base, str(table), "cannot be read")
  save_file({"hidden": np.ones((2, 64), np.float32)}, table)
  refused(folder, base, str(table), "hidden: want a table of 3 centroids")
  save_file({"else": np.ones((3, 64), np.float32)}, table)
  refused(folder, base, str(table), "hidden: want a table of 3 centroids")
  table.write_bytes(whole)
  assert load_file(table).keys() == {"hidden"}
  shutil.rmtree(folder / "beta")
  refused(folder, base, "beta: there is no such folder")


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("", "is not a bank's"),
    ("[]", "is not a bank's"),
    ("{", "is not a bank's"),
    ('{"format": 1}', "'base'"),
    ('{"format": 1, "base": "x", "experts": [], "encoders": []}', "bank's"),
    (
      '{"format": 2, "base": {"path": "", "fingerprint": ""}, "experts": [],'
      ' "encoders": []}',
      "format 2; this version reads 1",
    ),
  ],
)
def test_a_damaged_bank_json_is_refused(folder, base, text, told):
  (folder / "bank.json").write_text(text)
  refused(folder, base, "bank.json", told)


@pytest.mark.parametrize("name", ["../alpha", "/etc", "", ".", "..", "a/b"])
def test_experts_cannot_point_out_of_the_bank(folder, base, name):
  edit_about(folder, experts=["alpha", name, "gamma"])
  refused(folder, base, f"experts: {name!r} is no folder's name")


def test_a_path_without_a_bank_names_the_nearest(folder, base):
  refused(folder.parent / "bnak", base, "holds no bank.json", "bank'?)")
  refused(folder.parent / "no" / "where", base, "holds no bank.json")
  refused(folder / "bank.json", base, "holds no bank.json")


def test_routers_of_a_bank(bank):
  gates = bank.router(RouterConfig(name="uniform")).gates(1, (), None)
  np.testing.assert_allclose(gates, [[1 / 3] * 3])
  one = bank.router(RouterConfig(name="one-hot", expert="gamma"))
  assert one.gates(1, (), None).tolist() == [[0, 0, 1]]
  fixed = bank.router(RouterConfig(name="fixed", gates=(0.5, 0, 2)))
  assert fixed.gates(1, (), None).tolist() == [[0.5, 0, 2]]
  hidden = bank.router(RouterConfig(encoder="hidden", sharpen=3))
  assert hidden.needs == "hidden"
  assert float(hidden.sharpen) == 3
  table = bank.centroids["hidden"]
  np.testing.assert_array_equal(hidden.centroids, table)
  assert hidden.gates(1, (), table[1:2]).argmax() == 1

  @register_router("second-of-three")
  def second():
    return ConstantRouter(jnp.array([0.0, 1.0, 0.0]))

  mine = bank.router(RouterConfig(name="second-of-three"))
  assert mine.gates(1, (), None).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
  ("settings", "told"),
  [
    ({"name": "centriod"}, "did you mean 'centroid'"),
    ({"name": "one-hot", "expert": "gama"}, "did you mean 'gamma'"),
    ({"name": "one-hot"}, "'' is not one of alpha, beta, gamma"),
    ({"name": "fixed", "gates": (1.0, 0.0)}, "made for 2 experts, .* has 3"),
    ({"name": "fixed"}, r"router\.gates"),
    ({"encoder": "minilm"}, "no centroids of 'minilm', only of hidden"),
    ({"encoder": "hidden", "sharpen": -1.0}, r"router\.sharpen: -1"),
  ],
)
def test_bad_routers_are_one_line(bank, settings, told):
  with pytest.raises(InputError, match=told) as caught:
    bank.router(RouterConfig(**settings))
  assert "\n" not in str(caught.value)
