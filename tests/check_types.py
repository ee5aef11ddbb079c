"""What checks the package's annotations, shapes included, while tests run."""

from collections.abc import Callable

from beartype import BeartypeConf, BeartypeHintOverrides, beartype
import numpy as np

# A whole number is a float, as type checkers have it, and so are NumPy's.
_check = beartype(
  conf=BeartypeConf(
    hint_overrides=BeartypeHintOverrides(
      {int: int | np.integer, float: float | int | np.floating | np.integer}
    )
  )
)


def check_types(function: Callable) -> Callable:
  """Returns a function that checks what it is given and what it returns.

  Constructors are left alone: settings check themselves, with errors that tests
  look for, and JAX makes pytrees of things that are no arrays.
  """
  return function if function.__name__ == "__init__" else _check(function)
