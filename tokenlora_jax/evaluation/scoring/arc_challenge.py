"""ARC-Challenge: scores choices by likelihood, and written letters."""

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

  As lm-evaluation-harness's arc_challenge: with l_c the log-likelihood of " "
  and the text of choice c after "Question: ...\\nAnswer:", `acc` takes the
  largest l_c and `acc_norm` the largest l_c / (characters of the text). The
  first of equals is taken.
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
    """Returns 1 where the likeliest text is the right choice's.

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
  """Picks the choice by its letter's likelihood after the task's prompt.

  That prompt shows the choices, and the answer is a letter, or a number where a
  row's labels are numbers.
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
    """Returns 1 if the likeliest letter is the right choice's."""
    gold = _gold(row)
    values = check_log_likelihoods(log_likelihoods, len(_labels(row)))
    return {"letter_acc": float(np.argmax(values) == gold)}


class WrittenLetter(TextScorer):
  """Compares the letter generated after the task's prompt with the right one.

  As lm-evaluation-harness's arc_challenge_chat: the text up to a full stop or
  an empty line must be the letter, whatever its case and other punctuation.
  Other than there, an empty line before the letter is passed over.
  """

  name = "written_letter"
  metrics = ("written_letter_acc",)
  stop = ("\n\n", ".")

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns 1 if the text is the right choice's label.

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
  """Returns the right choice, and checks the row."""
  return _labels(row).index(_TASK.answer(row)[1:])
