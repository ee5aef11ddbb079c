"""Tables and traces, as a person would see them."""

import io

import numpy as np
from rich.console import Console

from tokenlora_jax import report


def shown(thing, **settings):
  console = Console(file=io.StringIO(), width=100, **settings)
  console.print(thing)
  return console.file.getvalue()


def test_trace_gives_each_token_the_colour_of_its_leader():
  gates = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
  text = report.trace(["to", "[b]", "ken"], gates, ["x", "y"])
  assert text.plain == "to[b]ken"
  styles = [(span.start, span.end, span.style) for span in text.spans]
  first, second = report.COLOURS[:2]
  assert styles == [(0, 2, first), (2, 5, second), (5, 8, second)]
  key = report.legend(["x", "[y]"])
  assert key.plain == "■ x  ■ [y]  "
  assert [span.style for span in key.spans] == [first, second]
  # The base alone has no colour.
  plain = report.trace(["a", "b"], np.array([[0.0, 0.0], [0.0, 1.0]]), "xy")
  assert [(s.start, s.end, s.style) for s in plain.spans] == [(1, 2, second)]
  # More experts than colours.
  many = report.trace(["a"], np.eye(9)[8:], list("abcdefghi"))
  assert many.spans[0].style == report.COLOURS[8 % len(report.COLOURS)]


def test_summary_says_who_led():
  gates = np.array([[0.5, 0.5], [0.1, 0.9], [0.2, 0.8]])
  assert report.summary(gates, ["a", "b"]) == (
    "led: a 1, b 2 | mean gates: a .27, b .73 | entropy .51 nats | 1 switch"
  )
  assert report.summary(np.ones((2, 1)), ["a"]) == (
    "led: a 2 | mean gates: a 1.00 | entropy .00 nats | 0 switches"
  )
  assert report.summary(np.zeros((2, 1)), ["a"]) == (
    "led: none 2 | mean gates: a .00 | entropy .00 nats | 0 switches"
  )
  assert "a 10.00, b -.50" in report.summary(np.array([[10, -0.5]]), "ab")
  flips = report.summary(np.eye(2)[np.arange(30) % 2], ["a", "b"])
  assert "a 1, b 1, ... (30 runs)" in flips
  assert report.summary(np.zeros((3, 0)), []) == "no adapters"
