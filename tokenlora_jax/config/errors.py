"""One-line errors for bad input, and the checks that raise them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
  """An error in a person's input; one line: place, fault and remedy.

  Example:
    >>> print(InputError("decode.top-p: 2 is not allowed; want 0 < p <= 1"))
    decode.top-p: 2 is not allowed; want 0 < p <= 1
  """


def nearest(value: str, allowed: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the nearest name, or "".

  A name is near if at most a third of its letters, rounded up, are mistyped, or
  if only the part up to its last dot is missing. A folder that two paths share
  is not compared. `value` itself is never proposed.

  Args:
    value: the given name.
    allowed: the existing names.

  Example:
    >>> nearest("centriod", ["centroid", "uniform"])
    " (did you mean 'centroid'?)"
    >>> nearest("--learning-rate", ["--optim.learning-rate"])
    " (did you mean '--optim.learning-rate'?)"
    >>> nearest("/data/nobank", ["/data/nobank", "/data/noble-books"])
    ''
  """
  value = str(value)
  near = []
  for name in map(str, allowed):
    if name == value:
      continue
    folder, slash, _ = value.rpartition("/")
    start = len(folder + slash) if name.startswith(folder + slash) else 0
    given, wanted = _plain(value[start:]), _plain(name[start:])
    if given and given == wanted.rpartition(".")[2]:
      near.append((0, name))
      continue
    most = min(
      (max(len(given), len(wanted)) + 2) // 3, min(len(given), len(wanted)) - 1
    )
    if abs(len(given) - len(wanted)) <= most:
      edits = _edits(given, wanted)
      if edits <= most:
        near.append((edits, name))
  if not near:
    return ""
  return f" (did you mean {min(near, key=lambda pair: pair[0])[1]!r}?)"


def _plain(name: str) -> str:
  """Returns a name in lower case, underscores as dashes, no leading dashes."""
  return name.casefold().replace("_", "-").lstrip("-")


def _edits(one: str, other: str) -> int:
  """Returns the edit distance of two names; a swap of neighbours counts 1."""
  before: list[int] = []
  last = list(range(len(other) + 1))
  for i, a in enumerate(one, 1):
    row = [i]
    for j, b in enumerate(other, 1):
      best = min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b))
      if i > 1 and j > 1 and (a, one[i - 2]) == (other[j - 2], b):
        best = min(best, before[j - 2] + 1)
      row.append(best)
    before, last = last, row
  return last[-1]


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, or its type if it has none.

  Args:
    error: any exception.

  Example:
    >>> first_line(ValueError("no such row\\n  at line 3")), first_line(OSError())
    ('no such row', 'OSError')
  """
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
  """Raises `InputError` unless `value` is one of `allowed`.

  Args:
    field: the setting's name, as a person would write it.
    value: the given value.
    allowed: the allowed values.

  Raises:
    InputError: names the field, the value, the allowed values and the nearest.

  Example:
    >>> check_choice("router.name", "uniform", ["centroid", "uniform"])
  """
  if value not in allowed:
    raise InputError(
      f"{field}: {value!r} is not one of {', '.join(allowed)}"
      f"{nearest(value, allowed)}"
    )


def check(condition: bool, field: str, value: object, allowed: str) -> None:
  """Raises `InputError` unless `condition` is true.

  The error names the field, the value and what is allowed.

  Args:
    condition: what must hold.
    field: the setting's name, as a person would write it.
    value: the given value.
    allowed: the allowed values, in words.

  Raises:
    InputError: `condition` is false.

  Example:
    >>> check(3 > 0, "data.rows", 3, "at least 1")
  """
  if not condition:
    raise InputError(f"{field}: {value!r} is not allowed; want {allowed}")


def check_literals(settings: object, section: str) -> None:
  """Checks every field of a dataclass that is annotated as a `Literal`.

  Args:
    settings: an instance of the dataclass.
    section: prefix of the field's name in errors, such as `data.`.

  Raises:
    InputError: names the field, the value, the allowed values and the nearest.

  Example:
    >>> from tokenlora_jax.config import BaseConfig
    >>> check_literals(BaseConfig(dtype="float32"), "base.")
  """
  for field, hint in get_type_hints(type(settings)).items():
    if get_origin(hint) is Literal:
      name = f"{section}{field.replace('_', '-')}"
      check_choice(name, getattr(settings, field), get_args(hint))
