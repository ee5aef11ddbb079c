"""SQuAD v1.1: compares the text with the gold answers."""

from __future__ import annotations

from collections import Counter
import re
import string
from typing import Any

from tokenlora_jax.data.tasks.task import texts
from tokenlora_jax.evaluation.scoring.scorer import TextScorer, cut

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SpanOverlap(TextScorer):
  """Exact match and F1 of words (Rajpurkar et al., 2016, arXiv 1606.05250).

  F1 = 2 n / (p + g), 0 if n = 0

  n is the number of common words, p the number in the text and g in an answer;
  a repeated word counts as often as both have it. Both texts are normalised
  first: lower case, no ASCII punctuation, no "a", "an" or "the", one space
  between words. Each number is the best over the gold answers.

  Only the text's first line that is not empty counts.
  """

  name = "span_overlap"
  metrics = ("exact_match", "f1")
  stop = ("\n",)

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns the best exact match and the best F1.

    Example:
      >>> row = {"answers": {"text": ["the Eiffel Tower", "in Paris"]}}
      >>> SpanOverlap().score(" Tower of Eiffel.", row)
      {'exact_match': 0.0, 'f1': 0.8}
    """
    written = _words(cut(text, self.stop))
    golds = [_words(answer) for answer in texts(row, "answers", "text")]
    return {
      "exact_match": float(written in golds),
      "f1": max(_f1(written, gold) for gold in golds),
    }


def _words(text: str) -> list[str]:
  plain = text.lower().translate(_NO_PUNCTUATION)
  return _ARTICLES.sub(" ", plain).split()


def _f1(written: list[str], gold: list[str]) -> float:
  common = (Counter(written) & Counter(gold)).total()
  return 2 * common / (len(written) + len(gold)) if common else 0.0
