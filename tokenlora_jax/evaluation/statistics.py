"""Bootstrap confidence intervals of figures, over questions.

Axis letters: Q questions, A figures that are compared, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import NamedTuple

from jaxtyping import Float, Real
import numpy as np

RESAMPLES = 4000
LEVEL = 0.95

# Counts of resamples in memory at once, 32 MiB.
_AT_ONCE = 2**22


class Estimate(NamedTuple):
  """A figure and its interval.

  Attributes:
    value: the figure of the given questions.
    low: lower end of the interval; NaN if there are too few questions.
    high: upper end of the interval; NaN if there are too few questions.
  """

  value: float
  low: float = math.nan
  high: float = math.nan

  @property
  def excludes_zero(self) -> bool:
    """True if the whole interval is on one side of 0.

    Example:
      >>> Estimate(0.2, 0.1, 0.3).excludes_zero, Estimate(0.2).excludes_zero
      (True, False)
    """
    return self.low > 0 or self.high < 0


def ratios(
  sums: Real[np.ndarray, "Q A"],
  weights: Real[np.ndarray, "Q A"],
  seed: Sequence[int],
  resamples: int = RESAMPLES,
) -> Float[np.ndarray, "1+{resamples} A"]:
  """Computes figures of the given questions, and of bootstrap resamples.

  figure = sum_q c_q sums[q] / sum_q c_q weights[q],  c ~ multinomial(Q, 1/Q)

  The bootstrap (Efron, 1979): a resample has Q questions drawn with
  replacement, so it holds question q c_q times. With losses as sums and tokens
  as weights the figure is the loss per token; with weights of 1 it is a mean.
  All A figures share the draws, so differences between them are paired.

  Args:
    sums: float[Q, A].
    weights: float[Q, A], more than 0.
    seed: seeds the draws; the same seed and Q give the same draws.
    resamples: S.

  Returns:
    float64[1 + S, A]: the given questions (c = 1), then each resample.

  Example:
    >>> found = ratios(np.array([[1.0], [5.0]]), np.array([[1.0], [2.0]]), [0])
    >>> found[0].tolist(), sorted(set(found[1:, 0].tolist()))
    ([2.0], [1.0, 2.0, 2.5])
  """
  sums = np.asarray(sums, np.float64)
  weights = np.asarray(weights, np.float64)
  count = len(sums)
  rng = np.random.default_rng(seed)
  found = [sums.sum(axis=0, keepdims=True) / weights.sum(axis=0, keepdims=True)]
  step = max(1, _AT_ONCE // count)
  for start in range(0, resamples, step):
    size = min(step, resamples - start)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size)
    drawn = drawn.astype(np.float64)
    found.append((drawn @ sums) / (drawn @ weights))
  return np.concatenate(found)


def estimate(figures: Float[np.ndarray, " S1"], questions: int) -> Estimate:
  """Computes a figure's 95 % percentile interval from its resamples.

  Args:
    figures: float[1 + S], a column of `ratios`, or a function of several.
    questions: the fewest questions behind any of them. One question gives no
      interval.

  Returns:
    The figure of the given questions, with its interval.

  Example:
    >>> estimate(np.array([2.0, 1.0, 2.0, 3.0]), questions=5)
    Estimate(value=2.0, low=1.05, high=2.95)
  """
  value = float(figures[0])
  if questions < 2:
    return Estimate(value)
  tail = (1 - LEVEL) / 2
  low, high = np.quantile(figures[1:], [tail, 1 - tail])
  return Estimate(value, float(low), float(high))
