"""Scorers of each task, which turn a model's answers into named numbers."""

from __future__ import annotations

from tokenlora_jax.config import check_choice
from tokenlora_jax.evaluation.scoring.arc_challenge import (
  ChoiceLetters,
  ChoiceTexts,
  WrittenLetter,
)
from tokenlora_jax.evaluation.scoring.code import (
  HumanEvalTests,
  MbppTests,
  pass_at_k,
)
from tokenlora_jax.evaluation.scoring.codealpaca import RougeL
from tokenlora_jax.evaluation.scoring.gsm8k import FinalNumber
from tokenlora_jax.evaluation.scoring.sandbox import Limits
from tokenlora_jax.evaluation.scoring.scorer import (
  ChoiceScorer,
  Request,
  Scorer,
  TextScorer,
)
from tokenlora_jax.evaluation.scoring.squad import SpanOverlap

__all__ = [
  "ChoiceScorer",
  "Limits",
  "Request",
  "Scorer",
  "TextScorer",
  "get_scorers",
  "pass_at_k",
]

_SCORERS: dict[str, tuple[type[Scorer], ...]] = {
  "gsm8k": (FinalNumber,),
  "arc_challenge": (ChoiceTexts, ChoiceLetters, WrittenLetter),
  "codealpaca": (RougeL,),
  "squad": (SpanOverlap,),
}
_PROGRAM_SCORERS = {"humaneval": HumanEvalTests, "mbpp": MbppTests}


def get_scorers(task: str, run_code: bool = False) -> dict[str, Scorer]:
  """Returns a task's scorers, by name.

  Args:
    task: a name of `tasks.TASKS` or `tasks.EVALUATION_TASKS`.
    run_code: whether code that the model wrote may be run here; `humaneval` and
      `mbpp` need it.

  Raises:
    InputError: there is no such task, or it needs `run_code`.

  Example:
    >>> list(get_scorers("arc_challenge"))
    ['choice_texts', 'choice_letters', 'written_letter']
    >>> get_scorers("squad")["span_overlap"].metrics
    ('exact_match', 'f1')
  """
  check_choice("task", task, (*_SCORERS, *_PROGRAM_SCORERS))
  if task in _PROGRAM_SCORERS:
    scorers = [_PROGRAM_SCORERS[task](run_code)]
  else:
    scorers = [scorer() for scorer in _SCORERS[task]]
  return {scorer.name: scorer for scorer in scorers}
