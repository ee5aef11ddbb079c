"""What was fitted for a router, as a file in a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tokenlora_jax.config import InputError


def save_fitted(
  folder: str | Path,
  router: str,
  experts: Sequence[str],
  settings: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
) -> None:
  """Writes what was fitted for a router: routers/NAME.safetensors in the bank.

  Args:
    folder: the bank's.
    router: its name.
    experts: that it was fitted for, in order.
    settings: of the router, as JSON values.
    arrays: the fitted ones, by name.

  Raises:
    InputError: the file cannot be written.
  """
  from safetensors.numpy import save

  about = {"settings": settings, "experts": list(experts)}
  whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  content = save(whole, {name: json.dumps(x) for name, x in about.items()})
  file = Path(folder) / "routers" / f"{router}.safetensors"
  temporary = file.with_name(f".{file.name}.{os.getpid()}")
  try:
    file.parent.mkdir(exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(file)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise InputError(f"{file}: cannot be written ({error.strerror})") from None
