"""One-line errors for bad input, and the checks that raise them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import difflib
from typing import Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
  """Bad input from a person: one line that says what, where and what to do."""


def nearest(value: str, allowed: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the nearest name, or "".

  Args:
    value: what was given.
    allowed: the names that exist.

  Example:
    >>> nearest("centriod", ["centroid", "uniform"])
    " (did you mean 'centroid'?)"
  """
  match = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
  return f" (did you mean {match[0]!r}?)" if match else ""


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
