"""The interface of scorers: from a model's answer to one row to named numbers.

There are two kinds. A `TextScorer` reads a text that was generated after the
task's prompt. A `ChoiceScorer` compares how likely some continuations are: it
says which, and is given the log-likelihoods. Neither calls a model.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
import numpy as np

# Of the continuations, in nats.
LogLikelihoods = Sequence[float] | Float[np.ndarray, " choices"]


class Request(NamedTuple):
  """A log-likelihood to be asked of a model: log p(continuation | context).

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
    metrics: the names of the numbers it gives, each 0 to 1, more is better; a
      task's scorers share no name.
    stop: a text ends where `cut` finds one of these, since a model that was not
      trained on the prompt goes on. Generation may end there, too.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]
  stop: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns one number for each of `metrics`.

    Args:
      text: the generated text after the task's prompt, without special
        tokens; uncut.
      row: the gold row, in its task's schema.

    Raises:
      InputError: the row breaks its schema; names the field.
    """


class ChoiceScorer(abc.ABC):
  """Scores how likely a model finds each choice.

  Attributes:
    name: unique among its task's scorers.
    metrics: as a `TextScorer`'s.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]

  @abc.abstractmethod
  def requests(self, row: Any) -> list[Request]:
    """Returns what a model is to be asked about a row, one a choice."""

  @abc.abstractmethod
  def score(
    self, log_likelihoods: LogLikelihoods, row: Any
  ) -> dict[str, float]:
    """Returns one number for each of `metrics`.

    Args:
      log_likelihoods: [choices], in nats, summed over a continuation's tokens,
        in the order of `requests`.
      row: the gold row, in its task's schema.

    Raises:
      InputError: the row breaks its schema; names the field.
      ValueError: there are not as many log-likelihoods as choices, or one is
        not a number.
    """


Scorer = TextScorer | ChoiceScorer


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns a text up to the first of some strings.

  Those in the white space that a text begins with are passed over: a base that
  was not trained on the prompt may begin with an empty line.

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

  Raises:
    ValueError: see `ChoiceScorer.score`.
  """
  array = np.asarray(values, np.float64)
  if array.shape != (choices,) or np.isnan(array).any():
    raise ValueError(f"want {choices} log-likelihoods, got {list(values)}")
  return array
