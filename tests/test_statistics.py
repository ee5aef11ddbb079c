"""Bootstrap intervals against a slow loop and what theory says."""

import math

import numpy as np
import pytest

from tokenlora_jax.evaluation import statistics
from tokenlora_jax.evaluation.statistics import Estimate, estimate, ratios


def slow(sums, weights, seed, resamples):
  """One resample after the other, one question after the other."""
  count = len(sums)
  rng = np.random.default_rng(seed)
  rows = [range(count)]
  for _ in range(resamples):
    times = rng.multinomial(count, np.full(count, 1 / count))
    rows.append([q for q in range(count) for _ in range(times[q])])
  return [
    [
      math.fsum(sums[q][a] for q in row) / math.fsum(weights[q][a] for q in row)
      for a in range(len(sums[0]))
    ]
    for row in rows
  ]


@pytest.mark.parametrize("at_once", [1, 40, 2**22])
def test_ratios_equal_a_loop_over_questions(monkeypatch, at_once):
  """However many resamples are made at once."""
  monkeypatch.setattr(statistics, "_AT_ONCE", at_once)
  rng = np.random.default_rng(1)
  sums = rng.normal(size=(13, 3))
  weights = rng.integers(1, 9, (13, 3))
  found = ratios(sums, weights, [7, 13], resamples=50)
  assert found.shape == (51, 3)
  np.testing.assert_allclose(found, slow(sums, weights, [7, 13], 50))
  # One figure alone has the draws that it has among others.
  alone = ratios(sums[:, 1:2], weights[:, 1:2], [7, 13], resamples=50)
  np.testing.assert_allclose(alone[:, 0], found[:, 1])


def test_interval_is_between_percentiles():
  rng = np.random.default_rng(0)
  figures = np.array([0.5, *rng.permutation(np.arange(1001))])
  found = estimate(figures, questions=3)
  assert found == pytest.approx((0.5, 25, 975))
  assert math.isnan(estimate(figures, questions=1).low)


def test_interval_of_a_mean_is_that_of_theory():
  """Of many questions: 1.96 standard errors to either side."""
  values = np.random.default_rng(3).exponential(size=(900, 1))
  found = estimate(ratios(values, np.ones((900, 1)), [0])[:, 0], 900)
  error = values.std() / math.sqrt(900)
  assert found.value == pytest.approx(values.mean())
  assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.006)
  assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.006)


def test_a_paired_difference_is_surer_than_its_parts():
  rng = np.random.default_rng(4)
  hard = rng.normal(10, 5, (60, 1))
  both = np.concatenate([hard, hard - 0.2 + rng.normal(0, 0.1, (60, 1))], 1)
  found = ratios(both, np.ones((60, 2)), [0])
  first, second = (estimate(found[:, a], 60) for a in (0, 1))
  assert first.low < second.value < first.high
  difference = estimate(found[:, 1] - found[:, 0], 60)
  assert difference.excludes_zero
  assert difference.high - difference.low < 0.1 < first.high - first.low


def test_an_interval_that_touches_zero_does_not_exclude_it():
  assert not Estimate(1.0, 0.0, 2.0).excludes_zero
  assert not Estimate(-1.0, -2.0, 0.0).excludes_zero
  assert Estimate(-1.0, -2.0, -0.1).excludes_zero
  assert not Estimate(1.0).excludes_zero
