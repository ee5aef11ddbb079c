"""CodeAlpaca: scores the text's overlap with the gold answer by ROUGE-L."""

from __future__ import annotations

import functools
from typing import Any

from tokenlora_jax.data.tasks.task import text as field
from tokenlora_jax.evaluation.scoring.scorer import TextScorer


class RougeL(TextScorer):
  """ROUGE-L of the whole text (Lin, 2004), as the rouge-score package has it.

  With n the length of the longest common subsequence of p words of the text
  and g of the gold output, P = n / p, R = n / g and F = 2 P R / (P + R). Words
  are runs of a to z and 0 to 9 in lower case, not stemmed: so the signs of a
  program count for nothing, letters beyond ASCII part words, and a text without
  a word scores 0, even against another. There is no standard for this data set;
  report the loss an answer token beside it.
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
  # Here, since it imports nltk, which takes seconds.
  from rouge_score.rouge_scorer import RougeScorer

  return RougeScorer(["rougeL"], use_stemmer=False)
