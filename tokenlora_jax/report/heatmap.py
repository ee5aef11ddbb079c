"""The contents of a gates' heat map, for every way to draw it.

Each token has the colour of its leading expert, the stronger the larger the
lead over the next expert. Experts also have letters, for colour-blind readers.

Axis letters: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any
import unicodedata

import numpy as np

from tokenlora_jax.report.trace import GateTrace

LEGEND = (
  "A token has the colour of the expert with the largest gate, the stronger the"
  " further it is ahead of the next; a letter stands where the lead changes."
  " The prompt has no colour."
)

# Invisible control characters, each replaced by its picture.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_PICTURES |= {127: 0x2421}
# Characters that reorder the characters after them.
_PICTURES |= dict.fromkeys(
  [*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�"
)


@dataclasses.dataclass(frozen=True)
class HeatMap:
  """One text and the gates of its tokens.

  Attributes:
    prompt: the text's prompt.
    pieces: the N tokens as text; joined, they are the text.
    gates: float[N, E].
    experts: the experts' names.
    facts: further facts to show, such as {"router": "centroid"}.

  Raises:
    ValueError: the gates have another shape, or are not finite.

  Example:
    >>> found = HeatMap("1, 2", [", 3", "!"], np.eye(2), ["sums", "prose"])
    >>> found.leads.tolist(), found.strengths.tolist()
    ([0, 1], [1.0, 1.0])
  """

  prompt: str
  pieces: Sequence[str]
  gates: np.ndarray
  experts: Sequence[str]
  facts: Mapping[str, object] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    want = (len(self.pieces), len(self.experts))
    if np.shape(self.gates) != want or not all(want):
      raise ValueError(
        f"gates: {np.shape(self.gates)} is not allowed; want"
        f" {want[0]} tokens by {want[1]} experts, at least one of each"
      )
    if not np.isfinite(self.gates).all():
      raise ValueError("gates: not all of them are finite")

  @functools.cached_property
  def trace(self) -> GateTrace:
    """The gates' statistics, the same as in the terminal and in JSONL."""
    return GateTrace.of(self.gates)

  @functools.cached_property
  def strengths(self) -> np.ndarray:
    """float[N], the lead of the first expert over the next, from 0 to 1."""
    alone = len(self.experts) == 1
    ordered = np.sort(np.abs(self.gates), axis=1)
    return np.clip(ordered[:, -1] - (0 if alone else ordered[:, -2]), 0, 1)

  @property
  def leads(self) -> np.ndarray:
    """int[N], the expert that leads each token; -1 if all gates are 0."""
    return self.trace.leaders

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """bool[N], whether a lead starts here: the first one, or a switch."""
    led = np.flatnonzero(self.leads >= 0)[:1]
    return np.isin(np.arange(len(self.leads)), [*led, *self.trace.switches])

  @functools.cached_property
  def heights(self) -> np.ndarray:
    """float[N, E], the upper edge of each expert's part of the stacked area."""
    return np.cumsum(np.maximum(self.gates, 0), axis=1)

  @property
  def top(self) -> float:
    """The height of the stacked area: 1 if gates sum to 1 or 0."""
    return round(float(self.heights[:, -1].max()), 4) or 1.0

  def about(self) -> list[str]:
    """Returns two lines: the facts of the text, and the gates' means."""
    tokens, experts = np.shape(self.gates)
    facts = [f"{label} {value}" for label, value in self.facts.items()]
    facts += [
      _count(tokens, "token"),
      f"entropy {self.trace.entropy.mean():.2f} nats of at most"
      f" {np.log(experts):.2f}",
      f"the lead changes {_count(len(self.trace.switches), 'time')}",
    ]
    shares = [
      f"{letter(i)} {short(name, 32)} {share:.0%}"
      for i, (name, share) in enumerate(
        zip(self.experts, self.trace.shares, strict=True)
      )
    ]
    return [" · ".join(facts), f"mean gates: {', '.join(shares)}"]

  @property
  def edged(self) -> bool:
    """True if the stacked area has room for lines between experts."""
    return len(self.pieces) <= 250

  def letter_places(self, least: float) -> dict[int, tuple[float, float]]:
    """Returns the roomiest place for each expert's letter in the stacked area.

    Args:
      least: the least height of the expert's part there, as a share of `top`.

    Returns:
      {expert: (x, y)}, the middle of that place, from the first token's left
      and from the bottom, both between 0 and 1.
    """
    count = len(self.pieces)
    width = max(1, count // 16)
    places = {}
    for expert in range(len(self.experts)):
      high = self.heights[:, expert]
      low = high - np.maximum(self.gates[:, expert], 0)
      low, high = (
        np.convolve(edge, np.full(width, 1 / width), "valid") / self.top
        for edge in (low, high)
      )
      at = int(np.argmax(high - low))
      if high[at] - low[at] >= least:
        x = (at + width / 2) / count
        places[expert] = (x, float(low[at] + high[at]) / 2)
    return places


def gate_summary(gates: np.ndarray) -> dict[str, Any]:
  """Returns the mean entropy, the number of switches and the mean gates.

  Args:
    gates: float[N, E].

  Returns:
    From the `GateTrace` of these gates: `entropy`, the mean over tokens, in
    nats; `switches`, the number of changes of the lead; `shares`, float[E], the
    mean gates.

  Example:
    >>> found = gate_summary(np.array([[0.5, 0.5], [0.0, 1.0]]))
    >>> found["entropy"], found["switches"], found["shares"].tolist()
    (0.3466, 1, [0.25, 0.75])
  """
  trace = GateTrace.of(gates)
  return {
    "entropy": float(trace.entropy.mean()),
    "switches": len(trace.switches),
    "shares": trace.shares,
  }


def letter(expert: int) -> str:
  """Returns the letter of an expert.

  Args:
    expert: the expert's index.

  Example:
    >>> [letter(i) for i in (0, 25, 26, 52)]
    ['A', 'Z', 'AA', 'BA']
  """
  head = letter(expert // 26 - 1) if expert >= 26 else ""
  return head + chr(ord("A") + expert % 26)


def kind(piece: str) -> str:
  """Returns the kind of a token's text, "" for ordinary text.

  Args:
    piece: the text that one token adds.

  Returns:
    "blank" for white space, "joined" for accents on the character before,
    "empty" for invisible text.

  Example:
    >>> [kind(piece) for piece in (" a", "\\n ", "\\u0301", "", "\\u200b")]
    ['', 'blank', 'joined', 'empty', 'empty']
  """
  if piece.isspace():
    return "blank"
  if piece and all(unicodedata.category(x)[0] == "M" for x in piece):
    return "joined"
  shows = any(letter.isprintable() for letter in visible(piece))
  return "" if shows else "empty"


def indent(piece: str) -> int:
  """Returns the number of leading spaces; a letter is put after them.

  Args:
    piece: the text that one token adds.

  Example:
    >>> indent("  of"), indent("of"), indent("  ")
    (2, 0, 0)
  """
  return 0 if piece.isspace() else len(piece) - len(piece.lstrip(" "))


def visible(text: str) -> str:
  """Returns a text made visible and safe to put between other text.

  Control characters but tabs and line feeds become their pictures. Characters
  that reorder others, and halves of surrogate pairs, become U+FFFD.

  Args:
    text: any text.

  Example:
    >>> visible("a\\x1b[0m\\n")
    'a␛[0m\\n'
  """
  return re.sub(r"[\ud800-\udfff]", "\ufffd", text.translate(_PICTURES))


def ticks(count: int, most: int = 9) -> list[int]:
  """Returns round numbers as ticks of an axis from 1 to `count`.

  Args:
    count: the axis's last number.
    most: the most ticks.

  Example:
    >>> ticks(6), ticks(64)
    ([1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60])
  """
  steps = (m * 10**n for n in range(12) for m in (1, 2, 5))
  step = next(step for step in steps if count / step <= most)
  return list(range(step, count + 1, step))


def short(name: str, most: int) -> str:
  """Returns a name, cut to at most `most` characters.

  Args:
    name: any text.
    most: the most characters.

  Example:
    >>> short("codealpaca", 10), short("arc_challenge", 10)
    ('codealpaca', 'arc_chall…')
  """
  return name if len(name) <= most else name[: most - 1] + "…"


def _count(number: int, noun: str) -> str:
  return f"{number:,} {noun}{'' if number == 1 else 's'}"
