"""CodeAlpaca: scores a text by ROUGE-L against the gold answer."""

from __future__ import annotations

import functools
from typing import Any

from tokenlora_jax.data.tasks.task import text as field
from tokenlora_jax.evaluation.scoring.scorer import TextScorer


class RougeL(TextScorer):
  """ROUGE-L of the whole text (Lin, 2004), as in the rouge-score package.

  P = n / p,  R = n / g,  F = 2 P R / (P + R)

  n is the length of the longest common subsequence of the text's p words and
  the gold output's g words. Words are runs of a to z and 0 to 9 in lower case,
  not stemmed. So a program's signs do not count, letters beyond ASCII split
  words, and a text without words scores 0, even against another one. This data
  set has no standard score; report the loss per answer token beside it.
  """

  name = "rouge_l"
  metrics = ("rouge_l",)

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns F, 0 to 1.

    Example:
      >>> RougeL().score("return x - y", {"output": "return x + y + z"})
      {'rouge_l': 0.857}
    """
    scores = _rouge().score(field(row, "output"), text)
    return {"rouge_l": float(scores["rougeL"].fmeasure)}


@functools.cache
def _rouge() -> Any:
  # Imported here, since it imports nltk, which takes seconds.
  from rouge_score.rouge_scorer import RougeScorer

  return RougeScorer(["rougeL"], use_stemmer=False)
