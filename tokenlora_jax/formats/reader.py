"""The interface, parameter names and checks that all readers of bases share.

Our kernels are [in, out]; every format here stores them as [out, in].
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tokenlora_jax.config import InputError, nearest
from tokenlora_jax.formats.tensors import is_finite
from tokenlora_jax.model.config import LlamaConfig

# The most names that an error shows; it counts the rest.
_SHOWN = 8
# Bytes that a fingerprint of version 1 reads at each end of a tensor.
END = 4096
# Numbers that version 2 reads at each end; at least one row.
_SAMPLE = 1024
# Remedies for a head that is missing, or has another shape.
_HEAD_HINTS = (
  " (where the embedding is the head, the config must say"
  ' "tie_word_embeddings": true)',
  " (the head must have the embedding's rows: cut or pad it to the config's"
  " vocabulary)",
)
# Bytes of a tensor that are read at once while an array is filled.
PIECE = 4 << 20


class Stored(NamedTuple):
  """A tensor's stored shape, and its dtype by the format's own name."""

  shape: tuple[int, ...]
  dtype: str


class BaseReader(abc.ABC):
  """Reads a base from a file, tensor by tensor, under our names.

  Names are `embedding` [V, D], `norm` [D], `head` [D, V] (absent if tied) and,
  for each layer i, `layers.i.attention_norm` [D], `layers.i.mlp_norm` [D],
  `layers.i.P.kernel` [in, out] and, if the config has it, `layers.i.P.bias`
  [out], with P of q, k, v, o, gate, up, down. Rows of q and k are in the order
  of Hugging Face's rotary embedding, which rotates halves.

  Attributes:
    config: the shape of the Llama.
  """

  def __init__(
    self,
    where: str,
    config: LlamaConfig,
    modules: Mapping[str, str],
    stored: Mapping[str, Stored],
    readable: Collection[str],
    ignore: Callable[[str], object],
  ):
    """Checks the stored tensors against the config.

    Args:
      where: the file or folder, for errors.
      config: the shape of the Llama.
      modules: our module names -> the format's; {} is the layer's number.
      stored: the file's tensors.
      readable: the stored dtypes that can be read.
      ignore: whether an unexpected tensor is harmless.

    Raises:
      InputError: tensors are missing, unexpected, or of a wrong shape or dtype;
        names all of them at once.
    """
    # Also refuses a forged, huge number of layers before the loop over them.
    if config.layers > len(stored):
      raise InputError(
        f"{where}: the config has {config.layers} layers, but there are only"
        f" {len(stored)} tensors"
      )
    self.config = config
    self._where = where
    self._stored = stored
    self._shapes = parameter_shapes(config)
    self._keys = {name: _key(name, modules) for name in self._shapes}
    problems = []
    for name, key in self._keys.items():
      want = self._shapes[name]
      want = want[::-1] if _is_transposed(name) else want
      hint = _HEAD_HINTS if name == "head" else ("", "")
      if key not in stored:
        problems.append(f"{key!r} is missing{hint[0]}")
      elif stored[key].shape != want:
        problems.append(
          f"{key!r} is {[*stored[key].shape]}, want {[*want]}{hint[1]}"
        )
      elif stored[key].dtype not in readable:
        problems.append(
          f"{key!r} is {stored[key].dtype}, want {', '.join(sorted(readable))}"
        )
    places = set(self._keys.values())
    problems += [
      f"{key!r} has no place"
      for key in sorted(stored.keys() - places)
      if not ignore(key)
    ]
    if problems:
      raise InputError(f"{where}: {shorten(problems)}")

  @property
  def names(self) -> frozenset[str]:
    """Our names of all parameters."""
    return frozenset(self._shapes)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a parameter's shape in our layout."""
    return self._shapes[name]

  def read(
    self, name: str, index: tuple[slice, ...] | None = None
  ) -> np.ndarray:
    """Reads one parameter, or the part of it at `index`.

    Args:
      name: our name.
      index: one slice a dimension, without steps; everything by default.

    Returns:
      The values, in their stored dtype (float32 if quantised).

    Raises:
      ValueError: `index` has a step, or not one slice a dimension.
    """
    shape = self._shapes[name]
    index = (slice(None),) * len(shape) if index is None else index
    index = tuple(
      slice(*s.indices(n)) for s, n in zip(index, shape, strict=True)
    )
    if any(s.step != 1 for s in index):
      raise ValueError(f"{name}: cannot be read in steps: {index}")
    if _is_transposed(name):
      return self._read(self._keys[name], index[::-1]).T
    return self._read(self._keys[name], index)

  def fill(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
    """Reads part of a parameter into an array, a few rows at a time.

    So no second array of the part's size is needed.

    Args:
      out: the array to fill, with the part's shape and any float dtype.
      name: our name.
      index: one slice per dimension, with both ends.

    Raises:
      InputError: a value is NaN or infinite in `out`'s dtype.
    """
    # The axis along which the file stores whole rows.
    axis = out.ndim - 1 if _is_transposed(name) else 0
    length, start = out.shape[axis], index[axis].start
    rows = max(1, PIECE * length // out.nbytes)
    for at in range(0, length, rows):
      stop = min(at + rows, length)
      source, target = [*index], [slice(None)] * out.ndim
      source[axis] = slice(start + at, start + stop)
      target[axis] = slice(at, stop)
      piece = out[tuple(target)]
      piece[...] = self.read(name, tuple(source))
      # Checked now, while the piece is in the processor's cache.
      if not is_finite(piece):
        key = self._keys[name]
        raise InputError(
          f"{self._file(key)}: {key!r} holds NaN, infinity or a number too"
          f" large for {piece.dtype}; the file is damaged, or its training"
          " diverged"
        )

  def fingerprint(self) -> str:
    """Returns a SHA-256, in hex, of the config and of parts of all tensors.

    It covers the config except `max_length`, and each tensor's name, shape and
    first and last output rows (about 1,000 numbers each): it misses a change in
    the middle of a tensor. Numbers are rounded to bfloat16, and to 0 below
    2^-16. So a bfloat16 base and its copies in float32 and float16 have the
    same fingerprint (but numbers above 65,504 overflow in float16), as have a
    float32 base and its copy in bfloat16.
    """
    # Fields that are None are left out, so that a later field changes nothing.
    about = {
      name: value
      for name, value in dataclasses.asdict(self.config).items()
      if value is not None and name != "max_length"
    }
    digest = hashlib.sha256(b"2 " + json.dumps(about, sort_keys=True).encode())
    for name, shape in sorted(self._shapes.items()):
      digest.update(f"\n{name} {shape} ".encode())
      # The axis along which a file has whole rows.
      axis = len(shape) - 1 if _is_transposed(name) else 0
      rows = max(1, _SAMPLE * shape[axis] // math.prod(shape))
      for ends in ((0, rows), (max(0, shape[axis] - rows), shape[axis])):
        index = [slice(0, n) for n in shape]
        index[axis] = slice(*ends)
        digest.update(_coarse(self.read(name, tuple(index))))
    return digest.hexdigest()

  def fingerprint_1(self) -> str:
    """Returns the fingerprint in banks of earlier versions.

    It covers the whole config, and the stored dtype and the stored bytes at
    both ends of each tensor.
    """
    about = dataclasses.asdict(self.config)
    # Fingerprints of version 1 are older than this field.
    del about["sliding_window"]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, key in sorted(self._keys.items()):
      digest.update(f"\n{name} {self._shapes[name]} ".encode())
      digest.update(self._stored[key].dtype.encode())
      for end in self._ends(key):
        digest.update(end)
    return digest.hexdigest()

  def _file(self, key: str) -> str:
    """Returns the file of a tensor, for errors."""
    del key
    return self._where

  @abc.abstractmethod
  def _read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads part of a tensor as stored; every slice has both ends."""

  @abc.abstractmethod
  def _ends(self, key: str) -> tuple[bytes, bytes]:
    """Returns the first and the last stored bytes of a tensor, about `END`."""


def _coarse(values: np.ndarray) -> bytes:
  """Returns bytes that are equal for every precision; see `fingerprint`."""
  # A number too large for bfloat16 is refused when it is read, not here.
  with np.errstate(over="ignore", invalid="ignore"):
    rounded = np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)
  rounded = rounded.astype(np.float32)
  # Below 2^-16 float16 loses digits, so those become 0; all zeros become +0.
  rounded[np.abs(rounded) < 2**-16] = 0
  return rounded.astype("<f4", order="C").tobytes()


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all parameters, by our names.

  Args:
    config: the shape of the Llama.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> parameter_shapes(PRESETS["tiny"])["layers.1.k.kernel"]
    (64, 32)
  """
  width = config.width
  shapes: dict[str, tuple[int, ...]] = {
    "embedding": (config.vocab, width),
    "norm": (width,),
  }
  if not config.tied:
    shapes["head"] = (width, config.vocab)
  has_bias = dict.fromkeys(("q", "k", "v"), config.qkv_bias)
  has_bias["o"] = config.o_bias
  for i in range(config.layers):
    shapes[f"layers.{i}.attention_norm"] = (width,)
    shapes[f"layers.{i}.mlp_norm"] = (width,)
    for projection, shape in config.projection_shapes.items():
      shapes[f"layers.{i}.{projection}.kernel"] = shape
      if has_bias.get(projection, config.mlp_bias):
        shapes[f"layers.{i}.{projection}.bias"] = shape[1:]
  return shapes


def _is_transposed(name: str) -> bool:
  return name == "head" or name.endswith(".kernel")


def _key(name: str, modules: Mapping[str, str]) -> str:
  """Returns a name in the file: layers.0.q.bias -> blk.0.attn_q.bias."""
  leaf = "bias" if name.endswith(".bias") else "weight"
  _, layer, module, *_ = (
    name.split(".") if name.startswith("layers.") else ("", "", name)
  )
  return f"{modules[module].format(layer)}.{leaf}"


# Rows, or a part along each axis.
Index = slice | np.ndarray | tuple[slice | np.ndarray, ...]


def part_of_file(
  path: Path,
  dtype: np.typing.DTypeLike,
  offset: int,
  shape: tuple[int, ...],
  index: Index = slice(None),
) -> np.ndarray:
  """Reads part of an array in a file, and no other bytes.

  The file is mapped only meanwhile: pages of an open map count as the process's
  memory.

  Args:
    path: the file.
    dtype: the array's dtype.
    offset: the offset of its first byte.
    shape: the shape of the whole array.
    index: the part to read.

  Example:
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...   np.arange(6, dtype=np.float32).tofile(file.name)
    ...   part_of_file(Path(file.name), "float32", 0, (3, 2), slice(1)).tolist()
    [[0.0, 1.0]]
  """
  # Given a path, NumPy looks at each folder above it.
  with open(os.fspath(path), "rb") as file:
    return np.array(np.memmap(file, dtype, "r", offset, shape)[index])


def shorten(items: Collection[str]) -> str:
  """Joins items into one line; shows the first ones and counts the rest.

  Example:
    >>> shorten([*"abcdefghij"])
    'a; b; c; d; e; f; g; h; and 2 more'
  """
  shown = "; ".join(list(items)[:_SHOWN])
  more = len(items) - _SHOWN
  return f"{shown}; and {more} more" if more > 0 else shown


class Fields:
  """The fields of a foreign config, which a parser takes one by one.

  A field that is left over at the end is an error, so that none is skipped. A
  field that is null counts as absent.

  Args:
    values: the fields.
    where: the file, for errors.
    prefix: prefix of the field's name in errors.

  Example:
    >>> fields = Fields({"layers": 2, "bias": None}, "config.json")
    >>> fields.integer("layers"), fields.flag("bias")
    (2, False)
    >>> fields.finish()
  """

  def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
    self._left = {k: v for k, v in values.items() if v is not None}
    self._where = where
    self._prefix = prefix
    self._asked: set[str] = set()

  def __contains__(self, name: str) -> bool:
    self._asked.add(name)
    return name in self._left

  def error(self, name: str, value: object, want: str) -> InputError:
    """Returns the error for a field's value."""
    return InputError(
      f"{self._where}: {self._prefix}{name} is {_short(value)}, want {want}"
    )

  def take(self, name: str, default: Any = None) -> Any:
    """Takes a field; returns its value, or `default` if it is absent."""
    self._asked.add(name)
    return self._left.pop(name, default)

  def integer(self, name: str, default: int | None = None) -> int:
    """Takes a whole number of at least 1; required if it has no default."""
    value = self.take(name, default)
    # A bool is an int in Python.
    if type(value) is not int or value < 1:
      raise self.error(name, value, "a whole number of at least 1")
    return value

  def real(self, name: str, default: float | None = None) -> float:
    """Takes a number above 0; required if it has no default."""
    value = self.take(name, default)
    # Python's JSON parser accepts infinities, NaN and huge integers.
    if type(value) not in (int, float) or not 0 < value < 1e38:
      raise self.error(name, value, "a number above 0")
    return float(value)

  def flag(self, name: str) -> bool:
    """Takes true or false; false by default."""
    value = self.take(name, False)
    if type(value) is not bool:
      raise self.error(name, value, "true or false")
    return value

  def only(self, name: str, *allowed: Any) -> None:
    """Takes a field of which only some values are supported."""
    value = self.take(name)
    if value is not None and value not in allowed:
      want = " or ".join([*map(_short, allowed)] or ["null"])
      raise self.error(name, value, f"{want}; nothing else is supported")

  def finish(self, harmless: Collection[str] = ()) -> None:
    """Raises `InputError` if fields are left that may change the calculation."""
    left = sorted(self._left.keys() - set(harmless))
    if left:
      told = [
        f"{self._prefix}{name} = {_short(self._left[name])}"
        f"{nearest(name, self._asked)}"
        for name in left
      ]
      raise InputError(
        f"{self._where}: unknown fields, which may change the model; remove"
        f" them if they do not: {shorten(told)}"
      )


def _short(value: object) -> str:
  text = json.dumps(value, default=repr, ensure_ascii=False)
  return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(error: Exception) -> str:
  """Returns a library's error message as one line of at most 200 letters.

  Example:
    >>> one_line(ValueError("no such file\\nsee the log"))
    'no such file see the log'
  """
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 200 else f"{text[:197]}..."
