"""Terminal output of a text's gates: coloured tokens and a summary line.

Axis letters: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools

import numpy as np
from rich.text import Text

from tokenlora_jax.report.colours import COLOURS
from tokenlora_jax.report.trace import GateTrace, leaders


def legend(names: Sequence[str]) -> Text:
  """Returns the experts' names, each in its colour.

  Args:
    names: the experts' names.

  Example:
    >>> legend(["math", "code"]).plain.split()
    ['■', 'math', '■', 'code']
  """
  text = Text()
  for i, name in enumerate(names):
    text.append(f"■ {name}  ", style=COLOURS[i % len(COLOURS)])
  return text


def trace(
  pieces: Sequence[str], gates: np.ndarray, names: Sequence[str]
) -> Text:
  """Returns a text in which each token has its leading expert's colour.

  A token whose gates are all zero has no colour.

  Args:
    pieces: the N tokens as text.
    gates: float[N, E].
    names: the experts' names.

  Example:
    >>> trace(["a", "b"], np.eye(2), ["x", "y"]).plain
    'ab'
  """
  text = Text()
  for piece, lead in zip(pieces, leaders(gates), strict=True):
    text.append(piece, style=COLOURS[lead % len(COLOURS)] if lead >= 0 else "")
  return text


def summary(gates: np.ndarray, names: Sequence[str]) -> str:
  """Returns one line: runs of leading experts, mean gates, entropy, switches.

  Args:
    gates: float[N, E].
    names: the experts' names.

  Example:
    >>> summary(np.array([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]]), "xy")
    'led: x 2, y 1 | mean gates: x .58, y .42 | entropy .56 nats | 1 switch'
  """
  if not gates.size:
    return "no adapters"
  trace = GateTrace.of(gates)
  runs = [
    f"{names[lead] if lead >= 0 else 'none'} {len(list(run))}"
    for lead, run in itertools.groupby(trace.leaders.tolist())
  ]
  if len(runs) > 12:
    runs = [*runs[:12], f"... ({len(runs)} runs)"]
  means = [
    f"{name} {_short(mean)}"
    for name, mean in zip(names, trace.shares, strict=True)
  ]
  count = len(trace.switches)
  return (
    f"led: {', '.join(runs)} | mean gates: {', '.join(means)}"
    f" | entropy {_short(trace.entropy.mean())} nats"
    f" | {count} switch{'' if count == 1 else 'es'}"
  )


def _short(number: float) -> str:
  """Formats a number with two digits and no zero before the point."""
  text = f"{number:.2f}"
  return text.replace("0.", ".", 1) if abs(number) < 1 else text


def speed(stats: Mapping[str, float]) -> str:
  """Returns the tokens a second of a `Generation.stats`, in words.

  Args:
    stats: the stats of a `Generation`.

  Example:
    >>> speed({"tokens_per_second": 2.0, "timed_tokens": 4, "new_tokens": 4})
    '2.0 tokens/s'
    >>> speed({"tokens_per_second": 2.0, "timed_tokens": 4, "new_tokens": 6})
    '2.0 tokens/s (without compiling)'
    >>> speed({"tokens_per_second": 2.0, "timed_tokens": 0, "new_tokens": 6})
    '2.0 tokens/s (compiling included)'
  """
  rate = f"{stats['tokens_per_second']:.1f} tokens/s"
  if not stats["timed_tokens"]:
    return f"{rate} (compiling included)"
  if stats["timed_tokens"] < stats["new_tokens"]:
    return f"{rate} (without compiling)"
  return rate
