"""bank.json, formats 1 and 2, and the checks of a bank's files against it.

bank/
  bank.json                 base, experts, hashes of all files
  centroids.safetensors     float32[n, D_enc] per encoder
  routers/NAME.safetensors  the arrays fitted for a router
  EXPERT/                   a PEFT folder per expert

Format 1 had no hashes, tasks or fitted routers. Nothing in a bank is trusted.

Axis letters: n experts that have a centroid, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from pathlib import Path
import re
from typing import Any, TypeVar

from tokenlora_jax.config import InputError, nearest

FORMAT = 2

BANK = "bank.json"
CENTROIDS = "centroids.safetensors"
ROUTERS = "routers"
# The files of an expert's folder that are hashed.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# Prefix of the scratch folder for an edit's new files; see folder.py.
SCRATCH = ".new-"

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]


_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ExpertRecord:
  """An expert's record in bank.json.

  Attributes:
    name: the name of the expert and of its folder.
    task: the task whose rows it was trained on; "" is unknown.
    template: the form of that task's prompts; "" is unknown.
    ranks: the ranks of its maps, each value once.
    scalings: the scalings of its maps, each value once.
    targets: the projections that it adapts.
    sha256: hashes of its files, by file name; none in format 1.
  """

  name: str
  task: str = ""
  template: str = ""
  ranks: tuple[int, ...] = ()
  scalings: tuple[float, ...] = ()
  targets: tuple[str, ...] = ()
  sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FittedRecord:
  """A fitted router's record in bank.json.

  Attributes:
    settings: router settings that belong to the arrays.
    experts: the experts it was fitted for, in order.
    shapes: the arrays' shapes, by name.
    sha256: hash of the arrays' file.
  """

  settings: Mapping[str, JSON]
  experts: tuple[str, ...]
  shapes: Mapping[str, tuple[int, ...]]
  sha256: str


@dataclasses.dataclass(frozen=True)
class Moving:
  """A committed edit that is not finished yet; see folder.py.

  Attributes:
    scratch: the folder in the bank that holds the new files.
    gone: experts' folders and routers' files to remove.
  """

  scratch: str
  gone: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BankRecord:
  """The contents of a bank.json.

  Attributes:
    base: the base's path, as it was given.
    fingerprint: a hash of the base's weights.
    experts: the experts' records, in the bank's order.
    centroids: per encoder the experts with a centroid, in the table's order.
    centroids_sha256: hash of the centroids' file; "" in format 1.
    fitted: records of fitted routers, by the router's name.
    moving: an edit to be finished, if any.

  Example:
    >>> experts = (ExpertRecord("a", "gsm8k"), ExpertRecord("b"))
    >>> record = BankRecord("random:tiny", "random:tiny", experts, {})
    >>> record.names, record.place(Path("bank"), "a").as_posix()
    (('a', 'b'), 'bank/a')
  """

  base: str
  fingerprint: str
  experts: tuple[ExpertRecord, ...]
  centroids: Mapping[str, tuple[str, ...]]
  centroids_sha256: str = ""
  fitted: Mapping[str, FittedRecord] = dataclasses.field(default_factory=dict)
  moving: Moving | None = None

  @property
  def names(self) -> tuple[str, ...]:
    """The experts' names."""
    return tuple(expert.name for expert in self.experts)

  def place(self, folder: Path, file: str) -> Path:
    """Returns the current path of a bank's file or folder.

    During an edit that is the scratch folder's, if the file is new.

    Args:
      folder: the bank's folder.
      file: the path inside the bank.
    """
    if self.moving is not None:
      waiting = folder / self.moving.scratch / file
      if waiting.exists():
        return waiting
    return folder / file

  def to_json(self) -> str:
    """Returns the text of bank.json."""
    about = {
      "format": FORMAT,
      "base": {"path": self.base, "fingerprint": self.fingerprint},
      "experts": [dataclasses.asdict(expert) for expert in self.experts],
      "centroids": {
        "file": CENTROIDS,
        "sha256": self.centroids_sha256,
        "experts": self.centroids,
      },
      "fitted": {
        name: {"file": fitted_file(name), **dataclasses.asdict(fitted)}
        for name, fitted in self.fitted.items()
      },
    }
    if self.moving is not None:
      about["moving"] = dataclasses.asdict(self.moving)
    return json.dumps(about, indent=2, allow_nan=False) + "\n"


def fitted_file(name: str) -> str:
  """Returns the path, inside the bank, of the arrays fitted for a router.

  Args:
    name: the router's name.

  Example:
    >>> fitted_file("arrow")
    'routers/arrow.safetensors'
  """
  return f"{ROUTERS}/{name}.safetensors"


def check_name(field: str, name: str) -> None:
  """Raises `InputError` unless a name is allowed for a file in the bank.

  Args:
    field: the field that errors name.
    name: the name of an expert or a router.

  Example:
    >>> check_name("experts", "gsm8k")
  """
  is_one = Path(name).name == name and name.isprintable()
  taken = name in (BANK, CENTROIDS, ROUTERS)
  if not is_one or taken or name.startswith(".") or not name.strip():
    why = ", but one that the bank itself needs" if taken else ""
    raise InputError(f"{field}: {name!r} is no folder's name{why}")


def sha256(file: Path) -> str:
  """Returns the SHA-256 of a file, in hex.

  Args:
    file: the file's path.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...   sha256(Path(file.name))[:8]
    'e3b0c442'
  """
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(file: Path, wanted: str) -> None:
  """Raises `InputError` if a file's SHA-256 is not the one in bank.json.

  A missing file is no error here; its reader reports it.

  Args:
    file: the file's path.
    wanted: the SHA-256 in bank.json; "" is unknown.
  """
  if wanted and file.is_file() and (found := sha256(file)) != wanted:
    raise InputError(
      f"{file}: was damaged or exchanged: its sha256 begins with {found[:12]},"
      f" but {BANK} has {wanted[:12]}; put the right file back, or drop what it"
      " belongs to from the bank"
    )


def read_record(folder: str | Path) -> BankRecord:
  """Reads and checks a bank.json.

  Args:
    folder: the bank's folder.

  Raises:
    InputError: there is no bank.json, it is damaged, or its format is unknown.

  Example:
    >>> import tempfile
    >>> digest = "0" * 64
    >>> expert = ExpertRecord("a", sha256=dict.fromkeys(ADAPTER_FILES, digest))
    >>> text = BankRecord("random:tiny", "", (expert,), {}, digest).to_json()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   _ = Path(folder, "bank.json").write_text(text)
    ...   read_record(folder).names
    ('a',)
  """
  folder = Path(folder)
  file = folder / BANK
  if not file.is_file():
    names = []
    if folder.parent.is_dir():
      names = [str(p) for p in folder.parent.iterdir() if p.is_dir()]
    raise InputError(
      f"--bank {folder}: holds no {BANK}{nearest(str(folder), names)};"
      " train.py writes a bank at the end of a run"
    )
  try:
    about = json.loads(file.read_text("utf-8"))
    version = about["format"]
    record = _READERS[version](about) if version in _READERS else None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    if isinstance(error, InputError):
      raise InputError(f"{file}: {error}") from None
    raise InputError(f"{file}: is not a bank's ({error!r})") from None
  if record is None:
    raise InputError(
      f"{file}: format {version!r}; this version reads"
      f" {' and '.join(map(str, _READERS))}"
    )
  return record


def _read_1(about: Any) -> BankRecord:
  experts = _texts(about["experts"])
  for name in experts:
    check_name("experts", name)
  return BankRecord(
    *_base(about),
    tuple(map(ExpertRecord, experts)),
    dict.fromkeys(_texts(about["encoders"]), experts),
  )


def _read_2(about: Any) -> BankRecord:
  experts = tuple(map(_expert, _of(list, about["experts"])))
  names = {expert.name for expert in experts}
  if len(names) < len(experts):
    raise TypeError("experts of one name")
  centroids = _of(dict, about["centroids"])
  having = {
    encoder: _texts(listed)
    for encoder, listed in _of(dict, centroids["experts"]).items()
  }
  for listed in having.values():
    if not names.issuperset(listed) or len(set(listed)) < len(listed):
      raise TypeError("centroids of experts that the bank has not")
  fitted = {
    name: _fitted(name, entry)
    for name, entry in _of(dict, about["fitted"]).items()
  }
  moving = None
  if about.get("moving") is not None:
    moving = _moving(about["moving"])
    if names & set(moving.gone):
      raise TypeError("experts that are gone")
  return BankRecord(
    *_base(about),
    experts,
    having,
    _hash(centroids["sha256"]),
    fitted,
    moving,
  )


_READERS = {1: _read_1, 2: _read_2}


def _base(about: Any) -> tuple[str, str]:
  base = about["base"]
  return _of(str, base["path"]), _of(str, base["fingerprint"])


def _expert(entry: Any) -> ExpertRecord:
  name = _of(str, entry["name"])
  check_name("experts", name)
  return ExpertRecord(
    name,
    _of(str, entry["task"]),
    _of(str, entry["template"]),
    tuple(_of(int, rank) for rank in _of(list, entry["ranks"])),
    tuple(float(scaling) for scaling in _of(list, entry["scalings"])),
    _texts(entry["targets"]),
    {file: _hash(entry["sha256"][file]) for file in ADAPTER_FILES},
  )


def _fitted(name: str, entry: Any) -> FittedRecord:
  check_name("fitted", name)
  if entry["file"] != fitted_file(name):
    raise TypeError(f"fitted {name}: file {entry['file']!r}")
  return FittedRecord(
    _of(dict, entry["settings"]),
    _texts(entry["experts"]),
    {
      array: tuple(_of(int, size) for size in _of(list, shape))
      for array, shape in _of(dict, entry["shapes"]).items()
    },
    _hash(entry["sha256"]),
  )


def _moving(entry: Any) -> Moving:
  """Reads an edit; its paths get removed, so none may leave the bank."""
  scratch, gone = _of(str, entry["scratch"]), _texts(entry["gone"])
  if not re.fullmatch(rf"{re.escape(SCRATCH)}\w+", scratch):
    raise TypeError(f"moving: {scratch!r}")
  for path in gone:
    name = path.removeprefix(f"{ROUTERS}/").removesuffix(".safetensors")
    check_name("moving", name if path == fitted_file(name) else path)
  return Moving(scratch, gone)


def _of(kind: type[_T], value: Any) -> _T:
  if not isinstance(value, kind) or isinstance(value, bool):
    raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
  return value


def _texts(value: Any) -> tuple[str, ...]:
  return tuple(_of(str, text) for text in _of(list, value))


def _hash(value: Any) -> str:
  if not re.fullmatch("[0-9a-f]{64}", _of(str, value)):
    raise TypeError(f"{value[:40]!r} is no sha256")
  return value
