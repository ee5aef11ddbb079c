"""Command lines: what they give, and the one line a mistake gets."""

import dataclasses
import io
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Annotated

import jax
import pytest
from refusals import refusal
import tyro

from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError

FILE = """
from tokenlora_jax.config import Config, DataConfig, OptimConfig
config = Config(
  workdir="mine",
  optim=OptimConfig(steps=7, warmup_steps=2),
  data=DataConfig(tasks=("gsm8k", "squad")),
)
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(FILE)
  return str(path)


def parse(*argv):
  return cli.parse(Config, argv, "About.")


def test_flags_override_the_file_and_the_file_the_defaults(file):
  config = parse("--config", file, "--optim.learning-rate", "3e-4")
  assert config.workdir == "mine"
  assert config.data.tasks == ("gsm8k", "squad")
  assert (config.optim.steps, config.optim.warmup_steps) == (7, 2)
  assert config.optim.learning_rate == 3e-4
  assert config.lora == Config().lora
  assert parse("--config", file) == parse(f"--config={file}")


def test_flags_in_all_their_forms(file):
  config = parse(
    "--base", "random:tiny", f"--config={file}", "--data.tasks", "squad",
    "--lora.targets", "q", "v", "down", "--no-resume", "--lora.rslora",
    "--optim.steps=9", "--decode.stop", "\n\n", "Question:",
    "--router.gates", "0.5", "-1",
  )  # fmt: skip
  assert config.base.path == "random:tiny"
  assert config.data.tasks == ("squad",)
  assert config.lora.targets == ("q", "v", "down")
  assert (config.resume, config.lora.rslora) == (False, True)
  assert config.optim.steps == 9
  assert config.decode.stop == ("\n\n", "Question:")
  assert config.router.gates == (0.5, -1.0)
  assert parse("--config", file, "--base=x").base.path == "x"


def test_programs_add_fields_of_their_own(file):
  @dataclasses.dataclass(frozen=True)
  class Arguments(Config):
    """More.

    Attributes:
      prompt: a prompt.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()

  argv = ["--config", file, "--prompt", "a = b", "--prompt", "--base=c"]
  with pytest.raises(InputError, match="prompt"):
    cli.parse(Arguments, [*argv[:-1], "--promt=c"], "About.")
  argv = [*argv[:-2], "--prompt=--base=c"]
  args = cli.parse(Arguments, argv, "About.")
  assert args.prompt == ("a = b", "--base=c")
  assert args.workdir == "mine"


def test_every_config_of_the_project_is_read():
  for name in ("demo", "tiny", "smollm2_135m", "llama2_7b"):
    config = cli.read_config(f"configs/{name}.py")
    assert config.workdir == f"runs/{name}"


@pytest.mark.parametrize(
  ("argv", "told"),
  [
    (["--optim.learning-raet", "1"], "did you mean '--optim.learning-rate'"),
    (["--optim.learning_rate", "1"], "did you mean '--optim.learning-rate'"),
    (["--stpes=5"], "^--stpes: there is no such flag"),
    (["--optim.steps", "ten"], r"^--optim\.steps: .*'ten'$"),
    (["--optim.steps", "0"], r"^optim\.steps: 0 is not allowed; want at least"),
    (["--optim.warmup-steps", "8"], r"^optim\.warmup-steps: 8 .*steps \(7\)$"),
    (["--optim.steps"], r"Missing value for argument '--optim\.steps'"),
    (["--keep", "0"], "^keep: 0 is not allowed; want at least 1$"),
    (["--mesh.expert", "3"], "^mesh.expert: 3 .* a divisor of the 2 experts$"),
    (["--data.source", "nowhere"], "'nowhere' .*'builtin', 'local', 'hub'"),
    (["--data.source", "local"], r"^data\.dir: '' is not allowed"),
    (["--lora.targets", "q,v"], r"^lora\.targets: 'q,v' is not one of q, k"),
    (["--lora.targets"], r"^lora\.targets: \(\) is not allowed"),
    (["--decode.top-p", "0"], r"^decode\.top-p: 0\.0 is not allowed"),
    (["--resume", "yes"], "yes"),
    (["stray"], "stray"),
  ],
)
def test_a_mistake_is_one_line_that_names_it(file, argv, told):
  with pytest.raises(InputError, match=told) as caught:
    parse("--config", file, *argv)
  message = str(caught.value)
  assert "\n" not in message
  assert not re.search(r"[─│╭╰]|helptext|Error parsing|\x1b", message)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_of_ascii_sees_the_same_line(file, encoding, monkeypatch):
  # As in a container without a locale: tyro draws another box there.
  stdout = io.TextIOWrapper(io.BytesIO(), encoding)
  monkeypatch.setattr("sys.stdout", stdout)
  argv = ["--config", str(file), "--mesh.expert", "3", "--data.tasks", "gsm8k"]
  assert refusal(cli.parse, Config, argv, "") == (
    "mesh.expert: 3 is not allowed; want a divisor of the 1 experts"
  )


def test_mistakes_in_the_config_file(file, tmp_path):
  with pytest.raises(InputError, match=r"mien\.py: there is no .*mine\.py'"):
    parse("--config", str(tmp_path / "mien.py"))
  with pytest.raises(InputError, match="there is no such file"):
    parse("--config", str(tmp_path / "no" / "such.py"))
  with pytest.raises(InputError, match="needs the path of a config file"):
    parse("--config")
  path = tmp_path / "mine.py"
  for text, told in (
    ("x = 1", "mine.py: sets no `config = Config"),
    ("config = {}", "mine.py: sets no `config = Config"),
    ("config = Config()", "mine.py: NameError: name 'Config' is not defined"),
    ("config = (", "mine.py: SyntaxError"),
    (
      FILE.replace("steps=7", "steps=0"),
      "mine.py: optim.steps: 0 is not allowed",
    ),
    (
      FILE.replace("steps=7", "stesp=7"),
      "mine.py: TypeError: .*'stesp'",
    ),
  ):
    path.write_text(text)
    with pytest.raises(InputError, match=told) as caught:
      parse("--config", file)
    assert "\n" not in str(caught.value)


def test_help_documents_every_setting(file, capsys):
  with pytest.raises(SystemExit) as stop:
    parse("--config", file, "--help")
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert "About.\n" in out
  assert "--config FILE (default configs/demo.py)" in out
  assert "\n\n\n" not in out
  # A flag is followed by what it means, before its default.
  text = " ".join(re.sub("[─│╭╮╰╯]", " ", out).split())
  for flag in cli._flags(Config):
    if ".no-" in flag or flag.startswith("--no-"):
      continue
    place = text.index(f"{flag} ") if f"{flag} " in text else text.index(flag)
    said = text[place:].partition("(default:")[0]
    assert len(said.split()) >= 3, said


def test_run_gives_bad_input_one_line_and_status_2(capsys, monkeypatch):
  monkeypatch.setattr(cli, "quiet", lambda: None)
  monkeypatch.setattr(sys, "argv", ["program", "--flag"])

  def stopping(error):
    def main(argv):
      assert argv == ["--flag"]
      raise error

    return main

  with pytest.raises(SystemExit) as stop:
    cli.run(stopping(InputError("lora.rank: 0 is not allowed")))
  assert stop.value.code == 2
  told = capsys.readouterr()
  assert (told.out, told.err) == ("", "error: lora.rank: 0 is not allowed\n")
  with pytest.raises(SystemExit) as stop:
    cli.run(stopping(KeyboardInterrupt()))
  assert stop.value.code == 130
  # Other errors are bugs, and keep their traceback.
  with pytest.raises(ZeroDivisionError):
    cli.run(stopping(ZeroDivisionError()))


@pytest.mark.parametrize("program", ["train.py", "infer.py"])
def test_programs_stop_with_one_line_and_status_2(program, tmp_path):
  done = subprocess.run(
    [sys.executable, program, "--config", "configs/tinny.py"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "error: --config configs/tinny.py: there is no such file"
    " (did you mean 'configs/tiny.py'?)\n"
  )


def test_what_a_failed_save_leaves_behind_is_not_heard():
  """Coroutines, some of which Python collects only as it ends."""
  code = """
from tokenlora_jax.commands import cli
left = []

async def save():
  pass

def main(argv):
  left.append(save())
  del left[:]
  left.append(save())
  raise cli.InputError("no room")

cli.run(main)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (2, "error: no room\n")


@pytest.mark.parametrize(
  ("flags", "already", "want"),
  [
    ("--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=40",
     None, "160"),
    ("--xla_force_host_platform_device_count=40", "3", "3"),
    ("--xla_force_host_platform_device_count=1", None, None),
    ("", None, None),
  ],
)  # fmt: skip
def test_simulated_devices_get_threads(flags, already, want, monkeypatch):
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setenv("PJRT_NPROC", already or "")
  if already is None:
    monkeypatch.delenv("PJRT_NPROC")
  cli.give_threads()
  assert os.environ.get("PJRT_NPROC") == want


def test_the_threads_are_there():
  """In the tests, as where `cli.give_threads` asks for them."""
  want = cli.THREADS * jax.device_count()
  names = [
    (task / "comm").read_text().strip()
    for task in Path("/proc/self/task").iterdir()
  ]
  assert names.count("tf_XLAEigen") == want
