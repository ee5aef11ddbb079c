"""What checks the package's annotations, shapes included, while tests run."""

from collections.abc import Callable

from beartype import BeartypeConf, BeartypeHintOverrides, beartype
import jax
import numpy as np

# A whole number is a float, as type checkers have it, and so are NumPy's.
_check = beartype(
  conf=BeartypeConf(
    hint_overrides=BeartypeHintOverrides(
      {int: int | np.integer, float: float | int | np.floating | np.integer}
    )
  )
)

# Constructors that are given arrays of the same shapes wherever they are called.
_CHECKED = {"DecodeState.__init__", "KV.__init__"}
_ARRAYS = jax.Array, np.ndarray, np.generic


def check_types(function: Callable) -> Callable:
  """Returns a function that checks what it is given and what it returns.

  Most constructors are left alone: settings check themselves, with errors that
  tests look for, and JAX makes pytrees of parts of arrays, or of no arrays.
  """
  if function.__name__ != "__init__":
    return _check(function)
  if function.__qualname__ not in _CHECKED:
    return function
  checked = _check(function)

  def construct(self, *args, **kwargs):
    given = jax.tree.leaves((args, kwargs))
    are_arrays = all(isinstance(x, _ARRAYS) for x in given)
    return (checked if are_arrays else function)(self, *args, **kwargs)

  return construct
