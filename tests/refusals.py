"""What every error from a person's input must be: one line."""

from collections.abc import Callable
from typing import Any

import pytest

from tokenlora_jax.config import InputError


def refusal(call: Callable, *args: Any) -> str:
  """Returns the one line with which a call refuses its input."""
  with pytest.raises(InputError) as caught:
    call(*args)
  message = str(caught.value)
  assert "\n" not in message
  return message
