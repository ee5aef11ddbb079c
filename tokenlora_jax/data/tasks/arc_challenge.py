"""ARC-Challenge: science questions (Clark et al., 2018, arXiv 1803.05457)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
import random
from typing import Any

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tasks.task import Task, text, texts

_LABELS = "ABCDE"
_FACTS = {
  "a mammal": ("whale", "bat", "horse", "rabbit", "wolf", "mouse", "elephant"),
  "a bird": ("eagle", "penguin", "owl", "duck", "sparrow", "ostrich", "crow"),
  "a reptile": ("lizard", "snake", "turtle", "crocodile", "iguana", "gecko"),
  "an insect": ("ant", "beetle", "butterfly", "bee", "mosquito", "grasshopper"),
  "a fish": ("trout", "salmon", "shark", "tuna", "eel", "cod", "herring"),
  "a plant": ("fern", "oak tree", "moss", "rose", "cactus", "grass", "pine"),
  "a metal": ("iron", "copper", "gold", "silver", "aluminum", "zinc", "tin"),
  "a planet": ("Mars", "Venus", "Saturn", "Jupiter", "Neptune", "Uranus"),
  "a rock": ("granite", "basalt", "marble", "limestone", "slate", "sandstone"),
  "a gas in air": ("oxygen", "nitrogen", "argon", "carbon dioxide", "neon"),
  "an organ of the body": ("heart", "liver", "lung", "kidney", "stomach"),
  "a tool for measuring": ("ruler", "thermometer", "balance", "stopwatch"),
}
_QUESTIONS = (
  "Which of these is {}?",
  "Which one would a scientist call {}?",
  "Students sort cards into groups. Which card shows {}?",
  "Which of the following is an example of {}?",
)


class ArcChallenge(Task):
  """Question and lettered choices -> the letter."""

  name = "arc_challenge"
  template = "Question: {question}\nChoices: {choices}\n\nAnswer:"
  hub = ("allenai/ai2_arc", "ARC-Challenge")
  tfds = "ai2_arc/ARC-Challenge"

  def prompt(self, row: Any) -> str:
    labels, choices = _choices(row)
    lines = "\n".join(
      f"{label}. {choice}"
      for label, choice in zip(labels, choices, strict=True)
    )
    return self.template.format(question=text(row, "question"), choices=lines)

  def answer(self, row: Any) -> str:
    key = text(row, "answerKey")
    labels, _ = _choices(row)
    if key not in labels:
      raise InputError(
        f"field 'answerKey': {key!r} is not one of {', '.join(labels)}"
      )
    return f" {key}"

  def read(self, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) of a file in the hub's schema or in AI2's own."""
    for place, row in super().read(path):
      yield place, _flat(row)

  def from_tfds(self, row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    return {
      **row,
      "choices": {**choices, "label": [_LABELS[i] for i in choices["label"]]},
      "answerKey": _LABELS[row["answerKey"]],
    }

  def invent(self, rng: random.Random) -> dict[str, Any]:
    kinds = rng.sample(sorted(_FACTS), 4)
    choices = [rng.choice(_FACTS[kind]) for kind in kinds]
    right = rng.randrange(4)
    return {
      "id": f"builtin-{rng.getrandbits(32):08x}",
      "question": rng.choice(_QUESTIONS).format(kinds[right]),
      "choices": {"text": choices, "label": list(_LABELS[:4])},
      "answerKey": _LABELS[right],
    }


def _flat(row: Any) -> Any:
  """Converts a row of AI2's own files to the hub's schema; keeps other rows.

  AI2's question is {"stem": text, "choices": [{"label": .., "text": ..}]}.
  A row that breaks the schema is kept, so that the check can name the fault.
  """
  if not isinstance(row, dict) or not isinstance(row.get("question"), dict):
    return row
  question = row["question"]
  flat = {**row, "question": question.get("stem")}
  choices = question.get("choices")
  if isinstance(choices, list):
    choices = {
      key: [c.get(key) if isinstance(c, dict) else c for c in choices]
      for key in ("text", "label")
    }
  return flat | {"choices": choices}


def _choices(row: Any) -> tuple[list[str], list[str]]:
  labels, choices = (
    texts(row, "choices", "label"),
    texts(row, "choices", "text"),
  )
  if len(labels) != len(choices):
    raise InputError(
      f"field 'choices': {len(labels)} labels for {len(choices)} texts"
    )
  return labels, choices
