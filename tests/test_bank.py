"""The bank: what is saved is what is loaded, and nothing else is."""

import hashlib
import json
import shutil

from banks import NAMES, edit_about, make_bank, make_base, refused, to_format_1
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.config import InputError, RouterConfig
from tokenlora_jax.formats.peft import load_adapters
from tokenlora_jax.mixing.routers import ConstantRouter, register_router
from tokenlora_jax.model.lora import Adapters


@pytest.fixture(scope="module")
def base():
  return make_base()


@pytest.fixture(scope="module")
def bank():
  return make_bank()


@pytest.fixture
def folder(bank, tmp_path):
  save_bank(tmp_path / "bank", bank)
  return tmp_path / "bank"


@pytest.fixture
def old_folder(folder):
  return to_format_1(folder)


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
  assert again.lacking("hidden") == ()
  assert again.experts["beta"] == bank.experts["beta"]
  assert again.experts["alpha"] == Expert()
  fitted = again.fitted_for("second")
  assert (fitted.settings, fitted.experts) == ({"top": 2}, NAMES)
  assert fitted.arrays.keys() == {"order"}
  assert fitted.arrays["order"].tolist() == [1, 0, 2]
  assert again.folder == str(folder)
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
  assert {path.name for path in folder.iterdir()} == {
    *NAMES, "bank.json", "centroids.safetensors", "routers",
  }  # fmt: skip


def test_a_new_bank_replaces_the_old_one_whole(bank, folder, base):
  only = Bank(bank.adapters.select("beta"), "b", "f" * 64, {})
  save_bank(folder, only)
  again = load_bank(folder, base)
  assert again.adapters.names == ("beta",)
  assert [path.name for path in folder.parent.iterdir()] == ["bank"]
  assert {path.name for path in folder.iterdir()} == {
    "beta", "bank.json", "centroids.safetensors"
  }  # fmt: skip


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
  assert not list(folder.glob(".*"))
  with pytest.raises(Exception, match="object"):
    save_bank(folder.parent / "new", broken)
  assert [path.name for path in folder.parent.iterdir()] == ["bank"]


def test_bank_json_says_what_is_in_the_bank(folder):
  about = json.loads((folder / "bank.json").read_text())
  assert about["format"] == 2
  assert [expert["name"] for expert in about["experts"]] == list(NAMES)
  beta = about["experts"][1]
  assert (beta["task"], beta["ranks"], beta["scalings"]) == ("squad", [4], [4])
  assert beta["template"] == "Question: {question}\n\nAnswer:"
  assert beta["targets"] == ["q", "v"]
  for file, digest in beta["sha256"].items():
    content = (folder / "beta" / file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
  assert about["centroids"]["experts"] == {"hidden": list(NAMES)}
  second = about["fitted"]["second"]
  assert second["file"] == "routers/second.safetensors"
  assert (second["settings"], second["shapes"]) == ({"top": 2}, {"order": [3]})
  assert "moving" not in about


def test_format_1_is_read_and_saved_as_2(bank, old_folder, base, tmp_path):
  old = load_bank(old_folder, base)
  assert old.adapters.names == NAMES
  jax.tree.map(
    np.testing.assert_array_equal, old.adapters.layers, bank.adapters.layers
  )
  np.testing.assert_array_equal(
    old.centroids["hidden"], bank.centroids["hidden"]
  )
  assert (old.experts["beta"], old.fitted) == (Expert(), {})
  for folder in (tmp_path / "copy", old_folder):
    save_bank(folder, old)
    assert json.loads((folder / "bank.json").read_text())["format"] == 2
    assert load_bank(folder, base).adapters.names == NAMES


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
  narrow = json.loads((folder / "bank.json").read_text())["experts"][1]
  edit_about(other, "experts", 1, **narrow)
  refused(other, base, "layer 0 q has different [in, out]", "'beta' [32, 32]")


def damages(folder):
  """Every file of a bank but bank.json, damaged or exchanged in turn."""
  for file in sorted(folder.rglob("*")):
    if file.is_file() and file.name != "bank.json":
      whole = file.read_bytes()
      flipped = bytearray(whole)
      flipped[len(whole) // 2] ^= 1
      for content in (b"", whole[:-1], bytes(flipped)):
        file.write_bytes(content)
        yield file
      file.write_bytes(whole)


def test_a_damaged_file_is_named(folder, base):
  files = set()
  for file in damages(folder):
    refused(
      folder, base, f"{file}: was damaged or exchanged: its sha256 begins"
    )
    files.add(file.name)
  assert len(files) == 4
  # Another expert's weights are whole, but not these.
  weights = "adapter_model.safetensors"
  shutil.copy(folder / "alpha" / weights, folder / "beta" / weights)
  refused(
    folder, base, f"{folder / 'beta' / weights}: was damaged or exchanged"
  )


def test_missing_files_are_named(folder, base):
  for file in ("routers/second.safetensors", "centroids.safetensors"):
    (folder / file).unlink()
    refused(folder, base, str(folder / file), "cannot be read")
  (folder / "beta" / "adapter_config.json").unlink()
  refused(folder, base, "beta: there is no adapter_config.json")
  shutil.rmtree(folder / "beta")
  refused(folder, base, "beta: there is no such folder")


def test_damage_without_hashes_is_found_by_its_form(old_folder, base):
  weights = old_folder / "gamma" / "adapter_model.safetensors"
  whole = weights.read_bytes()
  for size in (0, 7, 100, len(whole) - 1):
    weights.write_bytes(whole[:size])
    refused(old_folder, base, str(weights), "not a whole safetensors file")
  weights.write_bytes(whole)
  table = old_folder / "centroids.safetensors"
  table.write_bytes(table.read_bytes()[:-1])
  refused(old_folder, base, str(table), "cannot be read")
  for tables in (
    {"hidden": np.ones((2, 64), np.float32)},
    {"hidden": np.full((3, 64), np.nan, np.float32)},
    {"else": np.ones((3, 64), np.float32)},
  ):
    save_file(tables, table)
    refused(old_folder, base, str(table), "hidden: want a table of 3 centroids")


BASE = '"base": {"path": "", "fingerprint": ""}'
NONE = '"centroids": {"sha256": "", "experts": {}}, "fitted": {}'


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("", "is not a bank's"),
    ("[]", "is not a bank's"),
    ("{", "is not a bank's"),
    ('{"format": 1}', "'experts'"),
    ('{"format": 2}', "'experts'"),
    ('{"format": [2]}', "is not a bank's"),
    ('{"format": 1, "base": "x", "experts": [], "encoders": []}', "bank's"),
    (f'{{"format": 2, {BASE}, "experts": ["x"], {NONE}}}', "bank's"),
    (f'{{"format": 2, {BASE}, "experts": [], {NONE}}}', "'' is no sha256"),
    (
      f'{{"format": 3, {BASE}, "experts": [], {NONE}}}',
      "format 3; this version reads 1 and 2",
    ),
  ],
)
def test_a_damaged_bank_json_is_refused(folder, base, text, told):
  (folder / "bank.json").write_text(text)
  refused(folder, base, "bank.json", told)


@pytest.mark.parametrize(
  ("keys", "changes", "told"),
  [
    (["experts", 1], {"name": "alpha"}, "experts of one name"),
    (["experts", 1], {"ranks": [8]}, "beta: has ranks, scalings and targets"),
    (["experts", 1], {"scalings": [2.0]}, "bank.json says ((4,), (2.0,)"),
    (["experts", 1], {"task": None}, "'None' is no str"),
    (["experts", 1, "sha256"], {"adapter_config.json": "0" * 64}, "damaged"),
    (["centroids", "experts"], {"hidden": ["delta"]}, "centroids of experts"),
    (["fitted", "second"], {"file": "/etc/passwd"}, "file '/etc/passwd'"),
    (
      ["fitted", "second"],
      {"shapes": {"order": [1, 3]}},
      "{'order': [3]}, but",
    ),
    (["fitted"], {"../x": {}}, "fitted: '../x' is no folder's name"),
    ([], {"moving": {"scratch": "..", "gone": []}}, "moving: '..'"),
    (
      [],
      {"moving": {"scratch": ".new-x", "gone": ["../../home"]}},
      "moving: '../../home' is no folder's name",
    ),
    (
      [],
      {"moving": {"scratch": ".new-x", "gone": ["alpha"]}},
      "experts that are gone",
    ),
  ],
)
def test_a_changed_bank_json_is_refused(folder, base, keys, changes, told):
  edit_about(folder, *keys, **changes)
  refused(folder, base, told)


@pytest.mark.parametrize(
  "name", ["../alpha", "/etc", "", ".", "..", "a/b", ".x", "routers", "a\nb"]
)
def test_experts_cannot_point_out_of_the_bank(old_folder, bank, base, name):
  edit_about(old_folder, experts=["alpha", name, "gamma"])
  refused(old_folder, base, f"experts: {name!r} is no folder's name")
  with pytest.raises(InputError, match="is no folder's name"):
    save_bank(old_folder, Bank(Adapters((name,), ()), "b", "f", {}))
  save_bank(old_folder, bank)
  edit_about(old_folder, "experts", 1, name=name)
  refused(old_folder, base, f"experts: {name!r} is no folder's name")


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
  np.testing.assert_array_equal(hidden.table, table)
  assert hidden.gates(1, (), table[1:2]).argmax() == 1

  @register_router("second-of-three")
  def second():
    return ConstantRouter(jnp.array([0.0, 1.0, 0.0]))

  mine = bank.router(RouterConfig(name="second-of-three"))
  assert mine.gates(1, (), None).tolist() == [[0, 1, 0]]


def test_a_router_of_ones_own_keeps_its_own_settings(bank):
  """A setting of the config that nobody gave is no reason to change them."""
  reached = []

  @register_router("mine")
  def mine(
    centroids, gates, encoder="hidden", sharpen=9.0, prior="sum", other=3
  ):
    reached.append((centroids, gates, encoder, sharpen, prior, other))
    return ConstantRouter(jnp.asarray(gates))

  gates = (0.5, 0.25, 0.25)
  bank.router(RouterConfig(name="mine", gates=gates))
  bank.router(
    RouterConfig(name="mine", gates=gates, sharpen=2.0, prior="fixed")
  )
  (table, *left_out), (_, *given) = reached
  np.testing.assert_array_equal(table, bank.centroids["hidden"])
  assert left_out == [gates, "hidden", 9.0, "sum", 3]
  assert given[:3] == [gates, "hidden", 2.0]
  # A prior that is given is a router already.
  assert given[3].gates(1, (), None).tolist() == [list(gates)]


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
