"""How the programs and the package start: at once, from anywhere, in silence."""

import ast
import builtins
import dataclasses
import importlib
import importlib.util
import json
import os
from pathlib import Path
import sys
import tomllib

from child import ROOT, python
import jax
import pytest

import tokenlora_jax
from tokenlora_jax.commands import bank, cli, infer
from tokenlora_jax.config import Config, InputError, RouterConfig, nearest

# What takes a tenth of a second and more to import.
HEAVY = {
  "datasets", "flax", "grain", "jax", "matplotlib", "optax", "orbax", "scipy",
  "tensorboardX", "transformers",
}  # fmt: skip

# A name that has left this list has left programs that people wrote.
PUBLIC = [
  "Adapters",
  "Bank",
  "DecodeConfig",
  "Expert",
  "Fitted",
  "GateTrace",
  "Generation",
  "InputError",
  "add_expert",
  "drop_expert",
  "export_mixture",
  "forward",
  "generate",
  "load_adapters",
  "load_bank",
  "load_base",
  "load_minilm",
  "load_tokenizer",
  "make_router",
  "random_adapters",
  "register_router",
  "register_rule",
  "save_adapter",
  "save_bank",
  "save_fitted",
]


# -----------------------------------------------------------------------------
# The public names.


def test_the_public_names_are_there_and_come_when_asked_for():
  assert set(PUBLIC) <= set(tokenlora_jax.__all__)
  assert set(tokenlora_jax.__all__) <= set(dir(tokenlora_jax))
  for name in tokenlora_jax.__all__:
    value = getattr(tokenlora_jax, name)
    assert value.__name__ == name
  with pytest.raises(AttributeError, match="no attribute 'lod_base'"):
    _ = tokenlora_jax.lod_base


def test_type_checkers_read_the_same_names():
  tree = ast.parse(Path(tokenlora_jax.__file__).read_text())
  (block,) = (node for node in tree.body if isinstance(node, ast.If))
  seen = {
    alias.name: node.module.removeprefix("tokenlora_jax.")
    for node in block.body
    for alias in node.names
  }
  assert seen == tokenlora_jax._MODULES
  assert sorted(seen) == sorted(tokenlora_jax.__all__)


# -----------------------------------------------------------------------------
# Help, from any folder, at once.


@pytest.mark.parametrize("program", ["train", "infer"])
def test_help_needs_no_jax_and_no_folder(program, tmp_path):
  code = f"""
import json, sys
from tokenlora_jax.commands import {program}
sys.argv[1:] = ["--help"]
try:
  {program}.script()
finally:
  print("modules", json.dumps(sorted(sys.modules)))
"""
  done = python(code, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, "")
  text, _, modules = done.stdout.partition("modules ")
  assert "--optim.learning-rate" in text
  assert not HEAVY & set(json.loads(modules))


@pytest.mark.parametrize(
  "file", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda file: file.stem
)
def test_a_benchmark_starts_as_the_programs_do(file):
  # So it is as quiet, and says its errors in a line. Two end with a status.
  text = file.read_text()
  starts = text.count("  cli.run(main)\n") + text.count("  sys.exit(main(")
  assert text.count('__name__ == "__main__"') == starts


def test_training_does_not_wait_for_torch(tmp_path):
  # The tests have it, as many people have, and tensorboardX would import it.
  code = """
import importlib.util, sys
from tokenlora_jax.commands import training
print("torch" in sys.modules, importlib.util.find_spec("torch") is None)
"""
  done = python(code, cwd=tmp_path)
  assert (done.stdout, done.stderr) == ("False False\n", "")


def test_infer_knows_the_commands_on_a_bank():
  assert tuple(bank.COMMANDS) == infer.BANK


def test_pip_installs_both_programs_and_the_configs():
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
  for place in settings["project"]["scripts"].values():
    module, _, name = place.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
  assert set(settings["project"]["scripts"]) == {
    "tokenlora-train", "tokenlora-infer"
  }  # fmt: skip
  tools = settings["tool"]["setuptools"]
  assert tools["package-dir"] == {"tokenlora_jax.configs": "configs"}
  # With a folder from elsewhere, setuptools finds none of the others itself.
  ours = {
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in ROOT.glob("tokenlora_jax/**/__init__.py")
  }
  assert set(tools["packages"]) == ours | {"tokenlora_jax.configs"}


@pytest.mark.parametrize("path", ["demo", "demo.py", "configs/demo.py"])
def test_our_configs_are_found_from_any_folder(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.read_config(path).workdir == "runs/demo"
  # A person's own comes first.
  own = tmp_path / path
  own.parent.mkdir(exist_ok=True)
  own.write_text("from tokenlora_jax.config import Config\nconfig = Config()")
  assert cli.read_config(path) == Config()
  with pytest.raises(InputError, match=f"did you mean '{path}'"):
    cli.read_config(path.replace("demo", "dmeo"))


def test_a_config_may_import_its_neighbour(tmp_path):
  before = sys.path.copy()
  (tmp_path / "first_of_two.py").write_text(
    "from tokenlora_jax.config import Config\nconfig = Config(seed=3)"
  )
  file = tmp_path / "second.py"
  file.write_text("from first_of_two import config")
  assert cli.read_config(str(file)).seed == 3
  assert sys.path == before


# -----------------------------------------------------------------------------
# A router of one's own, and its settings.

OWN = """
from __future__ import annotations
import dataclasses
from typing import Literal
from tokenlora_jax.config import Config, RouterConfig

@dataclasses.dataclass(frozen=True)
class Mine(RouterConfig):
  \"\"\"A router of this file's.

  Attributes:
    depth: how deep it looks.
    side: from where it looks.
  \"\"\"
  name: str = "mine"
  depth: int = 2
  side: Literal["left", "right"] = "left"

config = Config(router=Mine())
"""


def test_a_routers_own_settings_are_flags(tmp_path, capsys):
  file = tmp_path / "own.py"
  file.write_text(OWN)
  argv = ["--config", str(file), "--router.depth", "7", "--router.top-k", "1"]
  args = cli.parse(infer.Arguments, argv, "About.")
  router = Config.of(args).router
  assert (router.name, router.depth, router.top_k) == ("mine", 7, 1)
  assert isinstance(router, RouterConfig)
  assert isinstance(args, infer.Arguments)
  assert args.to_json()["router"]["depth"] == 7
  assert dataclasses.replace(router, name="x").depth == 7
  with pytest.raises(InputError, match=r"mean '--router\.depth'"):
    cli.parse(Config, [*argv[:2], "--router.detph", "7"], "About.")
  with pytest.raises(InputError, match=r"--router\.depth: there is no such"):
    cli.parse(Config, ["--router.depth", "7"], "About.")
  with pytest.raises(SystemExit):
    cli.parse(infer.Arguments, [*argv[:2], "--help"], "About.")
  shown = capsys.readouterr().out
  assert "how deep it looks" in shown
  assert "the folder that train.py wrote" in shown


# -----------------------------------------------------------------------------
# Silence, and what is not there.


def test_the_package_imports_where_files_cannot_be_locked(
  tmp_path, monkeypatch, caplog
):
  real = builtins.__import__

  def without(name, *args, **settings):
    if name == "fcntl":
      raise ModuleNotFoundError("No module named 'fcntl'", name=name)
    return real(name, *args, **settings)

  monkeypatch.setattr(builtins, "__import__", without)
  place = ROOT / "tokenlora_jax" / "files.py"
  spec = importlib.util.spec_from_file_location("files_elsewhere", place)
  files = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(files)
  with files.locked(tmp_path, "--workdir", "train"):
    pass
  assert caplog.messages == [
    f"--workdir {tmp_path}: its disk has no locks (this system has no flock);"
    " let no other process train in it"
  ]


def test_only_files_knows_how_files_are_locked():
  # `fcntl` is not everywhere; the others ask `files.lock`.
  for path in ROOT.glob("tokenlora_jax/**/*.py"):
    assert path.name == "files.py" or "import fcntl" not in path.read_text()


@pytest.mark.parametrize(
  ("plugins", "tpu", "gpu", "told", "want"),
  [
    ({"tpu"}, False, False, None, "cpu"),
    ({"tpu"}, True, False, None, None),
    ({"tpu", "cuda"}, False, False, None, "cpu"),
    ({"tpu", "cuda"}, False, True, None, "cuda,cpu"),
    ({"cuda"}, False, False, None, "cpu"),
    ({"cuda"}, False, True, None, None),
    ({"tpu", "rocm"}, False, False, None, None),
    ({"tpu"}, False, False, "tpu", "tpu"),
    (set(), False, False, None, None),
  ],
)
def test_the_platforms_that_jax_tries(
  plugins, tpu, gpu, told, want, monkeypatch
):
  monkeypatch.setattr(cli, "_plugins", lambda: plugins)
  monkeypatch.setattr(cli, "_has_tpu", lambda: tpu)
  monkeypatch.setattr(cli, "_has_gpu", lambda: gpu)
  monkeypatch.delitem(sys.modules, "jax")
  monkeypatch.setenv("JAX_PLATFORMS", told or "")
  if told is None:
    monkeypatch.delenv("JAX_PLATFORMS")
  assert cli.choose_platforms() == (want is not None and told is None)
  assert os.environ.get("JAX_PLATFORMS") == want


def test_a_plugin_that_does_not_load_is_one_warning(monkeypatch, caplog):
  broken = (
    "Unable to initialize backend 'cuda': it is no known backend (set"
    " JAX_PLATFORMS='' to choose)\nmore"
  )
  ran = []

  def main(argv):
    ran.append(os.environ["JAX_PLATFORMS"])
    if ran[-1] != "cpu":
      raise RuntimeError(broken)

  def update(name, value):
    ran.append((name, value))

  monkeypatch.setattr(cli, "quiet", lambda: None)
  monkeypatch.setattr(cli, "_plugins", lambda: {"tpu", "cuda"})
  monkeypatch.setattr(cli, "_has_tpu", lambda: False)
  monkeypatch.setattr(cli, "_has_gpu", lambda: True)
  monkeypatch.setattr(jax.config, "update", update)
  monkeypatch.setenv("JAX_PLATFORMS", "")
  cli.run(main)
  assert [each for each in ran if "jax_platforms" not in each] == [
    "cuda,cpu", "cpu"
  ]  # fmt: skip
  assert ran[-2] == ("jax_platforms", "cpu")
  (told,) = caplog.messages
  assert told == f"{broken.splitlines()[0]}; the CPU calculates"
  # What a person chose themselves, and other faults, stay errors.
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  with pytest.raises(RuntimeError, match="Unable"):
    cli.run(main)


# -----------------------------------------------------------------------------
# Compiled programs are kept.

KEEPS = """
import sys
from tokenlora_jax.commands import cli
cli.keep_programs(sys.argv[1])
import jax
print(jax.config.jax_compilation_cache_dir)
# However fast this machine compiles.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jax.numpy.sort(x) + 1)(jax.numpy.arange(64)).block_until_ready()
"""


@pytest.mark.parametrize("setting", ["user", "named"])
def test_programs_are_kept_where_the_setting_says(setting, tmp_path):
  want = tmp_path / "tokenlora_jax" / "xla"
  if setting == "named":
    setting = want = tmp_path / "named"
  done = python(
    KEEPS, setting, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=""
  )
  assert done.returncode == 0
  # What is piped is what was asked for, and nothing else.
  assert done.stdout == f"{want}\n"
  (told,) = done.stderr.splitlines()
  assert told.startswith(f"compiled programs are kept in {want} (--compilat")
  assert list(want.glob("*-cache"))


@pytest.mark.parametrize(
  ("setting", "already"), [("", ""), ("user", "/data/elsewhere")]
)
def test_programs_are_not_kept(setting, already, monkeypatch, capsys):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", already)
  name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
  monkeypatch.delenv(name, raising=False)
  seconds = "jax_persistent_cache_min_compile_time_secs"
  least = getattr(jax.config, seconds)
  try:
    jax.config.update(seconds, 1.0)
    cli.keep_programs(setting)
    # A folder that JAX was given keeps what ours would.
    assert getattr(jax.config, seconds) == (0.05 if already else 1.0)
  finally:
    jax.config.update(seconds, least)
  assert capsys.readouterr() == ("", "")
  assert jax.config.jax_compilation_cache_dir == before


def test_a_cache_that_cannot_be_written_is_a_warning(
  tmp_path, monkeypatch, caplog
):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  file = tmp_path / "file"
  file.write_text("")
  cli.keep_programs(str(file))
  (told,) = caplog.messages
  assert told.startswith(f"--compilation-cache {file}: cannot be written to")
  assert jax.config.jax_compilation_cache_dir == before


# -----------------------------------------------------------------------------
# "Did you mean".


@pytest.mark.parametrize(
  ("given", "there", "want"),
  [
    ("/data/nobank", ["/data/bash_jobs", "/data/node", "/data/nobank"], ""),
    ("/data/nobank", ["/data/mobank"], "/data/mobank"),
    ("runs/demo/bank", ["runs/demo/tensorboard", "runs/demo/checkpoints"], ""),
    ("tyni", ["tiny", "small"], "tiny"),
    ("gsm", ["gsm8k", "squad"], "gsm8k"),
    ("sqad", ["gsm8k", "squad"], "squad"),
    ("--optim.learning_rate", ["--optim.learning-rate"], None),
    ("--rows", ["--data.train-rows", "--data.rows"], "--data.rows"),
    ("--promt", ["--prompt", "--compare"], "--prompt"),
    ("q", ["k", "v"], ""),
    ("cats", ["centroid", "uniform", "base"], ""),
    ("", ["a"], ""),
  ],
)
def test_only_near_names_are_proposed(given, there, want):
  want = there[0] if want is None else want
  told = f" (did you mean {want!r}?)" if want else ""
  assert nearest(given, there) == told
