"""ARC-Challenge's scorers, against lm-evaluation-harness and by hand."""

from __future__ import annotations

import itertools

from harness import harness_task, harness_texts
import numpy as np
import pytest

from tokenlora_jax.data.tasks import get_task
from tokenlora_jax.evaluation.scoring import get_scorers


def arc(texts: list[str], key: str, labels: str = "ABCDE") -> dict:
  choices = {"text": texts, "label": list(labels[: len(texts)])}
  return {
    "id": "q",
    "question": " Which is a\nmetal?",
    "choices": choices,
    "answerKey": key,
  }


THREE = arc(["oak", "iron", "rain water"], "B")
FOUR = arc(["a", "bb", "cccc", "dddddddd"], "C")
FIVE = arc(["tin", "tin ore", "the ore of tin", "ore", "no tin"], "E")
NUMBERED = arc(["oak", "iron", "rain", "wind"], "2", "1234")
# Characters count, not bytes: 1, 2, 4 of them.
UNICODE = arc(["é", "日本", "naïf"], "C")
SPACED = arc([" oak", "iron ", "x"], "C")
INF = float("inf")

# By hand: row, log-likelihoods, acc, acc_norm.
ARC = [
  (THREE, [-3.0, -2.0, -9.0], 1, 1),
  (THREE, [-2.0, -2.5, -9.0], 0, 1),
  (THREE, [-2.0, -2.5, -4.0], 0, 0),
  (THREE, [-1.5, -2.0, -90.0], 0, 0),  # -.5 both: the first of equals
  (THREE, [-9.0, -2.0, -2.0], 1, 0),
  (THREE, [-2.0, -2.0, -2.0], 0, 0),
  (THREE, [-9.0, -4.0, -4.0], 1, 0),
  (THREE, [-9.0, -4.0, -10.0], 1, 1),  # -1 both, the first of which is right
  (THREE, [0.0, 0.0, 0.0], 0, 0),
  (THREE, [-INF, -5.0, -INF], 1, 1),
  (THREE, [-INF, -INF, -INF], 0, 0),
  (THREE, [-1e300, -1e299, -1e300], 1, 1),
  (FOUR, [-1.0, -2.0, -4.0, -8.0], 0, 0),
  (FOUR, [-1.0, -2.0, -3.9, -8.0], 0, 1),
  (FOUR, [-1.0, -2.0, -0.5, -0.9], 1, 0),
  (FOUR, [-1.0, -2.0, -0.9, -2.0], 1, 1),
  (FOUR, [-4.0, -4.0, -4.0, -4.0], 0, 0),
  (FOUR, [-4.0, -4.0, -3.0, -6.0], 1, 1),
  (FOUR, [-4.0, -4.0, -3.0, -5.0], 1, 0),
  (FOUR, [-4.0, -4.0, -3.0, -3.0], 1, 0),
  (FIVE, [-9.0, -9.0, -9.0, -9.0, -1.0], 1, 1),
  (FIVE, [-1.0, -9.0, -9.0, -9.0, -1.0], 0, 1),
  (FIVE, [-9.0, -9.0, -2.0, -9.0, -1.0], 1, 0),
  (FIVE, [-1.0, -1.0, -1.0, -1.0, -1.0], 0, 0),
  (FIVE, [-3.0, -7.0, -14.0, -3.0, -6.0], 0, 0),
  (FIVE, [-3.0, -7.0, -14.0, -3.0, -5.9], 0, 1),
  (NUMBERED, [-3.0, -2.0, -2.0, -2.0], 1, 1),
  (NUMBERED, [-2.0, -2.0, -3.0, -3.0], 0, 1),
  (NUMBERED, [-3.0, -4.0, -4.0, -4.0], 0, 0),
  (UNICODE, [-2.0, -4.0, -8.0], 0, 0),
  (UNICODE, [-2.0, -4.0, -7.9], 0, 1),
  (UNICODE, [-9.0, -3.0, -2.0], 1, 1),
  (SPACED, [-4.0, -5.0, -1.0], 1, 0),
  (SPACED, [-4.4, -5.5, -1.0], 1, 1),
]


@pytest.mark.parametrize(("row", "values", "acc", "acc_norm"), ARC)
def test_arc_texts_are_the_harness(row, values, acc, acc_norm):
  scorer = get_scorers("arc_challenge")["choice_texts"]
  task = harness_task("arc_challenge", row)
  with np.errstate(invalid="ignore"):
    theirs = task.process_results(row, [(value, False) for value in values])
  assert scorer.score(values, row) == {"acc": acc, "acc_norm": acc_norm}
  assert theirs == {"acc": acc, "acc_norm": acc_norm}


@pytest.mark.realdata
def test_real_arc_rows_are_scored_as_the_harness_does(data_dir):
  scorers = get_scorers("arc_challenge")
  task, harness = get_task("arc_challenge"), harness_task("arc_challenge", FOUR)
  rng, right, sizes = np.random.default_rng(0), [], set()
  files = (data_dir / "arc_challenge" / f"{x}.jsonl" for x in ("train", "test"))
  for _, row in itertools.chain.from_iterable(map(task.read, files)):
    requests = scorers["choice_texts"].requests(row)
    values = -rng.exponential([len(r.continuation) for r in requests])
    scores = scorers["choice_texts"].score(values, row)
    assert scores == harness.process_results(row, [(v, 0) for v in values])
    written = scorers["written_letter"].score(task.answer(row), row)
    assert written == {"written_letter_acc": 1}
    right.append(list(scores.values()))
    sizes.add(len(values))
  assert len(right) == 1642
  assert sizes == {3, 4, 5}
  assert (np.mean(right, axis=0) > 0.1).all()


@pytest.mark.parametrize("row", [THREE, FOUR, FIVE, NUMBERED, UNICODE])
def test_arc_requests_are_the_harness(row):
  scorer = get_scorers("arc_challenge")["choice_texts"]
  task = harness_task("arc_challenge", row)
  theirs = task.construct_requests(row, task.doc_to_text(row))
  assert scorer.requests(row) == [request.args for request in theirs]
  assert scorer.requests(row)[0].context == (
    "Question:  Which is a\nmetal?\nAnswer:"
  )


@pytest.mark.parametrize("row", [THREE, FOUR, FIVE, NUMBERED])
def test_arc_letters_follow_the_prompt_that_adapters_learn(row):
  scorer = get_scorers("arc_challenge")["choice_letters"]
  task, labels = get_task("arc_challenge"), row["choices"]["label"]
  requests = scorer.requests(row)
  assert {request.context for request in requests} == {task.prompt(row)}
  assert [r.continuation for r in requests] == [f" {x}" for x in labels]
  for i, label in enumerate(labels):
    values = [-1.0 if j == i else -2.0 for j in range(len(labels))]
    right = label == row["answerKey"]
    assert scorer.score(values, row) == {"letter_acc": right}
  # The first of equals.
  assert scorer.score([-1.0] * len(labels), row) == {"letter_acc": 0}


@pytest.mark.parametrize("name", ["choice_texts", "choice_letters"])
@pytest.mark.parametrize("values", [[], [-1, -2], [-1, -2, float("nan")]])
def test_arc_wants_a_number_for_each_choice(name, values):
  scorer = get_scorers("arc_challenge")[name]
  with pytest.raises(ValueError, match="want 3 log-likelihoods, got"):
    scorer.score(values, THREE)


# By hand: text, and whether it is the letter B.
LETTERS = [
  *((text, 1) for text in (
    " B", "B", "b", "(B)", "B.", " B. iron", "B\n\nQuestion: 2", "**B**",
    '"B"', "B:", "B!", "[B]", "B?", "#B", "\tB\t", "\nB", "$B$", "B-", "'b'",
    " (b).  ", "B,", "B)\n\nC",
  )),
  *((text, 0) for text in (
    "", "  ", "A", "C", "2", "E", "BB", "B) iron", "B iron", "B\nC", ".B",
    "The answer is B", "iron", "( B )", "B ,", "B</s>", "\uff21", "\u0412", "\uff22", "ß",
  )),
]  # fmt: skip


@pytest.mark.parametrize(("text", "right"), LETTERS)
def test_arc_written_letter_is_the_harness(text, right):
  scorer = get_scorers("arc_challenge")["written_letter"]
  row = arc(["oak", "iron", "rain", "wind"], "B")
  assert scorer.score(text, row) == {"written_letter_acc": right}
  theirs = harness_texts("arc_challenge_chat", text, row)
  assert theirs == {"remove_whitespace": right}


def test_arc_written_letter_beyond_the_harness():
  scorer = get_scorers("arc_challenge")["written_letter"]
  # An empty line first, and labels that are numbers, which the harness renames.
  assert scorer.score("\n\nB", THREE) == {"written_letter_acc": 1}
  theirs = harness_texts("arc_challenge_chat", "\n\nB", THREE)
  assert theirs == {"remove_whitespace": 0}
  assert scorer.score(" 2", NUMBERED) == {"written_letter_acc": 1}
  assert scorer.score(" B", NUMBERED) == {"written_letter_acc": 0}
  assert scorer.score("E", FIVE) == {"written_letter_acc": 1}
  assert scorer.score("A", THREE) == {"written_letter_acc": 0}
