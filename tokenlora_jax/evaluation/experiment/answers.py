"""Generates each arm's answers and scores them with the task's scorers."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import numpy as np

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.examples import Example
from tokenlora_jax.data.tokens import Tokenizer, encode_pair
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.evaluation.evaluator import BATCH, Evaluator, Variant
from tokenlora_jax.evaluation.experiment.questions import Question
from tokenlora_jax.evaluation.scoring import (
  ChoiceScorer,
  TextScorer,
  get_scorers,
)
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters


class Judge:
  """Generates answers to questions, and scores them.

  Args:
    base: the Llama, in the list layout.
    adapters: the experts.
    tokenizer: the base's tokenizer.
    evaluator: computes the likelihoods of choices, for the same base and
    experts.
    decode: settings of decoding; an arm overrides refresh, rule and cache.
    run_code: whether programs that the model wrote may be run.
  """

  def __init__(
    self,
    base: Llama,
    adapters: Adapters,
    tokenizer: Tokenizer,
    evaluator: Evaluator,
    decode: DecodeConfig,
    run_code: bool = False,
  ):
    self._base = base
    self._adapters = adapters
    self._tokenizer = tokenizer
    self._evaluator = evaluator
    self._decode = decode
    self._run_code = run_code

  def check(self, task: str, questions: Sequence[Question]) -> None:
    """Checks that a task has scorers and that its answers fit the base.

    Args:
      task: the questions' task.
      questions: at least one.

    Raises:
      InputError: the task cannot be scored, or prompt and answer are too long.
    """
    get_scorers(task, self._run_code)
    longest = max(one.example.prompt_length for one in questions)
    new, room = self._decode.max_new_tokens, self._base.config.max_length
    if longest + new > room:
      raise InputError(
        f"decode.max-new-tokens: {new} after a prompt of {longest} tokens of"
        f" {task} is more than the base's {room} positions"
      )

  def judge(
    self, task: str, variant: Variant, questions: Sequence[Question]
  ) -> list[dict[str, Any]]:
    """Answers and scores questions.

    Args:
      task: the questions' task.
      variant: the way to mix.
      questions: any number; at most `BATCH` are decoded at once.

    Returns:
      One dict per question: `scores` {metric: number} and `score_seconds`; and,
      if the task's scorers read texts, `text`, `made` (tokens) and
      `made_seconds`.

    Raises:
      InputError: a row breaks its schema.
    """
    scorers = get_scorers(task, self._run_code).values()
    readers = [one for one in scorers if isinstance(one, TextScorer)]
    choosers = [one for one in scorers if isinstance(one, ChoiceScorer)]
    found: list[dict[str, Any]] = [{"scores": {}} for _ in questions]
    if readers:
      stops = _common_stops(readers)
      for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        said = self._texts(variant, part, stops)
        for one, text in zip(found[start:], said, strict=False):
          one |= text
    start_time = time.perf_counter()
    for scorer in choosers:
      told = self._likelihoods(scorer, variant, questions)
      for one, question, values in zip(found, questions, told, strict=True):
        one["scores"] |= _scored(scorer, values, task, question)
    for scorer in readers:
      for one, question in zip(found, questions, strict=True):
        one["scores"] |= _scored(scorer, one["text"], task, question)
    share = (time.perf_counter() - start_time) / len(questions)
    return [one | {"score_seconds": round(share, 6)} for one in found]

  def _texts(
    self, variant: Variant, questions: Sequence[Question], stops: Sequence[str]
  ) -> list[dict[str, Any]]:
    """Generates an answer to each question, at most `BATCH`."""
    start = time.perf_counter()
    prompts = [
      one.example.tokens[: one.example.prompt_length].tolist()
      for one in questions
    ]
    # A short batch is filled up, so that it needs no program of its own.
    prompts += prompts[-1:] * (BATCH - len(prompts))
    config = dataclasses.replace(
      self._decode,
      refresh_every=variant.refresh_every,
      rule=variant.rule,
      cache=variant.cache,
      stop=tuple(dict.fromkeys([*self._decode.stop, *stops])),
    )
    *_, out = Decoder(
      self._base,
      prompts,
      None if variant.router is None else self._adapters,
      variant.router,
      config,
      self._tokenizer,
    )
    share = (time.perf_counter() - start) / len(questions)
    return [
      {
        "text": out.texts[i],
        "made": int(out.lengths[i]),
        "made_seconds": round(share, 6),
      }
      for i in range(len(questions))
    ]

  def _likelihoods(
    self,
    scorer: ChoiceScorer,
    variant: Variant,
    questions: Sequence[Question],
  ) -> list[list[float]]:
    """Computes the log-likelihood of each choice of each question."""
    asked = [scorer.requests(one.fields) for one in questions]
    examples = []
    for request in (one for requests in asked for one in requests):
      before, after = encode_pair(*request, self._tokenizer)
      tokens = np.array([*before, *after], np.int32)
      examples.append(Example(tokens, np.ones(len(tokens)), len(before)))
    told = {
      one.place: -float(np.sum(one.losses, dtype=np.float64))
      for batch in self._evaluator.score(variant, examples)
      for one in batch
    }
    places = iter(range(len(examples)))
    return [[told[next(places)] for _ in requests] for requests in asked]


def _common_stops(readers: Sequence[TextScorer]) -> list[str]:
  """Returns the strings at which generation may stop with equal scores.

  All scorers cut at them. A scorer ignores a stop in a text's leading white
  space, so generation may not stop at one that begins with white space.
  """
  return [
    stop
    for stop in readers[0].stop
    if not stop[0].isspace() and all(stop in one.stop for one in readers)
  ]


def _scored(
  scorer: TextScorer | ChoiceScorer, said: Any, task: str, question: Question
) -> dict[str, float]:
  try:
    return scorer.score(said, question.fields)
  except InputError as error:
    raise InputError(f"{task} {question.name}: {error}") from None
