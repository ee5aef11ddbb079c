"""Opens safetensors files safely, and checks for NaN and infinity."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from tokenlora_jax.config import InputError

# The start of a Git LFS pointer, the text that stands for an unfetched file.
_POINTER = b"version https://git-lfs"


@runtime_checkable
class StoredTensor(Protocol):
  """A tensor in a file, of which parts are read when asked for."""

  def get_shape(self) -> list[int]:
    """Returns its shape."""

  def get_dtype(self) -> str:
    """Returns its type in safetensors' words: F32, BF16 and so on."""

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of it."""


@runtime_checkable
class TensorFile(Protocol):
  """The methods that we use of safetensors' handle of an open file."""

  def keys(self) -> list[str]:
    """Returns the tensors' names."""

  def get_slice(self, name: str) -> StoredTensor:
    """Returns a tensor unread."""

  def get_tensor(self, name: str) -> np.ndarray:
    """Reads a tensor."""

  def __enter__(self) -> TensorFile: ...

  def __exit__(self, *error: object) -> None: ...


def check_fetched(path: Path) -> None:
  """Raises `InputError` if a path is a folder or a Git LFS pointer.

  A missing file is no error here; its reader reports it.

  Args:
    path: the path of an expected file.
  """
  if path.is_dir():
    raise InputError(f"{path}: is a folder; want a file")
  if not path.is_file():
    return
  try:
    with path.open("rb") as file:
      start = file.read(len(_POINTER))
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from error
  if start == _POINTER:
    raise InputError(
      f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull`"
      " in its folder, or download the file again"
    )


def open_tensors(path: Path) -> TensorFile:
  """Opens a safetensors file and reads its header.

  Args:
    path: the file.

  Returns:
    A handle of the library safetensors, which reads one tensor at a time.

  Raises:
    InputError: the file is missing, a folder, a Git LFS pointer, or not a whole
      safetensors file.
  """
  import safetensors

  check_fetched(path)
  try:
    return safetensors.safe_open(path, framework="numpy")
  except (OSError, safetensors.SafetensorError) as error:
    raise InputError(
      f"{path}: not a whole safetensors file ({error})"
    ) from error


def is_finite(values: np.ndarray) -> bool:
  """Returns whether all values are finite.

  Compares the bits as integers, several times as fast as comparing bfloat16: a
  value is infinite or NaN only if all its exponent bits are set.

  Args:
    values: an array of any shape, of any IEEE float dtype or bfloat16.

  Example:
    >>> is_finite(np.array([1.0, -2.0])), is_finite(np.array([0.0, np.nan]))
    (True, False)
  """
  info = ml_dtypes.finfo(values.dtype)
  bits = values.view(f"u{values.dtype.itemsize}")
  exponent = ((1 << info.nexp) - 1) << info.nmant
  return int((bits & exponent).max(initial=0)) != exponent
