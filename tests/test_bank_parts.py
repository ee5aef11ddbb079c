"""What a bank holds for routers, and several banks as one."""

import dataclasses

from banks import NAMES, make_bank, make_base, refused
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.config import InputError, RouterConfig
from tokenlora_jax.mixing.routers import ConstantRouter, register_router
from tokenlora_jax.model.lora import Adapters, random_adapters


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


# -----------------------------------------------------------------------------
# What was fitted for a router.


def test_fitted_routers_are_made_with_what_was_fitted(bank, folder, base):
  seen = {}

  @register_router("second")
  def second(order, top, encoder="hidden"):
    seen.update(order=order.tolist(), top=top, encoder=encoder)
    return ConstantRouter(jnp.array([0.0, 1.0, 0.0]))

  router = load_bank(folder, base).router(RouterConfig(name="second"))
  assert router.gates(1, (), None).tolist() == [[0, 1, 0]]
  assert seen == {"order": [1, 0, 2], "top": 2, "encoder": "hidden"}


def test_what_was_fitted_for_others_is_refused_when_used(bank, folder, base):
  fewer = Fitted({}, {"order": np.zeros(2)}, ("alpha", "gamma"))
  save_bank(
    folder, dataclasses.replace(bank, fitted={"second": fewer, "third": fewer})
  )
  again = load_bank(folder, base)
  with pytest.raises(InputError) as caught:
    again.router(RouterConfig(name="second"))
  assert str(caught.value) == (
    "router.name: 'second' was fitted for alpha, gamma, but the bank has alpha,"
    f" beta, gamma; `python train.py --fit-router second --bank {folder}` fits"
    " it again"
  )
  with pytest.raises(InputError, match=r"fitted for 'secnd' \(did you mean"):
    again.fitted_for("secnd")


@pytest.mark.parametrize(
  ("name", "fitted", "told"),
  [
    ("../x", Fitted({}, {}, NAMES), "'../x' is no folder's name"),
    ("x", Fitted({"a": {1}}, {}, NAMES), "fitted x: settings cannot be JSON"),
    (
      "x",
      Fitted({"a": np.inf}, {}, NAMES),
      "fitted x: settings cannot be JSON",
    ),
    ("x", Fitted({}, {"a b": np.ones(3)}, NAMES), "an array named 'a b'"),
    (
      "x",
      Fitted({}, {"a": np.array([1, np.nan])}, NAMES),
      "a (float64[2]) holds something other than finite numbers",
    ),
    ("x", Fitted({}, {"a": np.array(["b"])}, NAMES), "other than finite"),
  ],
)
def test_what_cannot_be_saved_as_fitted(bank, folder, base, name, fitted, told):
  before = (folder / "bank.json").read_text()
  with pytest.raises(InputError) as caught:
    save_bank(folder, dataclasses.replace(bank, fitted={name: fitted}))
  assert told in str(caught.value)
  assert (folder / "bank.json").read_text() == before
  assert not list(folder.glob(".*"))


def test_arrays_of_any_shape_and_order_come_back(bank, folder, base):
  arrays = {
    "scalar": np.float32(0.5),
    "empty": np.zeros((3, 0), np.float32),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "flags": np.array([True, False, True]),
  }
  fitted = {"x": Fitted({"deep": {"a": [1, None]}}, arrays, NAMES)}
  save_bank(folder, dataclasses.replace(bank, fitted=fitted))
  again = load_bank(folder, base).fitted_for("x")
  assert again.settings == {"deep": {"a": [1, None]}}
  assert again.arrays.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(again.arrays[name], array, strict=True)


# -----------------------------------------------------------------------------
# Centroids that are missing, and several banks.


def test_a_missing_centroid_is_said_when_it_is_needed(bank, folder, base):
  table = bank.centroids["hidden"].copy()
  table[1] = np.nan
  save_bank(folder, dataclasses.replace(bank, centroids={"hidden": table}))
  again = load_bank(folder, base)
  np.testing.assert_array_equal(again.centroids["hidden"], table)
  assert again.lacking("hidden") == ("beta",)
  with pytest.raises(
    InputError, match="beta has no centroid of 'hidden'; drop"
  ):
    again.router(RouterConfig(encoder="hidden"))
  table[0, 0] = np.inf
  with pytest.raises(InputError, match="hidden: not all are finite"):
    save_bank(folder, dataclasses.replace(bank, centroids={"hidden": table}))


def test_banks_of_one_base_are_loaded_as_one(bank, folder, base, tmp_path):
  other = random_adapters(base, experts=2, rank=7, seed=1)
  rng = np.random.default_rng(1)
  tables = {
    "hidden": rng.normal(size=(2, 64)).astype(np.float32),
    "minilm": rng.normal(size=(2, 8)).astype(np.float32),
  }
  save_bank(
    tmp_path / "more",
    Bank(
      Adapters(("beta", "delta"), other.layers), "its/name", "f" * 64, tables,
      {"delta": Expert("gsm8k")},
    ),
  )  # fmt: skip
  both = load_bank([folder, tmp_path / "more"], base)
  assert both.adapters.names == (
    "alpha", f"{folder}/beta", "gamma", f"{tmp_path}/more/beta", "delta",
  )  # fmt: skip
  assert (both.base, both.folder, both.fitted) == ("some/base", "", {})
  assert both.experts["delta"] == Expert("gsm8k")
  assert both.experts[f"{folder}/beta"] == bank.experts["beta"]
  assert both.centroids.keys() == {"hidden"}
  np.testing.assert_array_equal(
    both.centroids["hidden"],
    np.concatenate([bank.centroids["hidden"], tables["hidden"]]),
  )
  lora = both.adapters.layers[1]["v"]
  np.testing.assert_array_equal(lora.a[3:], other.layers[1]["v"].a)
  np.testing.assert_array_equal(lora.a[:3, :4], bank.adapters.layers[1]["v"].a)
  assert not lora.a[:3, 4:].any()
  # One folder is that bank; and names that a folder cannot have are not saved.
  assert load_bank([folder], base).fitted.keys() == {"second"}
  with pytest.raises(InputError, match=r"experts: '.*/beta' is no folder's"):
    save_bank(tmp_path / "joined", both)


def test_banks_that_do_not_go_together(bank, folder, base, tmp_path):
  def other(**changes):
    save_bank(tmp_path / "more", dataclasses.replace(bank, **changes))
    return [folder, tmp_path / "more"]

  refused([], base, "no folder is given")
  refused([folder, str(folder)], base, "is given twice")
  both = other(base="his/base", fingerprint="e" * 64)
  refused(both, None, f"more: was trained on his/base (fingerprint {'e' * 12})")
  refused(both, base, "the bank was trained on his/base")
  narrow = {"hidden": bank.centroids["hidden"][:, :32]}
  refused(other(centroids=narrow), base, "hidden has different widths: 64 in")
