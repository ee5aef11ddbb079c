"""Reads the header of a GGUF file: metadata, and types and offsets of tensors.

  "GGUF", version, number of tensors, number of metadata values
  per value:   name, type, value
  per tensor:  name, shape (fastest axis first), type, offset after the header

Texts and arrays start with their length. The gguf package reads the same, but
makes a NumPy array of each field; it takes seconds for a vocabulary of 49,152
tokens and its merges.
"""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from gguf import GGMLQuantizationType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# dtypes of metadata values by type number; None for text and array.
_NUMBERS = (
  "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None,
  "<u8", "<i8", "<f8",
)  # fmt: skip
_UINT32, _TEXT, _ARRAY = 4, 8, 9
_ALIGNMENT = "general.alignment"
# dtypes of tensors that are not stored in blocks.
_PLAIN = {
  "F16": "<f2", "F32": "<f4", "F64": "<f8",
  "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Type, shape and offset of a tensor in a GGUF file.

  Attributes:
    kind: its GGUF type.
    shape: shape of the tensor, the slowest axis first.
    dtype: dtype of the stored array; bytes if it is stored in blocks.
    stored: shape of the stored array; with blocks, the last axis is the bytes
      of a row.
    offset: offset of its first byte in the file.
  """

  kind: GGMLQuantizationType
  shape: tuple[int, ...]
  dtype: np.dtype
  stored: tuple[int, ...]
  offset: int


@dataclasses.dataclass(frozen=True)
class Header:
  """The header of a GGUF file.

  Attributes:
    fields: metadata values by name. Texts are bytes, so that one that is not
      UTF-8 does no harm unless it is used.
    tensors: the tensors' places by name.
  """

  fields: dict[str, Any]
  tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
  """Reads the header of a GGUF file.

  Args:
    path: the file.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not a whole GGUF file; the message names the fault.
  """
  with path.open("rb") as file:
    if not file.read(1):
      raise ValueError("is empty")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _Cursor(data).header()


class _Cursor:
  """Reads values one after the other, never beyond the file's end."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    self._at = 0

  def header(self) -> Header:
    if self._bytes(4) != _MAGIC:
      raise ValueError("does not start with GGUF")
    version = self._number("<u4")
    if version & 0xFFFF == 0:
      raise ValueError("is in the other byte order; want little-endian")
    if version not in _VERSIONS:
      raise ValueError(f"is of version {version}; want 2 or 3")
    tensors, fields = self._number("<u8"), self._number("<u8")
    found = {}
    alignment = 32
    # A value takes at least a name's length, a type and one byte.
    self._check(fields * 13)
    for _ in range(fields):
      name, kind = self._name(), self._number("<u4")
      if name in found:
        raise ValueError(f"has {name!r} twice")
      found[name] = self._value(kind)
      if name == _ALIGNMENT:
        alignment = found[name]
        # A power of two has one bit.
        if kind != _UINT32 or alignment.bit_count() != 1:
          raise ValueError(f"{name} is {alignment!r}; want a power of two")
    # A tensor takes at least a name's length, number of axes, type and offset.
    self._check(tensors * 24)
    infos = [self._tensor() for _ in range(tensors)]
    start = -(-self._at // alignment) * alignment
    return Header(found, self._placed(infos, start))

  def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = self._name(), self._number("<u4")
    lengths = self._numbers("<u8", axes)
    return name, tuple(reversed(lengths)), *self._pair()

  def _pair(self) -> tuple[int, int]:
    return self._number("<u4"), self._number("<u8")

  def _placed(self, infos, start: int) -> dict[str, Tensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors = {}
    for name, shape, number, offset in infos:
      if name in tensors:
        raise ValueError(f"has the tensor {name!r} twice")
      kind = GGMLQuantizationType(number)
      dtype, stored = np.dtype(_PLAIN.get(kind.name, "u1")), shape
      if kind.name not in _PLAIN:
        values, size = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % values:
          raise ValueError(
            f"{name!r} is {[*shape]}; {kind.name} wants rows of a multiple of"
            f" {values}"
          )
        stored = *shape[:-1], shape[-1] // values * size
      size = dtype.itemsize
      for length in stored:
        size *= length
      self._at = start + offset
      self._check(size)
      tensors[name] = Tensor(kind, shape, dtype, stored, start + offset)
    return tensors

  def _value(self, kind: int) -> Any:
    if kind == _TEXT:
      return self._text()
    if kind != _ARRAY:
      return self._number(_number_type(kind))
    kind, length = self._pair()
    if kind == _TEXT:
      # Each text has at least a length.
      self._check(length * 8)
      return self._texts(length)
    if kind == _ARRAY:
      # Each array has at least a type and a length.
      self._check(length * 12)
      return [self._value(_ARRAY) for _ in range(length)]
    return self._numbers(_number_type(kind), length)

  def _name(self) -> str:
    return self._text().decode()

  def _text(self) -> bytes:
    return self._texts(1)[0]

  def _texts(self, count: int) -> list[bytes]:
    # One loop without calls: a vocabulary has a hundred thousand texts.
    data, at = self._data, self._at
    size, length_of = len(data), _LENGTH.unpack_from
    found = []
    for _ in range(count):
      start = at + 8
      end = start + length_of(data, at)[0] if start <= size else start
      if end > size:
        self._at = at
        self._check(end - at)
      found.append(data[start:end])
      at = end
    self._at = at
    return found

  def _bytes(self, size: int) -> bytes:
    at = self._at
    end = at + size
    if end > len(self._data):
      self._check(size)
    self._at = end
    return self._data[at:end]

  def _number(self, dtype: str) -> Any:
    return self._numbers(dtype, 1)[0]

  def _numbers(self, dtype: str, count: int) -> list:
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer(self._bytes(size), dtype).tolist()

  def _check(self, size: int) -> None:
    """Raises `ValueError` unless so many bytes are left."""
    if self._at + size > len(self._data):
      raise ValueError(
        f"ends at byte {len(self._data)}, before byte {self._at + size}"
      )


_LENGTH = struct.Struct("<Q")


def _number_type(kind: int) -> str:
  name = _NUMBERS[kind] if kind < len(_NUMBERS) else None
  if name is None:
    raise ValueError(f"has a value of the unknown type {kind}")
  return name
