"""The names that other tools give an adapter's tensors, and what they mean."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from refusals import refusal
from safetensors.numpy import load_file, save_file

from tokenlora_jax.bank.bank import Bank, save_bank
from tokenlora_jax.bank.edit import add_expert
from tokenlora_jax.bank.record import read_record
from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.peft import load_adapters, save_adapter
from tokenlora_jax.model.lora import random_adapters

LAYERS = "base_model.model.model.layers."


@pytest.fixture
def base():
  return load_base("random:tiny", "float32")


@pytest.fixture
def folder(base, tmp_path):
  save_adapter(random_adapters(base, 1, 4), 0, tmp_path / "mine")
  return tmp_path / "mine"


def rewrite(folder, change):
  """Saves {name: array} anew, each pair changed."""
  file = folder / "adapter_model.safetensors"
  tensors = dict(change(k, v) for k, v in load_file(file).items())
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)


def same(left, right):
  assert left.names == right.names
  jax.tree.map(np.testing.assert_array_equal, left.layers, right.layers)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    (".weight", ".default.weight"),
    (LAYERS, f"_orig_mod.{LAYERS}"),
    (LAYERS, f"module.{LAYERS}"),
    (LAYERS, "base_model.model._orig_mod.model.layers."),
    (".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
    (LAYERS, "model.layers."),
    (LAYERS, "base_model.model.layers."),
    (LAYERS, "layers."),
  ],
)  # fmt: skip
def test_a_wrappers_names_mean_the_same_maps(folder, old, new):
  want = load_adapters([folder])
  rewrite(folder, lambda k, v: (k.replace(old, new), v))
  assert list(load_file(folder / "adapter_model.safetensors")) != []
  same(load_adapters([folder]), want)


def test_mlx_keeps_both_halves_transposed(folder):
  want = load_adapters([folder])
  rewrite(
    folder,
    lambda k, v: (
      k.removeprefix("base_model.model.")
      .replace(".lora_A.weight", ".lora_a")
      .replace(".lora_B.weight", ".lora_b"),
      v.T,
    ),
  )
  same(load_adapters([folder]), want)
  config = folder / "adapter_config.json"
  stored = json.loads(config.read_text())
  scale = stored["lora_alpha"] / stored["r"]
  (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
  about = {
    "fine_tune_type": "lora",
    "model": "some/base",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
  }
  config.write_text(json.dumps(about))
  same(load_adapters([folder]), want)
  for change, told in (
    ({"fine_tune_type": "dora"}, "fine_tune_type: 'dora'"),
    ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale: None"),
    ({"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 8}}, ".alpha: 8"),
  ):
    config.write_text(json.dumps(about | change))
    with pytest.raises(InputError, match=r"mlx-lm|want 'lora'") as error:
      load_adapters([folder])
    assert told in str(error.value)


def error(folder):
  return refusal(load_adapters, [folder])


def test_each_reason_is_told_once(folder):
  rewrite(folder, lambda k, v: (k, v[:0]))
  assert error(folder).count("ZeRO-3") == 1


def test_a_multimodal_models_names_are_told_with_the_remedy(folder):
  rewrite(
    folder, lambda k, v: (k.replace("layers", "language_model.layers"), v)
  )
  assert error(folder).count("remove `language_model.` from the names") == 1


def test_two_adapters_in_one_file_are_refused(folder):
  file = folder / "adapter_model.safetensors"
  both = load_file(file)
  save_file(
    both | {k.replace(".w", ".two.w"): v for k, v in both.items()}, file
  )
  assert "want one adapter a file" in error(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_and_named(
  base, folder, bad, tmp_path
):
  name = f"{LAYERS}1.self_attn.v_proj.lora_B.weight"

  def spoil(key, value):
    if key == name:
      value[3, 2] = bad
    return key, value

  bank = tmp_path / "bank"
  two = random_adapters(base, 2, 4)
  save_bank(bank, Bank(two, "random:tiny", base.fingerprint, {}))
  rewrite(folder, spoil)
  assert f"{folder}/adapter_model.safetensors: '{name}' holds NaN" in error(
    folder
  )
  with pytest.raises(InputError, match="holds NaN or infinity"):
    add_expert(bank, folder, "mine", base=base, same_base=True)
  given = random_adapters(base, 1, 4)
  whole = given.layers[0]["q"]
  given.layers[0]["q"] = dataclasses.replace(
    whole, a=whole.a.at[0, 1, 2].set(bad)
  )
  with pytest.raises(InputError, match="layer 0 q holds NaN or infinity"):
    add_expert(bank, given, "mine", base=base)
  assert read_record(bank).names == ("e0", "e1")


@pytest.mark.parametrize(
  "name", ["adapter_model.safetensors", "adapter_config.json"]
)
def test_a_pointer_or_a_folder_in_a_files_place_is_named(folder, name):
  (folder / name).write_text(
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
  )
  assert f"{name}: is a Git LFS pointer" in error(folder)
  assert "git lfs pull" in error(folder)
  (folder / name).unlink()
  (folder / name).mkdir()
  assert f"{name}: is a folder; want a file" in error(folder)
