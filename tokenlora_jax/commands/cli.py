"""From a command line to one validated config, or one clear line and exit 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import io
import itertools
import logging
import os
from pathlib import Path
import re
import runpy
import sys
from typing import Any, TypeVar
import warnings

from rich.console import Console
import tyro

from tokenlora_jax.config import Config, InputError, nearest

ConfigT = TypeVar("ConfigT", bound=Config)
FlagsT = TypeVar("FlagsT")

# Threads that XLA's client for CPUs makes for each simulated device.
THREADS = 4

# Short forms of much used flags.
SHORT = {"--base": "--base.path"}


def read_config(path: str) -> Config:
  """Returns the `config` of an experiment file.

  Args:
    path: a Python file that sets `config` to a `Config`. It is run: it is the
      user's own code, as train.py is.

  Raises:
    InputError: there is no such file, it fails, or it sets no config.
  """
  file = Path(path)
  if not file.is_file():
    names = [str(p) for p in file.parent.glob("*.py")]
    raise InputError(
      f"--config {path}: there is no such file{nearest(path, names)}"
    )
  try:
    config = runpy.run_path(str(file)).get("config")
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except Exception as error:
    raise InputError(f"{path}: {type(error).__name__}: {error}") from None
  if not isinstance(config, Config):
    raise InputError(f"{path}: sets no `config = Config(...)`")
  return config


def parse(
  cls: type[ConfigT],
  argv: Sequence[str],
  description: str,
  default: str = "configs/demo.py",
) -> ConfigT:
  """Returns the settings of a command line: a config file, then overrides.

  Args:
    cls: `Config`, or a dataclass that adds fields with defaults to it.
    argv: the arguments, without the program's name.
    description: for --help.
    default: the config file where none is given.

  Raises:
    InputError: a flag or value that does not exist or is not allowed.
  """
  argv = list(argv)
  path = default
  rest = []
  while argv:
    flag, equals, value = argv.pop(0).partition("=")
    if flag == "--config":
      if not equals and not argv:
        raise InputError("--config: wants the path of a config file")
      path = value if equals else argv.pop(0)
    else:
      rest.append(SHORT.get(flag, flag) + equals + value)
  _check_flags(cls, rest)
  fields = {
    f.name: getattr(read_config(path), f.name)
    for f in dataclasses.fields(Config)
  }
  description = (
    f"{description.strip()}\n\nSettings come from --config FILE (default"
    f" {default}); every other flag overrides one of them. --base is short for"
    " --base.path."
  )
  return _read(cls, rest, description, default=cls(**fields))


def parse_flags(
  cls: type[FlagsT], argv: Sequence[str], description: str
) -> FlagsT:
  """Returns the flags of a command that needs no config file.

  Args:
    cls: a dataclass; fields without a default are flags that must be given.
    argv: the arguments, without the program's and the command's name.
    description: for --help.

  Raises:
    InputError: a flag or value that does not exist, is not allowed, or is left
      out.
  """
  _check_flags(cls, argv)
  given = {argument.partition("=")[0] for argument in argv}
  if not given & {"-h", "--help"}:
    for field in dataclasses.fields(cls):
      flag = "--" + field.name.replace("_", "-")
      if field.default is dataclasses.MISSING and flag not in given:
        raise InputError(f"{flag}: is needed; see --help")
  return _read(cls, argv, description)


def _check_flags(cls: type, argv: Sequence[str]) -> None:
  flags = _flags(cls)
  for argument in argv:
    flag = argument.partition("=")[0]
    known = flag in flags or flag in ("-h", "--help")
    if flag.startswith("--") and not known:
      raise InputError(
        f"{flag}: there is no such flag{nearest(flag, flags)}; see --help"
      )


def _read(
  cls: type[FlagsT], argv: Sequence[str], description: str, **settings: Any
) -> FlagsT:
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      return tyro.cli(
        cls,
        args=argv,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        **settings,
      )
  except SystemExit as stop:
    if not stop.code:
      raise
    raise InputError(_reason(errors.getvalue())) from None


def _reason(box: str) -> str:
  """Returns in one line what a box of tyro's says about an error."""
  lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
  # The title, what is wrong, a rule, and help.
  lines = [line.strip(" │") for line in lines[1:]]
  text = " ".join(itertools.takewhile(lambda s: not s.startswith("─"), lines))
  # A check of ours names the setting itself.
  return re.sub(r"^Error parsing ((?!--)\S+: )?", "", text)


def _flags(cls, prefix: str = "--") -> list[str]:
  flags = []
  for field in dataclasses.fields(cls):
    name = prefix + field.name.replace("_", "-")
    if dataclasses.is_dataclass(field.default):
      flags += _flags(type(field.default), name + ".")
    else:
      flags.append(name)
      if isinstance(field.default, bool):
        head, _, tail = name.rpartition(".")
        flags.append(f"{head}.no-{tail}" if head else f"--no-{name[2:]}")
  return flags


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs an entry point, and says how it ended in one line on stderr.

  Exit status 2 is bad input, 1 a calculation that gave no number, 130 Ctrl-C.
  """
  quiet()
  give_threads()
  try:
    main(sys.argv[1:])
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except FloatingPointError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt as stop:
    print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:
    # The reader of our output has gone; nothing is left to say.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def give_threads() -> None:
  """Gives simulated CPU devices as many threads as may wait for each other.

  XLA lets a loop of a program run beside what does not need it. Where both
  send, a device waits in two threads at once; by default XLA has one a device,
  or one a core, and with few cores all of them may wait for ever. Must come
  before anything that asks JAX for devices.
  """
  flag = r"--xla_force_host_platform_device_count=(\d+)"
  found = re.search(flag, os.environ.get("XLA_FLAGS", ""))
  if found and int(found[1]) > 1:
    threads = max(THREADS * int(found[1]), os.cpu_count() or 1)
    os.environ.setdefault("PJRT_NPROC", str(threads))


def quiet() -> None:
  """Silences the libraries' chatter; warnings of ours are shown in one line."""
  for name in ("jax", "transformers", "huggingface_hub", "matplotlib"):
    logging.getLogger(name).setLevel(logging.ERROR)
  # What goes wrong while Orbax reads and writes, it raises as well.
  for name in ("absl", "orbax", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = lambda error: None
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  logging.basicConfig(
    format="%(levelname)s: %(message)s",
    stream=sys.stderr,
    force=True,  # A library that logged while it was imported came first.
  )


def console(stderr: bool = False) -> Console:
  """Returns the console that programs print to."""
  return Console(highlight=False, stderr=stderr)
