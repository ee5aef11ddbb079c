"""Scorers of texts, against lm-evaluation-harness and by hand."""

from __future__ import annotations

import functools
import re

from harness import harness_texts
from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer
import numpy as np
import pytest

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tasks import EVALUATION_TASKS, TASKS, get_task
from tokenlora_jax.evaluation.scoring import (
  ChoiceScorer,
  TextScorer,
  get_scorers,
)
from tokenlora_jax.evaluation.scoring.scorer import cut

# -----------------------------------------------------------------------------
# The registry.


def test_each_task_has_scorers_with_names_of_their_own():
  for task in (*TASKS, *EVALUATION_TASKS):
    scorers = get_scorers(task, run_code=True)
    assert all(scorer.name == name for name, scorer in scorers.items())
    metrics = [m for scorer in scorers.values() for m in scorer.metrics]
    assert metrics
    assert len(set(metrics)) == len(metrics)


def test_scores_are_what_metrics_say_and_a_gold_answer_gets_them_all():
  for name in TASKS:
    task = get_task(name)
    for row in task.generate(0, 20, "test"):
      for scorer in get_scorers(name).values():
        if isinstance(scorer, TextScorer):
          scores = scorer.score(task.answer(row), row)
        else:
          requests = scorer.requests(row)
          values = np.full(len(requests), -9.0)
          values[row["choices"]["label"].index(row["answerKey"])] = -1
          scores = scorer.score(values, row)
        assert scores == dict.fromkeys(scorer.metrics, 1.0)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["gsm8k", "squad", "codealpaca"])
def test_real_gold_answers_get_them_all(data_dir, name):
  task, (scorer,) = get_task(name), get_scorers(name).values()
  rows = task.read(data_dir / name / f"test.{task.suffix}")
  scored = 0
  for place, row in rows:
    if name != "codealpaca" or row["output"]:
      scores = scorer.score(task.answer(row), row)
      assert scores == dict.fromkeys(scorer.metrics, 1.0), place
      scored += 1
  assert scored > 250


def test_a_wrong_task_is_corrected():
  with pytest.raises(InputError, match=r"'sqaud' .*did you mean 'squad'\?"):
    get_scorers("sqaud")


@pytest.mark.parametrize("name", [*TASKS, *EVALUATION_TASKS])
def test_a_bad_row_is_named(name):
  for scorer in get_scorers(name, run_code=True).values():
    with pytest.raises(InputError, match=r"^field '.*' is missing$"):
      scorer.score([] if isinstance(scorer, ChoiceScorer) else "", {})


def test_a_gold_answer_without_a_number_is_named():
  (scorer,) = get_scorers("gsm8k").values()
  with pytest.raises(InputError, match="field 'answer': want a last line"):
    scorer.score("#### 1", {"answer": "so it is\n#### one"})


def test_cut_takes_the_first_stop_after_leading_white_space():
  assert cut("one\ntwo", ("three", "two", "\n")) == "one"
  assert cut(" \n\none\n\ntwo", ("\n\n",)) == " \n\none"
  assert cut("Question: 1", ("Question:",)) == ""
  assert cut(" \n ", ("\n",)) == " \n "
  assert cut("one", ()) == "one"


# -----------------------------------------------------------------------------
# GSM8K. By hand: text, gold number, strict, flexible.

GSM8K = [
  (" 5*14 = <<5*14=70>>70\n#### 70", "70", 1, 1),
  ("#### 70.", "70", 1, 1),
  ("#### 70", "70.", 1, 1),
  ("#### 70\n\n", "70", 1, 1),
  ("#### 70 dollars", "70", 1, 1),
  ("#### $70", "70", 0, 1),
  ("####70", "70", 0, 1),
  ("####  70", "70", 0, 1),
  ("### 70", "70", 0, 1),
  ("70 #### ", "70", 0, 1),
  ("The answer is 70", "70", 0, 1),
  ("The answer is 70, I think.", "70", 0, 1),
  ("Answer: **70**", "70", 0, 1),
  ("$70", "70", 0, 1),
  ("70$", "70", 0, 1),
  ("70%", "70", 0, 1),
  ("It is 70...", "70", 0, 0),
  ("= 70 ,.", "70", 0, 0),
  ("seventy", "70", 0, 0),
  ("", "70", 0, 0),
  (" \n ", "70", 0, 0),
  ("#### -70", "70", 0, 0),
  ("#### -70", "-70", 1, 1),
  ("#### - 70", "-70", 0, 0),
  ("x-70", "70", 0, 0),
  ("100-70", "70", 0, 0),
  # A Unicode minus is no sign, and digits beyond 0 to 9 are none.
  ("#### \u221270", "-70", 0, 0),
  ("#### \u221270", "70", 0, 1),
  ("#### \u0667\u0660", "70", 0, 0),
  ("#### \uff17\uff10", "70", 0, 0),
  ("#### 7\uff10", "7", 1, 1),
  ("#### 1,000", "1000", 1, 1),
  ("#### 1000", "1,000", 1, 1),
  ("#### 1 000", "1000", 0, 0),
  ("$1,000.00", "1000", 0, 0),
  ("#### 70.0", "70", 0, 0),
  ("#### .70", "70", 0, 0),
  ("#### 070", "70", 0, 0),
  ("#### 1e2", "100", 0, 0),
  ("#### 7\n#### 70", "70", 0, 1),
  ("#### 70\n#### 7", "70", 1, 0),
  ("70 apples and 5 pears", "70", 0, 0),
  ("70 apples and 5 pears", "5", 0, 1),
  ("#### 70\nQuestion: 6? #### 71", "70", 1, 1),
  ("Question: 6? #### 70", "70", 0, 0),
  ("#### 70</s>8", "70", 1, 1),
  ("#### 70<|im_end|>\n8", "70", 1, 1),
]


@pytest.mark.parametrize(("text", "gold", "strict", "flexible"), GSM8K)
def test_gsm8k_is_the_harness(text, gold, strict, flexible):
  row = {"question": "5 x 14?", "answer": f"5*14=<<5*14=70>>70\n#### {gold}"}
  (scorer,) = get_scorers("gsm8k").values()
  scores = scorer.score(text, row)
  assert scores == {"strict_match": strict, "flexible_extract": flexible}
  theirs = harness_texts("gsm8k", text, row)
  assert theirs == {"strict-match": strict, "flexible-extract": flexible}


# -----------------------------------------------------------------------------
# SQuAD. By hand: text, gold answers, exact match, F1.

SQUAD = [
  ("Eiffel Tower", ["Eiffel Tower"], 1, 1),
  (" the eiffel tower.", ["Eiffel Tower"], 1, 1),
  ("Eiffel Tower", ["The Eiffel Tower!"], 1, 1),
  ("Eiffel-Tower", ["Eiffel Tower"], 0, 0),
  ("Tower Eiffel", ["Eiffel Tower"], 0, 1),
  ("Tower of Eiffel", ["Eiffel Tower"], 0, 4 / 5),
  ("Eiffel", ["Eiffel Tower"], 0, 2 / 3),
  ("the Eiffel Tower in Paris", ["Eiffel Tower"], 0, 2 / 3),
  ("Eiffel  \t Tower", ["Eiffel Tower"], 1, 1),
  ("Eiffel Tower\nIt is in Paris.", ["Eiffel Tower"], 1, 1),
  ("Eiffel Tower\n\nQuestion: Who?", ["Eiffel Tower"], 1, 1),
  ("", ["Eiffel Tower"], 0, 0),
  ("  ", ["Eiffel Tower"], 0, 0),
  ("the", ["Eiffel Tower"], 0, 0),
  # Nothing is left of both: equal, but without a word in common.
  ("the", ["a"], 1, 0),
  ("...", ["An"], 1, 0),
  ("", ["!"], 1, 0),
  ("Paris", ["London", "Paris"], 1, 1),
  ("in Paris", ["London", "Paris", "in the city of Paris"], 0, 2 / 3),
  ("in Paris", ["London", "in big Paris"], 0, 4 / 5),
  ("Rome", ["London", "Paris"], 0, 0),
  ("a a a", ["a"], 1, 0),
  ("ha ha ha", ["ha ha"], 0, 4 / 5),
  ("ha", ["ha ha ha"], 0, 1 / 2),
  ("theatre", ["the atre"], 0, 0),
  ("another", ["other"], 0, 0),
  ("a.m.", ["am"], 1, 1),
  ("U.S.A.", ["USA"], 1, 1),
  ("A.", ["a grade"], 0, 0),
  ("$1,000", ["1000"], 1, 1),
  ("1,000.50", ["1000.50"], 1, 1),
  ("10\u201320", ["1020"], 0, 0),  # a dash beyond ASCII stays
  ("10-20", ["1020"], 1, 1),
  ("“Paris”", ["Paris"], 0, 0),  # as do quotes
  ("'Paris'", ["Paris"], 1, 1),
  ("the queen's", ["Queens"], 1, 1),
  ("CAFÉ", ["café"], 1, 1),
  ("cafe\u0301", ["café"], 0, 0),
  ("Straße", ["strasse"], 0, 0),
  ("Eiffel\u00a0Tower", ["Eiffel Tower"], 1, 1),
  ("The The", ["the band The The"], 0, 0),
  ("band", ["the band The The"], 1, 1),
]


@pytest.mark.parametrize(("text", "golds", "exact", "f1"), SQUAD)
def test_squad_is_the_official_script(text, golds, exact, f1):
  (scorer,) = get_scorers("squad").values()
  scores = scorer.score(text, {"answers": {"text": golds}})
  assert scores == {"exact_match": exact, "f1": pytest.approx(f1)}
  # Of the harness, which has the script's own functions for one gold answer.
  line = text.strip().split("\n")[0]
  equal = [normalize_answer(line) == normalize_answer(g) for g in golds]
  assert scores == {
    "exact_match": max(equal),
    "f1": pytest.approx(max(f1_abstractive([line], [g]) for g in golds)),
  }


# -----------------------------------------------------------------------------
# CodeAlpaca. By hand: text, gold output, ROUGE-L.

ROUGE = [
  ("return x + y", "return x + y", 1),
  ("return x - y", "return x * y", 1),  # signs are no words
  ("RETURN X", "return x", 1),
  (" return\n\tx ", "return x", 1),
  ("", "return x", 0),
  (" \n", "return x", 0),
  ("+-*/", "return x", 0),
  ("+-*/", "+-*/", 0),  # equal, but without a word
  ("日本語", "日本語", 0),
  ("日本語 x", "x", 1),
  ("café", "caf", 1),
  ("naïve", "na ve", 1),
  ("naïve", "naive", 0),
  ("x1", "x 1", 0),
  ("x_1", "x 1", 1),
  ("a b c d", "a c b d", 3 / 4),
  ("d c b a", "a b c d", 1 / 4),
  ("a b", "a b c d", 2 / 3),
  ("a b c d", "a b", 2 / 3),
  ("a a a a", "a", 2 / 5),
  ("a", "a a a a", 2 / 5),
  ("a x b y c z", "a b c", 2 / 3),
  ("x y z", "a b c", 0),
  ("running", "run", 0),  # not stemmed
  ("print('a, b')", 'print("a, b")', 1),
  ("f(x)=x**2", "f x x 2", 1),
  ("1,000", "1 000", 1),
  ("1,000", "1000", 0),
  ("\uff13", "3", 0),  # a digit beyond ASCII
  ("\u212a", "k", 1),  # the Kelvin sign is a k in lower case
  ("İx", "i x", 1),  # a dotted I is an i and a mark
  ("```python\nx = 1\n```", "x = 1", 4 / 5),
  ("a\x00b", "a b", 1),
  ("\ud800x", "x", 1),
  ("a b c a b c", "a b c", 2 / 3),
  ("for i in range(3): print(i)", "for j in range(3): print(j)", 5 / 7),
]


def lcs(first: tuple[str, ...], second: tuple[str, ...]) -> int:
  """The longest common subsequence, from its definition."""

  @functools.cache
  def best(i: int, j: int) -> int:
    if i == len(first) or j == len(second):
      return 0
    both = first[i] == second[j] and 1 + best(i + 1, j + 1)
    return max(both, best(i + 1, j), best(i, j + 1))

  return best(0, 0)


@pytest.mark.parametrize(("text", "output", "rouge"), ROUGE)
def test_rouge_is_its_definition(text, output, rouge):
  (scorer,) = get_scorers("codealpaca").values()
  score = scorer.score(text, {"output": output})["rouge_l"]
  assert score == pytest.approx(rouge)
  words = [tuple(re.findall("[a-z0-9]+", t.lower())) for t in (text, output)]
  total = sum(map(len, words))
  assert score == pytest.approx(2 * lcs(*words) / total if total else 0)
