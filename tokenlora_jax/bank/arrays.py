"""Reads and writes a bank's arrays: centroids, and those fitted for routers.

Axis letters: E experts, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path

from jaxtyping import Array, Float, Shaped
import numpy as np

from tokenlora_jax.bank.record import (
  CENTROIDS,
  JSON,
  ROUTERS,
  BankRecord,
  FittedRecord,
  check_file,
  check_name,
  fitted_file,
  sha256,
)
from tokenlora_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class Fitted:
  """The arrays and settings that were fitted for a router.

  Attributes:
    settings: router settings that belong to the arrays.
    arrays: arrays by name of the router's setting; per-expert arrays have a
      leading E.
    experts: the experts' names, in the order of that axis.

  Example:
    >>> arrays = {"weights": np.zeros((2, 64)), "bias": np.zeros(2)}
    >>> Fitted({"encoder": "hidden"}, arrays, ("math", "code")).experts
    ('math', 'code')
  """

  settings: Mapping[str, JSON]
  arrays: Mapping[str, Shaped[np.ndarray, "..."]]
  experts: tuple[str, ...]


def write_centroids(
  folder: Path,
  centroids: Mapping[str, Shaped[Array | np.ndarray, "..."]],
  names: Sequence[str],
) -> tuple[dict[str, tuple[str, ...]], str]:
  """Writes the experts' centroids into a bank's folder.

  Args:
    folder: the bank's folder.
    centroids: float[E, D_enc] by encoder; rows that are NaN are left out.
    names: the E experts' names.

  Returns:
    The experts that have a centroid, by encoder, and the file's SHA-256.

  Raises:
    InputError: a table has another shape, or a row is neither finite nor NaN.

  Example:
    >>> import tempfile
    >>> table = np.array([[1.0, 0.0], [np.nan, np.nan]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_centroids(Path(folder), {"hidden": table}, ["a", "b"])[0]
    {'hidden': ('a',)}
  """
  having, tables = {}, {}
  for encoder, table in sorted(centroids.items()):
    table = np.asarray(table)
    if table.dtype.kind != "f" or table.ndim != 2 or len(table) != len(names):
      raise InputError(
        f"centroids: {encoder}: {table.dtype}{list(table.shape)} is not allowed;"
        f" want floats [{len(names)}, D_enc]"
      )
    there = ~np.isnan(table).all(axis=1)
    if not np.isfinite(table[there]).all():
      raise InputError(f"centroids: {encoder}: not all are finite numbers")
    having[encoder] = tuple(np.array(names, object)[there])
    tables[encoder] = table[there].astype(np.float32)
  return having, _save(folder / CENTROIDS, tables)


def read_centroids(
  folder: Path, record: BankRecord
) -> dict[str, Float[np.ndarray, "E _"]]:
  """Returns the centroids, float32[E, D_enc] by encoder; NaN where missing.

  Args:
    folder: the bank's folder.
    record: its bank.json.

  Raises:
    InputError: the file is missing, damaged or exchanged.
  """
  file = record.place(folder, CENTROIDS)
  arrays = _read(file, record.centroids_sha256)
  tables = {}
  for encoder, having in record.centroids.items():
    rows = arrays.get(encoder)
    if (
      rows is None
      or rows.ndim != 2
      or len(rows) != len(having)
      or not np.isfinite(rows).all()
    ):
      raise InputError(
        f"{file}: {encoder}: want a table of {len(having)} centroids, of finite"
        " numbers"
      )
    table = np.full((len(record.experts), rows.shape[1]), np.nan, np.float32)
    table[[record.names.index(name) for name in having]] = rows
    tables[encoder] = table
  return tables


def write_fitted(folder: Path, name: str, fitted: Fitted) -> FittedRecord:
  """Writes the arrays fitted for a router, and returns their record.

  Args:
    folder: the folder of the bank or of a draft.
    name: the router's name.
    fitted: the arrays and settings.

  Raises:
    InputError: the name is not allowed as a file name, a setting is not JSON,
      or an array has no valid name or is not finite.

  Example:
    >>> import tempfile
    >>> fitted = Fitted({}, {"bias": np.zeros(2)}, ("a", "b"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write_fitted(Path(folder), "mine", fitted).shapes
    {'bias': (2,)}
  """
  check_name("fitted", name)
  arrays = {key: np.asarray(x) for key, x in fitted.arrays.items()}
  _check_arrays(f"fitted {name}", arrays)
  try:
    settings = json.loads(json.dumps(dict(fitted.settings), allow_nan=False))
  except (TypeError, ValueError) as error:
    raise InputError(
      f"fitted {name}: settings cannot be JSON ({error})"
    ) from None
  (folder / ROUTERS).mkdir(exist_ok=True)
  digest = _save(folder / fitted_file(name), arrays)
  shapes = {key: x.shape for key, x in arrays.items()}
  return FittedRecord(settings, tuple(fitted.experts), shapes, digest)


def read_fitted(folder: Path, record: BankRecord, name: str) -> Fitted:
  """Reads the arrays and settings fitted for a router.

  Args:
    folder: the bank's folder.
    record: its bank.json.
    name: the router's name.

  Raises:
    InputError: the file is missing, damaged or exchanged, or its arrays differ
      from those in bank.json.
  """
  entry = record.fitted[name]
  file = record.place(folder, fitted_file(name))
  arrays = _read(file, entry.sha256)
  found = {key: x.shape for key, x in arrays.items()}
  if found != entry.shapes:
    shown = [
      {key: list(shape) for key, shape in sorted(shapes.items())}
      for shapes in (found, entry.shapes)
    ]
    raise InputError(f"{file}: holds {shown[0]}, but bank.json says {shown[1]}")
  _check_arrays(str(file), arrays)
  return Fitted(entry.settings, arrays, entry.experts)


def _check_arrays(place: str, arrays: Mapping[str, np.ndarray]) -> None:
  for name, array in arrays.items():
    # The setting's name, perhaps after a map's: layers.3.q.weights.
    parts = name.split(".")
    if not all(part.isidentifier() or part.isdecimal() for part in parts):
      raise InputError(
        f"{place}: an array named {name!r}; want a name such as 'means' or"
        " 'layers.3.q.weights'"
      )
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
      raise InputError(
        f"{place}: {name} ({array.dtype}{list(array.shape)}) holds something"
        " other than finite numbers"
      )


def _save(file: Path, arrays: Mapping[str, np.ndarray]) -> str:
  from safetensors.numpy import save_file

  save_file(
    {name: np.asarray(x, order="C") for name, x in arrays.items()}, file
  )
  return sha256(file)


def _read(file: Path, digest: str) -> dict[str, np.ndarray]:
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  check_file(file, digest)
  try:
    return load_file(file)
  # The numpy loader raises KeyError for dtypes that numpy lacks.
  except (OSError, SafetensorError, KeyError) as error:
    raise InputError(f"{file}: cannot be read ({error})") from None
