"""Statistics of one text's gates: leaders, entropy, switches and shares.

Axis letters: N tokens, E experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.config import InputError


@dataclasses.dataclass(frozen=True)
class GateTrace:
  """The gates of one text, token by token, and their statistics.

  A gate may be negative, so absolute values count. Where all gates are zero the
  base predicts alone: no expert leads, and the entropy is 0.

  Attributes:
    gates: float64[N, E].
    entropy: float64[N], nats; see `entropy`.
    leaders: int[N], the expert that leads each token, -1 for none; see
      `leaders`.
    switches: int[S], the tokens at which the leading expert changes.
    shares: float64[E], the mean of each expert's gates.
    leads: float64[E], the share of the N tokens that each expert leads.
  """

  gates: np.ndarray
  entropy: np.ndarray
  leaders: np.ndarray
  switches: np.ndarray
  shares: np.ndarray
  leads: np.ndarray

  @classmethod
  def of(cls, gates: ArrayLike) -> GateTrace:
    """Returns the trace of a text's gates.

    Args:
      gates: float[N, E].

    Raises:
      InputError: the gates have another shape, or are not finite.

    Example:
      >>> trace = GateTrace.of([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 0]])
      >>> trace.entropy.round(3).tolist()
      [0.562, 0.693, 0.562, 0.0]
      >>> trace.leaders.tolist(), trace.switches.tolist()
      ([0, 0, 1, -1], [2])
      >>> trace.shares.tolist(), trace.leads.tolist()
      ([0.375, 0.375], [0.5, 0.25])
    """
    gates = np.asarray(gates, np.float64)
    if gates.ndim != 2 or not np.isfinite(gates).all():
      raise InputError(
        f"gates of shape {list(gates.shape)}: want finite numbers [N, E]"
      )
    leading = leaders(gates)
    # A token without a leader does not end the lead before it.
    led = np.flatnonzero(leading >= 0)
    changes = np.flatnonzero(np.diff(leading[led])) + 1
    tokens, experts = gates.shape
    counts = np.bincount(leading[led], minlength=experts)
    return cls(
      gates,
      entropy(gates),
      leading,
      switches=led[changes],
      shares=gates.sum(axis=0) / max(tokens, 1),
      leads=counts / max(tokens, 1),
    )

  def record(self) -> dict[str, list]:
    """Returns `entropy`, `switches`, `shares` and `leads` as JSON values.

    Example:
      >>> GateTrace.of([[1.0, 0.0], [0.0, 1.0]]).record()["switches"]
      [1]
    """
    return {
      name: getattr(self, name).round(6).tolist()
      for name in ("entropy", "switches", "shares", "leads")
    }


def leaders(gates: np.ndarray) -> np.ndarray:
  """Returns, per token, the expert with the largest absolute gate.

  Args:
    gates: float[N, E].

  Returns:
    int[N]; the first one of equals, -1 where all gates are zero.

  Example:
    >>> leaders(np.array([[0.2, 0.8], [-0.5, 0.25], [0.0, 0.0]])).tolist()
    [1, 0, -1]
  """
  sizes = np.abs(gates)
  if not sizes.shape[1]:
    return np.full(len(sizes), -1)
  return np.where(sizes.any(axis=1), sizes.argmax(axis=1), -1)


def entropy(gates: np.ndarray) -> np.ndarray:
  """Returns the entropy of each token's gates (Shannon, 1948).

  H = -sum_e p_e ln p_e, with p_e = |g_e| / sum_f |g_f|

  Args:
    gates: float[N, E].

  Returns:
    float64[N] in nats, from 0 (one expert, or none) to ln E (all equal).

  Example:
    >>> entropy(np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]])).round(3).tolist()
    [0.693, 0.0, 0.0]
  """
  sizes = np.abs(np.asarray(gates, np.float64))
  total = sizes.sum(axis=1, keepdims=True)
  shares = sizes / np.where(total > 0, total, 1)
  # 0 ln 0 counts as 0, and a sum of zeros becomes 0 instead of -0.
  return np.abs(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1))
