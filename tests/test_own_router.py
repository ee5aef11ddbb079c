"""A router of a person's own, from a config file to the texts of infer.py."""

import json

import jax
import jax.numpy as jnp
import pytest

import infer
from tokenlora_jax.bank import folder
from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.commands.infer import named
from tokenlora_jax.config import RouterConfig
from tokenlora_jax.evaluation.experiment.arms import router_config
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.mixing.routers import ConstantRouter, registry
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.model.lora import random_adapters

CONFIG = """
import dataclasses
from tokenlora_jax.config import BaseConfig, Config, DecodeConfig, RouterConfig

@dataclasses.dataclass(frozen=True)
class Leaning(RouterConfig):
  \"\"\"A router that leans to the first expert.

  Attributes:
    lean: how much.
  \"\"\"
  name: str = "leaning"
  lean: float = 0.5

config = Config(
  base=BaseConfig(path="random:tiny", dtype="float32"),
  router=Leaning(),
  decode=DecodeConfig(max_new_tokens=2),
)
"""


@pytest.fixture(scope="module")
def bank():
  adapters = random_adapters(load_base("random:tiny", "float32"), 2, 2)
  return Bank(adapters, "random:tiny", "random:tiny", {})


@pytest.mark.parametrize(
  ("flags", "lean"), [((), 0.5), (("--router.lean", "0.75"), 0.75)]
)
def test_its_settings_reach_it_through_a_bank(
  bank, flags, lean, tmp_path, monkeypatch
):
  monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))
  asked = []

  @register_router("leaning")
  def leaning(lean):
    asked.append(lean)
    return ConstantRouter(jnp.array([lean, 1 - lean]))

  save_bank(tmp_path / "bank", bank)
  (tmp_path / "own.py").write_text(CONFIG)
  out = tmp_path / "out.jsonl"
  infer.main(
    [
      "--config", str(tmp_path / "own.py"), "--bank", str(tmp_path / "bank"),
      "--prompt", "hi", "--output", str(out), "--compilation-cache", "", *flags,
    ]
  )  # fmt: skip
  assert asked == [lean]
  record = json.loads(out.read_text())
  assert record["gates"] == [[lean, 1 - lean]] * len(record["tokens"])
  assert record["router"]["lean"] == lean


@pytest.mark.parametrize(
  ("flags", "share"),
  [
    ((), 0.25),
    (("--router.share", "0.5"), 0.5),
    # It equals the config's default, but was asked for.
    (("--router.share", "0.0"), 0.0),
    (("--router.share=0",), 0.0),
  ],
)
def test_what_a_command_line_gives_reaches_it(
  bank, flags, share, tmp_path, monkeypatch
):
  monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))
  asked = []

  @register_router("leaning")
  def leaning(share=0.25):
    asked.append(share)
    return ConstantRouter(jnp.array([share, 1 - share]))

  save_bank(tmp_path / "bank", bank)
  infer.main(
    [
      "--config", "tiny", "--bank", str(tmp_path / "bank"), "--router.name",
      "leaning", "--prompt", "hi", "--decode.max-new-tokens", "1",
      "--compilation-cache", "", *flags,
    ]
  )  # fmt: skip
  assert asked == [share]


def test_what_is_given_is_told_from_what_is_not():
  argv = [
    "--router.rank-share",
    "0.4",
    "--router.share=0",
    "--decode.batch",
    "1",
  ]
  assert named(argv) == {"rank_share", "share"}
  config, given = router_config("x:rank-share=0.4", RouterConfig())
  assert (config.name, given) == ("x", {"rank_share"})


def test_a_bank_is_written_where_folders_cannot_be_opened(
  bank, tmp_path, monkeypatch, caplog
):
  real = folder.os.open

  def files_alone(path, *flags, **settings):
    # rmtree goes into folders by a place that only this system has.
    if "dir_fd" not in settings and folder.Path(path).is_dir():
      raise PermissionError(13, "Permission denied", str(path))
    return real(path, *flags, **settings)

  monkeypatch.setattr(folder, "_OPENS_FOLDERS", False)
  monkeypatch.setattr(folder.os, "open", files_alone)
  save_bank(tmp_path / "bank", bank)
  (told,) = caplog.messages
  assert "this system locks no folders; let no other process write" in told
  read = load_bank(tmp_path / "bank", load_base("random:tiny", "float32"))
  assert read.adapters.names == bank.adapters.names
  for ours, theirs in zip(
    jax.tree.leaves(read.adapters.layers),
    jax.tree.leaves(bank.adapters.layers),
    strict=True,
  ):
    assert jnp.array_equal(ours, theirs)
