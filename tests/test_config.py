"""Settings: every field is read, and every bad value is one clear line."""

import ast
import dataclasses
from pathlib import Path

import pytest

from tokenlora_jax.commands import cli
from tokenlora_jax.config import (
  BaseConfig,
  Config,
  DataConfig,
  DecodeConfig,
  InputError,
  LoraConfig,
  MeshConfig,
  OptimConfig,
  RouterConfig,
  differences,
  nearest,
)
from tokenlora_jax.mixing.routers import router_settings

ROOT = Path(__file__).parent.parent


def leaves(config):
  """Yields the names of all settings."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from leaves(value)
    else:
      yield field.name


def test_no_setting_is_dead():
  files = [ROOT / "train.py", ROOT / "infer.py"]
  files += (ROOT / "tokenlora_jax").rglob("*.py")
  read = {
    node.attr
    for file in files
    if file.parent.name != "config"
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.Attribute)
  }
  # A bank asks for what each router takes by name.
  names = ("one-hot", "fixed", "centroid", "posterior", "logo", "hilora")
  read |= {setting for name in names for setting in router_settings(name)}
  # Scaling is computed in the config itself.
  assert set(leaves(Config())) - read == {"alpha", "rslora"}
  assert LoraConfig(rank=4, alpha=8).scaling == 2
  assert LoraConfig(rank=4, alpha=8, rslora=True).scaling == 4


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: BaseConfig(dtype="bfloat"), "base.dtype: 'bfloat' is not one of"),
    (lambda: LoraConfig(rank=0), "lora.rank: 0 is not allowed; want at least"),
    (lambda: LoraConfig(dropout=1.0), "lora.dropout: 1.0"),
    (lambda: LoraConfig(targets=("q", "V")), "lora.targets: 'V' is not one of"),
    (lambda: LoraConfig(targets=()), "lora.targets"),
    (lambda: DataConfig(source="tdfs"), "(did you mean 'tfds'?)"),
    (lambda: DataConfig(source="local"), "data.dir: '' is not allowed"),
    (lambda: DataConfig(tasks=("squad", "squad")), "want each task once"),
    (lambda: DataConfig(rows=0), "data.rows: 0"),
    (lambda: OptimConfig(schedule="cos"), "optim.schedule: 'cos'"),
    (lambda: OptimConfig(steps=5, warmup_steps=6), "want 0 to steps (5)"),
    (lambda: OptimConfig(learning_rate=0), "optim.learning-rate: 0"),
    (lambda: MeshConfig(tensor=0), "mesh.tensor: 0"),
    (lambda: MeshConfig(processes=0), "mesh.processes: 0"),
    (
      lambda: MeshConfig(process=1),
      "mesh.process: 1 is not allowed; want 0 to",
    ),
    (lambda: MeshConfig(coordinator="a:1"), "want none, since mesh.processes"),
    (lambda: MeshConfig(processes=2), "mesh.coordinator: '' is not allowed"),
    (
      lambda: MeshConfig(processes=2, coordinator="host:99999"),
      "mesh.coordinator: 'host:99999' is not allowed; want HOST:PORT of process",
    ),
    (lambda: RouterConfig(encoder="mini"), "router.encoder: 'mini'"),
    (lambda: RouterConfig(clusters=0), "router.clusters: 0 is not allowed"),
    (lambda: RouterConfig(rank_share=0), "router.rank-share: 0 is not allowed"),
    (lambda: DecodeConfig(top_p=0), "decode.top-p: 0"),
    (lambda: DecodeConfig(refresh_every=-1), "decode.refresh-every: -1"),
    (lambda: Config(mesh=MeshConfig(expert=3)), "a divisor of the 4 experts"),
    (lambda: Config(remat="ful"), "(did you mean 'full'?)"),
  ],
)
def test_bad_values_are_one_line(make, told):
  with pytest.raises(InputError) as caught:
    make()
  assert told in str(caught.value)
  assert "\n" not in str(caught.value)


def test_nearest_says_nothing_far():
  assert nearest("centriod", ["centroid"]) == " (did you mean 'centroid'?)"
  assert nearest("x", ["centroid"]) == ""


def test_differences_name_the_setting():
  one = Config()
  other = dataclasses.replace(one, seed=1, optim=OptimConfig(steps=70))
  assert differences(one.to_json(), one.to_json()) == []
  assert differences(one.to_json(), other.to_json()) == [
    "optim.steps 100 (now 70)",
    "seed 0 (now 1)",
  ]
  assert differences(one.to_json(), other.to_json(), ["optim"]) == [
    "seed 0 (now 1)"
  ]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")))
def test_each_config_is_a_lab_note(file):
  config = cli.read_config(str(file))
  assert config.workdir == f"runs/{file.stem}"
  note = ast.get_docstring(ast.parse(file.read_text()))
  for part in ("What:", "Hardware:", "Expect:", file.stem):
    assert part in note
