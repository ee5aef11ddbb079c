"""ARC-Challenge: scores choices by likelihood, and generated letters."""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from tokenlora_jax.data.tasks import get_task
from tokenlora_jax.data.tasks.task import text as field
from tokenlora_jax.data.tasks.task import texts
from tokenlora_jax.evaluation.scoring.scorer import (
  ChoiceScorer,
  LogLikelihoods,
  Request,
  TextScorer,
  check_log_likelihoods,
  cut,
)

_TASK = get_task("arc_challenge")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ChoiceTexts(ChoiceScorer):
  """Picks the choice whose text is likeliest after the question alone.

  As in lm-evaluation-harness's arc_challenge: l_c is the log-likelihood of " "
  and the text of choice c after "Question: ...\\nAnswer:". `acc` picks the
  largest l_c, `acc_norm` the largest l_c / (characters of the text), and both
  the first of equals.
  """

  name = "choice_texts"
  metrics = ("acc", "acc_norm")

  def requests(self, row: Any) -> list[Request]:
    """Returns the question with each choice's text.

    Example:
      >>> row = {"question": "Which is a metal?", "answerKey": "B"}
      >>> row |= {"choices": {"text": ["oak", "iron"], "label": ["A", "B"]}}
      >>> tuple(ChoiceTexts().requests(row)[1])
      ('Question: Which is a metal?\\nAnswer:', ' iron')
    """
    context = f"Question: {field(row, 'question')}\nAnswer:"
    return [
      Request(context, f" {text}") for text in texts(row, "choices", "text")
    ]

  def score(
    self, log_likelihoods: LogLikelihoods, row: Any
  ) -> dict[str, float]:
    """Returns 1 if the likeliest text is the right choice's, else 0.

    Example:
      >>> row = {"question": "Which is a metal?", "answerKey": "B"}
      >>> row |= {"choices": {"text": ["oak", "iron"], "label": ["A", "B"]}}
      >>> ChoiceTexts().score([-6.0, -7.0], row)
      {'acc': 0.0, 'acc_norm': 1.0}
    """
    gold, choices = _gold(row), texts(row, "choices", "text")
    values = check_log_likelihoods(log_likelihoods, len(choices))
    normed = values / [len(text) for text in choices]
    return {
      "acc": float(np.argmax(values) == gold),
      "acc_norm": float(np.argmax(normed) == gold),
    }


class ChoiceLetters(ChoiceScorer):
  """Picks the choice whose letter is likeliest after the task's prompt.

  The prompt lists the choices. A label is a letter, or a number in some rows.
  """

  name = "choice_letters"
  metrics = ("letter_acc",)

  def requests(self, row: Any) -> list[Request]:
    """Returns the task's prompt with each choice's label.

    Example:
      >>> row = {"question": "Which is a metal?", "answerKey": "B"}
      >>> row |= {"choices": {"text": ["oak", "iron"], "label": ["A", "B"]}}
      >>> [request.continuation for request in ChoiceLetters().requests(row)]
      [' A', ' B']
    """
    context = _TASK.prompt(row)
    return [Request(context, f" {label}") for label in _labels(row)]

  def score(
    self, log_likelihoods: LogLikelihoods, row: Any
  ) -> dict[str, float]:
    """Returns 1 if the likeliest letter is the right choice's, else 0.

    Example:
      >>> row = {"question": "Which is a metal?", "answerKey": "B"}
      >>> row |= {"choices": {"text": ["oak", "iron"], "label": ["A", "B"]}}
      >>> ChoiceLetters().score([-3.0, -1.0], row)
      {'letter_acc': 1.0}
    """
    gold = _gold(row)
    values = check_log_likelihoods(log_likelihoods, len(_labels(row)))
    return {"letter_acc": float(np.argmax(values) == gold)}


class WrittenLetter(TextScorer):
  """Compares the letter generated after the task's prompt with the right one.

  As in lm-evaluation-harness's arc_challenge_chat: the text up to a full stop
  or an empty line must be the letter, in either case, with or without other
  punctuation. Unlike there, an empty line before the letter is ignored.
  """

  name = "written_letter"
  metrics = ("written_letter_acc",)
  stop = ("\n\n", ".")

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns 1 if the text is the right choice's label, else 0.

    Example:
      >>> row = {"question": "Which is a metal?", "answerKey": "B"}
      >>> row |= {"choices": {"text": ["oak", "iron"], "label": ["A", "B"]}}
      >>> WrittenLetter().score(" (b). Iron is one.", row)
      {'written_letter_acc': 1.0}
    """
    gold = _labels(row)[_gold(row)]
    right = _plain(cut(text, self.stop)) == _plain(gold)
    return {"written_letter_acc": float(right)}


def _plain(letter: str) -> str:
  return letter.strip().lower().translate(_NO_PUNCTUATION)


def _labels(row: Any) -> list[str]:
  return texts(row, "choices", "label")


def _gold(row: Any) -> int:
  """Returns the index of the right choice; checks the row."""
  return _labels(row).index(_TASK.answer(row)[1:])
