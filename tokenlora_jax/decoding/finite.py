"""Stops a text whose gates or logits are not numbers.

Axis letters: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
import numpy as np


def check_finite(
  log_probs: Sequence[Float[np.ndarray, " _"]] | Float[np.ndarray, "B N"],
  gates: Sequence[Float[np.ndarray, "_ E"]] | Float[np.ndarray, "B N E"],
  lengths: Sequence[int] | Int[np.ndarray, " B"],
  names: Sequence[int] | None = None,
) -> None:
  """Raises `FloatingPointError` if a gate or a logit is not finite.

  Args:
    log_probs: float32[N] of each row.
    gates: float32[N, E] of each row; E = 0 is the base alone.
    lengths: the number of tokens to check of each row.
    names: the rows' numbers, for errors; by default their indices.

  Raises:
    FloatingPointError: names the row and the token.

  Example:
    >>> check_finite(np.zeros((1, 2)), np.array([[[1.0], [np.nan]]]), [2])
    Traceback (most recent call last):
    ...
    FloatingPointError: the gates of row 0 are not finite at token 1
  """
  for row, length in enumerate(lengths):
    sound = np.isfinite(gates[row][:length]).all(axis=-1)
    for what, fine in (
      ("gates", sound), ("logits", np.isfinite(log_probs[row][:length]))
    ):  # fmt: skip
      if not fine.all():
        raise FloatingPointError(
          f"the {what} of row {names[row] if names else row} are not finite at"
          f" token {int(np.argmin(fine))}"
        )
