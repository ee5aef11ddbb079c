"""One-line errors for bad input, and the checks that raise them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
  """Bad input from a person: one line that says what, where and what to do."""


def nearest(value: str, allowed: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the nearest name, or "".

  A name is near when a third of its letters or fewer were mistyped, or when
  only the section before its last dot is missing. Of paths, the folder that
  both share does not count; what was given is never proposed.

  Args:
    value: what was given.
    allowed: the names that exist.

  Example:
    >>> nearest("centriod", ["centroid", "uniform"])
    " (did you mean 'centroid'?)"
    >>> nearest("--learning-rate", ["--optim.learning-rate"])
    " (did you mean '--optim.learning-rate'?)"
    >>> nearest("/tmp/nobank", ["/tmp/nobank", "/tmp/noble-books"])
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
  """Returns a name without what people mix up: case, dashes, underscores."""
  return name.casefold().replace("_", "-").lstrip("-")


def _edits(one: str, other: str) -> int:
  """Returns how many letters differ, are missing, too many, or swapped."""
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
  """Returns the first line of what an error says, or else its type's name.

  Example:
    >>> first_line(ValueError("no such row\\n  at line 3")), first_line(OSError())
    ('no such row', 'OSError')
  """
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
  """Raises `InputError` unless `value` is one of `allowed`.

  Args:
    field: the name of the setting, as a person would write it.
    value: what was given.
    allowed: the names that exist.

  Raises:
    InputError: naming field, value, the allowed names and the nearest one.

  Example:
    >>> check_choice("router.name", "uniform", ["centroid", "uniform"])
  """
  if value not in allowed:
    raise InputError(
      f"{field}: {value!r} is not one of {', '.join(allowed)}"
      f"{nearest(value, allowed)}"
    )


def check(condition: bool, field: str, value: object, allowed: str) -> None:
  """Raises `InputError` naming field, value and what is allowed, unless true.

  Example:
    >>> check(3 > 0, "data.rows", 3, "at least 1")
  """
  if not condition:
    raise InputError(f"{field}: {value!r} is not allowed; want {allowed}")


def check_literals(settings: object, section: str) -> None:
  """Checks every field of a dataclass that allows only some words.

  Args:
    settings: the dataclass.
    section: what stands before its fields' names, such as `data.`.

  Raises:
    InputError: naming field, value, the allowed words and the nearest one.
  """
  for field, hint in get_type_hints(type(settings)).items():
    if get_origin(hint) is Literal:
      name = f"{section}{field.replace('_', '-')}"
      check_choice(name, getattr(settings, field), get_args(hint))
