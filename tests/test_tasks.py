"""The tasks: their texts, their schemas, their files, their own rows."""

from collections import Counter
import json
import re
import string

import pytest
from task_rows import ARC, CODE, GSM8K, HUMANEVAL, MBPP, ROWS, SQUAD, texts

from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.data.tasks import EVALUATION_TASKS, TASKS, get_task


def test_names_are_in_order_and_a_wrong_one_is_corrected():
  assert TASKS == ("gsm8k", "arc_challenge", "codealpaca", "squad")
  assert [get_task(name).name for name in TASKS] == list(TASKS)
  with pytest.raises(InputError, match=r"'gsm8' .*did you mean 'gsm8k'\?"):
    get_task("gsm8")


@pytest.mark.parametrize("name", TASKS)
def test_templates_name_the_rows_fields(name):
  fields = {f for _, f, *_ in string.Formatter().parse(get_task(name).template)}
  assert fields - {None} <= ROWS[name].keys()
  assert get_task(name).template.endswith("\n\nAnswer:")
  # What stands in braces in a row is text.
  question = {"question": "{answer} {0}"}
  if "question" in ROWS[name]:
    assert "{answer} {0}" in get_task(name).prompt(ROWS[name] | question)


def test_gsm8k_template():
  assert texts("gsm8k", GSM8K) == (
    "Question: What is 2+3?\n\nAnswer:",
    " 2+3=<<2+3=5>>5\n#### 5",
  )


def test_arc_template():
  assert texts("arc_challenge", ARC) == (
    "Question: Which is a metal?\nChoices: A. oak\nB. iron\nC. rain\n\nAnswer:",
    " B",
  )


def test_arc_template_keeps_numbered_labels():
  row = ARC | {
    "choices": {"text": ["oak", "iron"], "label": ["1", "2"]},
    "answerKey": "2",
  }
  assert texts("arc_challenge", row) == (
    "Question: Which is a metal?\nChoices: 1. oak\n2. iron\n\nAnswer:",
    " 2",
  )


def test_codealpaca_template_without_and_with_input():
  assert texts("codealpaca", CODE) == ("Add one.\n\nAnswer:", " x + 1")
  assert texts("codealpaca", CODE | {"input": "x = 3"}) == (
    "Add one.\nInput: x = 3\n\nAnswer:",
    " x + 1",
  )


def test_squad_template_takes_the_first_answer():
  assert texts("squad", SQUAD) == (
    "Context:\nRome was not built in a day.\n\n"
    "Question: What was not built in a day?\n\nAnswer:",
    " Rome",
  )


def test_humaneval_is_prompt_and_body():
  assert texts("humaneval", HUMANEVAL) == (
    'def two():\n    """Return 2."""\n',
    "    return 2\n",
  )


def test_mbpp_template():
  assert texts("mbpp", MBPP) == (
    "You are an expert Python programmer, and here is your task: Write a "
    "function to return 2. Your code should pass these tests:\n\n"
    "assert two() == 2\nassert two() > 1\n[BEGIN]\n",
    "def two():\n  return 2\n[DONE]",
  )


@pytest.mark.parametrize("name", EVALUATION_TASKS)
def test_what_is_only_evaluated_has_rows_to_test_and_none_to_train(name):
  rows = get_task(name).generate(0, 512, "test")
  assert set(rows[0]) == set({"humaneval": HUMANEVAL, "mbpp": MBPP}[name])
  assert len(load_rows(DataConfig(), name, "test")) == 512
  with pytest.raises(InputError, match=f"^data.tasks: {name} has no train"):
    load_rows(DataConfig(), name, "train")


@pytest.mark.parametrize(
  ("name", "row", "message"),
  [
    ("gsm8k", ["a"], "want a JSON object, got ['a']"),
    ("gsm8k", {"answer": "1"}, "field 'question' is missing"),
    (
      "gsm8k",
      {"question": "q", "anwser": "1"},
      "field 'answer' is missing (did you mean 'anwser'?)",
    ),
    ("gsm8k", GSM8K | {"answer": 5}, "field 'answer': want text, got 5"),
    ("gsm8k", GSM8K | {"question": " \n"}, "field 'question' is empty"),
    (
      "gsm8k",
      GSM8K | {"answer": ["x" * 99]},
      f"field 'answer': want text, got ['{'x' * 35}...",
    ),
    (
      "arc_challenge",
      ARC | {"choices": ["oak", "iron"]},
      "field 'choices': want a JSON object, got ['oak', 'iron']",
    ),
    (
      "arc_challenge",
      ARC | {"choices": {"text": ["oak"]}},
      "field 'choices.label' is missing",
    ),
    (
      "arc_challenge",
      ARC | {"choices": {"text": "oak", "label": ["A"]}},
      "field 'choices.text': want a list, got 'oak'",
    ),
    (
      "arc_challenge",
      ARC | {"choices": {"text": [], "label": []}},
      "field 'choices.label' is empty",
    ),
    (
      "arc_challenge",
      ARC | {"choices": {"text": ["oak", 7], "label": ["A", "B"]}},
      "field 'choices.text[1]': want text, got 7",
    ),
    (
      "arc_challenge",
      ARC | {"choices": {"text": ["oak"], "label": ["A", "B"]}},
      "field 'choices': 2 labels for 1 texts",
    ),
    (
      "arc_challenge",
      ARC | {"answerKey": "D"},
      "field 'answerKey': 'D' is not one of A, B, C",
    ),
    ("codealpaca", CODE | {"output": ""}, "field 'output' is empty"),
    (
      "codealpaca",
      CODE | {"input": 3},
      "field 'input': want text, got 3",
    ),
    (
      "squad",
      SQUAD | {"answers": {"text": []}},
      "field 'answers.text' is empty: the question has no answer, as many of"
      " SQuAD v2 have none",
    ),
    ("squad", SQUAD | {"context": ""}, "field 'context' is empty"),
    (
      "humaneval",
      HUMANEVAL | {"canonical_solution": None},
      "field 'canonical_solution': want text, got None",
    ),
    ("mbpp", MBPP | {"test_list": []}, "field 'test_list' is empty"),
  ],
)
def test_a_bad_field_is_named(name, row, message):
  with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
    texts(name, row)


@pytest.mark.parametrize("name", TASKS)
def test_built_in_rows_are_seeded_and_differ(name):
  task = get_task(name)
  rows = task.generate(seed=3, count=300)
  assert rows == task.generate(seed=3, count=300)
  assert rows[:50] == task.generate(seed=3, count=50)
  assert rows[:50] != task.generate(seed=4, count=50)
  assert len({task.prompt(row) for row in rows}) == 300


@pytest.mark.parametrize("name", TASKS)
def test_built_in_rows_are_thousands_and_held_out_under_any_seed(name):
  task = get_task(name)
  train = {task.prompt(row) for row in task.generate(0, 4096)}
  test = {task.prompt(row) for row in task.generate(1, 512, "test")}
  assert (len(train), len(test)) == (4096, 512)
  assert not train & test


def test_built_in_rows_have_the_fields_of_the_originals():
  for name, example in ROWS.items():
    assert set(get_task(name).generate(0, 1)[0]) == set(example)


def test_built_in_rows_are_short():
  for name in TASKS:
    task = get_task(name)
    for row in task.generate(0, 200):
      assert len(task.prompt(row) + task.answer(row)) < 260


def test_built_in_gsm8k_sums_are_right():
  for row in get_task("gsm8k").generate(0, 500):
    steps = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", row["answer"])
    assert steps
    for left, sign, right, *results in steps:
      x, y = int(left), int(right)
      right_result = {"+": x + y, "-": x - y, "*": x * y}[sign]
      assert [int(r) for r in results] == [right_result] * 2
      assert right_result >= 0
    assert row["answer"].endswith(f"\n#### {steps[-1][-1]}")
    # The first step only uses numbers of the question.
    assert {steps[0][0], steps[0][2]} <= set(
      re.findall(r"\d+", row["question"])
    )


def test_built_in_arc_has_one_right_letter_and_no_favourite():
  facts = {"iron": "a metal", "whale": "a mammal", "Mars": "a planet"}
  letters, seen = Counter(), set()
  for row in get_task("arc_challenge").generate(0, 2000):
    labels, choices = row["choices"]["label"], row["choices"]["text"]
    right = choices[labels.index(row["answerKey"])]
    letters[row["answerKey"]] += 1
    assert len(set(choices)) == 4
    for thing, kind in facts.items():
      if kind in row["question"] and thing in choices:
        assert right == thing
        seen.add(thing)
      assert (right != thing) or (kind in row["question"])
  assert seen == set(facts)
  assert set(letters) == set("ABCD")
  assert all(400 < count < 600 for count in letters.values())


def test_built_in_code_runs_and_does_what_it_says():
  seen = set()
  for row in get_task("codealpaca").generate(0, 400):
    scope = {"__builtins__": {"min": min, "max": max}}
    exec(row["output"], scope)
    numbers = [int(n) for n in re.findall(r"\d+", row["instruction"])]
    if row["input"]:
      given = json.loads(row["input"])
      (n,) = numbers
      for words, keep in (
        ("above", lambda x, n=n: x > n),
        ("below", lambda x, n=n: x < n),
        ("multiples of", lambda x, n=n: x % n == 0),
        ("except", lambda x, n=n: x != n),
      ):
        if words in row["instruction"]:
          seen.add(words)
          assert scope["solve"] == [x for x in given if keep(x)]
    elif "adds" in row["instruction"]:
      seen.add("adds")
      first, second = numbers
      expected = (
        (50 + first) * second
        if "then multiplies" in row["instruction"]
        else 50 * first + second
      )
      assert scope["solve"](50) == expected
  assert seen == {"above", "below", "multiples of", "except", "adds"}


def test_built_in_squad_answers_are_spans():
  for row in get_task("squad").generate(0, 500):
    (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
    assert row["context"][start : start + len(answer)] == answer
    assert row["context"].count(answer) == 1 or answer.isdigit()
