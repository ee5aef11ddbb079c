"""The interface of scorers, which turn an answer to one row into numbers.

A `TextScorer` reads a text that was generated after the task's prompt. A
`ChoiceScorer` lists continuations, and compares their log-likelihoods. Neither
calls a model.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
import numpy as np

# Log-likelihoods of continuations, nats.
LogLikelihoods = Sequence[float] | Float[np.ndarray, " choices"]


class Request(NamedTuple):
  """A requested log-likelihood: log p(continuation | context).

  Attributes:
    context: the text before the continuation.
    continuation: the scored text; starts with a space.
  """

  context: str
  continuation: str


class TextScorer(abc.ABC):
  """Scores a generated text.

  Attributes:
    name: unique among its task's scorers.
    metrics: names of its numbers, each from 0 to 1, more is better; a task's
      scorers share no name.
    stop: strings at which `cut` ends the text, since a model that was not
      trained on the prompt continues. Generation may end there too.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]
  stop: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns one number for each of `metrics`.

    Args:
      text: the generated text after the task's prompt, uncut, without special
        tokens.
      row: the gold row, in its task's schema.

    Raises:
      InputError: the row breaks its schema; names the field.
    """


class ChoiceScorer(abc.ABC):
  """Scores the log-likelihoods of a row's choices.

  Attributes:
    name: unique among its task's scorers.
    metrics: see `TextScorer`.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]

  @abc.abstractmethod
  def requests(self, row: Any) -> list[Request]:
    """Returns the log-likelihoods to compute for a row, one per choice."""

  @abc.abstractmethod
  def score(
    self, log_likelihoods: LogLikelihoods, row: Any
  ) -> dict[str, float]:
    """Returns one number for each of `metrics`.

    Args:
      log_likelihoods: [choices], nats, each the sum over its continuation's
        tokens, in the order of `requests`.
      row: the gold row, in its task's schema.

    Raises:
      InputError: the row breaks its schema; names the field.
      ValueError: there are not as many log-likelihoods as choices, or one is
        not a number.
    """


Scorer = TextScorer | ChoiceScorer


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns a text up to the first of some strings.

  Strings in the text's leading white space are ignored: a base that was not
  trained on the prompt may begin with an empty line.

  Args:
    text: the generated text.
    stop: the strings.

  Example:
    >>> cut("\\n4 apples\\nQuestion: What", ["Question:", "\\n"])
    '\\n4 apples'
  """
  start = len(text) - len(text.lstrip())
  ends = [end for s in stop if (end := text.find(s, start)) >= 0]
  return text[: min(ends, default=len(text))]


def check_log_likelihoods(
  values: LogLikelihoods, choices: int
) -> Float[np.ndarray, " {choices}"]:
  """Returns log-likelihoods as float64[choices].

  Args:
    values: the log-likelihoods, nats.
    choices: the number of choices.

  Raises:
    ValueError: there are more or fewer values, or one is not a number.

  Example:
    >>> check_log_likelihoods([-1.0, -2.0], 2).tolist()
    [-1.0, -2.0]
  """
  array = np.asarray(values, np.float64)
  if array.shape != (choices,) or np.isnan(array).any():
    raise ValueError(f"want {choices} log-likelihoods, got {list(values)}")
  return array
