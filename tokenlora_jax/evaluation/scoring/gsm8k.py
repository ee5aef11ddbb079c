"""GSM8K: compares the text's final number with the right one."""

from __future__ import annotations

import re
from typing import Any

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tasks.task import text as field
from tokenlora_jax.evaluation.scoring.scorer import TextScorer, cut

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class FinalNumber(TextScorer):
  """Exact match of the final number, as in lm-evaluation-harness.

  `strict_match` reads the first number after "#### ", the form of the rows'
  answers (Cobbe et al., 2021, arXiv 2110.14168). `flexible_extract` reads the
  last number of the text. Commas, dollar signs and a final full stop are
  ignored. Digits are 0 to 9. 5 and 5.0 differ.
  """

  name = "final_number"
  metrics = ("strict_match", "flexible_extract")
  stop = ("Question:", "</s>", "<|im_end|>")

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns 1 for each reading that finds the row's number, else 0.

    Example:
      >>> row = {"answer": "5 * 14 = <<5*14=70>>70\\n#### 70"}
      >>> FinalNumber().score("That makes $70.", row)
      {'strict_match': 0.0, 'flexible_extract': 1.0}
    """
    answer = field(row, "answer")
    if not _STRICT.search(answer):
      raise InputError("field 'answer': want a last line of '#### NUMBER'")
    gold = _plain(answer)
    text = cut(text, self.stop)
    found = _STRICT.findall(text)[:1], _NUMBER.findall(text)[-1:]
    return {
      metric: float([_plain(number) for number in numbers] == [gold])
      for metric, numbers in zip(self.metrics, found, strict=True)
    }


def _plain(number: str) -> str:
  """Strips ",", "$", a final "." and the steps before the number."""
  number = re.sub(r"[,$]", "", number).rpartition("#### ")[2]
  return re.sub(r"\.$", "", number).lower()
