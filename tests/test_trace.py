"""What is told of gates, against sums by hand."""

import json
import math

import numpy as np
import pytest

from tokenlora_jax import report
from tokenlora_jax.config import InputError
from tokenlora_jax.report import COLOURS
from tokenlora_jax.report.trace import GateTrace, entropy, leaders


def test_a_trace_by_hand():
  trace = GateTrace.of(
    [[0.5, 0.5, 0], [0.25, 0.75, 0], [0.25, 0.75, 0], [0, 0, 1], [1, 0, 0]]
  )
  quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
  np.testing.assert_allclose(
    trace.entropy, [math.log(2), quarter, quarter, 0, 0], atol=1e-12
  )
  assert trace.leaders.tolist() == [0, 1, 1, 2, 0]
  assert trace.switches.tolist() == [1, 3, 4]
  np.testing.assert_allclose(trace.shares, [0.4, 0.4, 0.2])
  np.testing.assert_allclose(trace.leads, [0.4, 0.4, 0.2])


def test_sizes_count_and_their_scale_does_not():
  """Four whole adapters are as undecided as four quarters; a minus counts."""
  gates = np.array([[1.0, 1, 1, 1], [0.25, 0.25, 0.25, 0.25], [-2, 0, 0, 0.5]])
  want = [math.log(4), math.log(4), 0.8 * math.log(1.25) + 0.2 * math.log(5)]
  np.testing.assert_allclose(entropy(gates), want)
  assert leaders(gates).tolist() == [0, 0, 0]
  np.testing.assert_allclose(GateTrace.of(gates).shares[0], -0.25)


def test_the_base_has_no_entropy_and_no_lead():
  trace = GateTrace.of(np.zeros((3, 2), np.float32))
  assert trace.entropy.tolist() == [0, 0, 0]
  assert not np.signbit(trace.entropy).any()
  assert trace.leaders.tolist() == [-1, -1, -1]
  assert trace.switches.size == 0
  assert trace.shares.tolist() == trace.leads.tolist() == [0, 0]


def test_tokens_of_the_base_do_not_make_a_switch():
  one, two, none = [1, 0], [0, 1], [0, 0]
  trace = GateTrace.of([none, one, none, one, none, two, two])
  assert trace.switches.tolist() == [5]
  np.testing.assert_allclose(trace.leads, [2 / 7, 2 / 7])


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0), (1, 1)])
def test_small_traces(shape):
  trace = GateTrace.of(np.ones(shape))
  assert trace.entropy.tolist() == [0] * shape[0]
  assert trace.switches.tolist() == []
  assert trace.leads.shape == trace.shares.shape == shape[1:]


def test_a_record_is_json():
  record = GateTrace.of(np.eye(2, dtype=np.float32)[[0, 1, 1]]).record()
  assert json.loads(json.dumps(record)) == {
    "entropy": [0, 0, 0],
    "switches": [1],
    "shares": [0.333333, 0.666667],
    "leads": [0.333333, 0.666667],
  }


@pytest.mark.parametrize("gates", [[0.5, 0.5], [[np.nan, 1]], [[[1]]]])
def test_what_is_no_trace_is_refused(gates):
  with pytest.raises(InputError, match=r"gates of shape \[.*want finite"):
    GateTrace.of(gates)


@pytest.mark.parametrize("seed", range(4))
def test_record_terminal_and_heat_map_tell_the_same(seed):
  """Of gates with zeros, ties and negatives."""
  rng = np.random.default_rng(seed)
  gates = rng.choice([0.0, 0.25, 0.5, -0.5, 1.0], size=(24, 3))
  gates[rng.integers(24, size=4)] = 0
  names = ["a", "b", "c"]
  record = GateTrace.of(gates).record()
  one = report.HeatMap("p", ["x"] * 24, gates, names)
  # Whom the coloured tokens name, against the heat map's leads.
  spans = report.trace(list("x" * 24), gates, names).spans
  coloured = {span.start: str(span.style) for span in spans if span.style}
  led = np.flatnonzero(one.leads >= 0)
  assert coloured == {int(n): COLOURS[one.leads[n]] for n in led}
  shares = np.bincount(one.leads[led], minlength=3) / 24
  np.testing.assert_allclose(record["leads"], shares, atol=1e-6)
  assert record["switches"] == np.flatnonzero(one.starts)[1:].tolist()
  count, entropy = len(record["switches"]), np.mean(record["entropy"])
  said = report.summary(gates, names)
  facts, means = one.about()
  assert said.endswith(f"| {count} switch{'' if count == 1 else 'es'}")
  assert f"the lead changes {count} time" in facts
  assert f"entropy {entropy:.2f} ".replace("0.", ".") in said
  assert f"entropy {entropy:.2f} nats" in facts
  for i, (name, share) in enumerate(zip(names, record["shares"], strict=True)):
    digits = f"{share:.2f}".replace("0.", ".", 1)
    assert f"{name} {digits}" in said.partition("mean gates: ")[2]
    assert f"{'ABC'[i]} {name} {share:.0%}" in means
  found = report.gate_summary(gates)
  assert found["switches"] == count
  np.testing.assert_allclose(found["shares"], record["shares"], atol=1e-6)
