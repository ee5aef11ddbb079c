"""Files of rows in the tasks' own formats, and rows as people have them."""

import json

import pytest
from task_rows import ARC, CODE, GSM8K, ROWS, SQUAD, texts

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tasks import get_task


def test_reads_json_lines_with_line_numbers(tmp_path):
  path = tmp_path / "train.jsonl"
  path.write_text(json.dumps(GSM8K) + "\n\n" + json.dumps(GSM8K) + "\n")
  assert list(get_task("gsm8k").read(path)) == [("1", GSM8K), ("3", GSM8K)]
  path.write_text(json.dumps(ARC))
  assert list(get_task("arc_challenge").read(path)) == [("1", ARC)]


@pytest.mark.parametrize(
  "line", [b'{"question": "q",', b"[" * 100_000, b'"\xff"', b"\xff"]
)
def test_a_malformed_line_is_named_when_read(tmp_path, line):
  path = tmp_path / "train.jsonl"
  path.write_bytes(json.dumps(GSM8K).encode() + b"\n" + line + b"\n")
  task = get_task("gsm8k")
  (_, good), (place, bad) = task.read(path)
  assert (good, place) == (GSM8K, "2")
  with pytest.raises(InputError, match=r"^want a JSON object, got '"):
    task.prompt(bad)


def test_reads_a_json_list_with_indices(tmp_path):
  path = tmp_path / "train.json"
  path.write_text(json.dumps([CODE, CODE], indent=2))
  assert list(get_task("codealpaca").read(path)) == [
    ("[0]", CODE),
    ("[1]", CODE),
  ]
  path.write_text(json.dumps({"rows": [CODE]}))
  with pytest.raises(
    InputError, match=r"train\.json: want a JSON list of rows$"
  ):
    list(get_task("codealpaca").read(path))


@pytest.mark.parametrize("name", ["codealpaca", "squad"])
def test_a_malformed_document_is_named_by_its_line(tmp_path, name):
  path = tmp_path / "train.json"
  path.write_text('{"data":\n  [1,,]}')
  with pytest.raises(
    InputError, match=r"train\.json:2: malformed JSON at column 6: "
  ):
    list(get_task(name).read(path))
  path.write_bytes(b'["\xff"]')
  ((place, row),) = get_task(name).read(path)
  assert place == "[0]"
  with pytest.raises(InputError, match=r"^want a JSON object, got '\\udcff'$"):
    get_task(name).prompt(row)
  path.write_bytes(b"\xff\xfe[")
  with pytest.raises(InputError, match=r"train\.json: not JSON in UTF-8: "):
    list(get_task(name).read(path))


def nested(*questions):
  paragraph = {"context": SQUAD["context"], "qas": list(questions)}
  return {
    "version": "1.1",
    "data": [{"title": "Rome", "paragraphs": [paragraph]}],
  }


def test_reads_nested_squad_as_questions(tmp_path):
  path = tmp_path / "train.json"
  question = {
    "id": "s1",
    "question": SQUAD["question"],
    "answers": [
      {"text": "Rome", "answer_start": 0},
      {"text": "the city", "answer_start": 0},
    ],
  }
  broken = question | {"answers": [{"answer_start": 0}]}
  path.write_text(json.dumps(nested(question, "oops", broken)))
  task = get_task("squad")
  rows = dict(task.read(path))
  assert list(rows) == [f"data[0].paragraphs[0].qas[{i}]" for i in range(3)]
  first, second, third = rows.values()
  assert texts("squad", first) == texts("squad", SQUAD)
  assert first["answers"] == SQUAD["answers"]
  with pytest.raises(InputError, match="want a JSON object, got 'oops'"):
    task.prompt(second)
  with pytest.raises(
    InputError, match=r"field 'answers\.text\[0\]': want text"
  ):
    task.answer(third)


def test_squad_nesting_is_checked(tmp_path):
  path = tmp_path / "train.json"
  for document, message in (
    ([], r"train\.json: want a JSON object"),
    ({"date": []}, r"json: field 'data' is missing \(did you mean 'date'\?\)"),
    ({"data": [{}]}, r"json:data\[0\]: field 'paragraphs' is missing"),
    (
      {"data": [{"paragraphs": [{"qas": 1}]}]},
      r"json:data\[0\]\.paragraphs\[0\]: field 'qas': want a list, got 1",
    ),
  ):
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
      list(get_task("squad").read(path))


def test_an_alpaca_row_may_have_no_input():
  want = texts("codealpaca", CODE)
  assert texts("codealpaca", CODE | {"input": None}) == want
  bare = {k: v for k, v in CODE.items() if k != "input"}
  assert texts("codealpaca", bare) == want


@pytest.mark.parametrize("name", ["codealpaca", "squad"])
@pytest.mark.parametrize("count", [1, 3])
def test_flat_rows_are_read_as_lines_and_as_a_list(tmp_path, name, count):
  path = tmp_path / "train.json"
  rows = [ROWS[name]] * count
  path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
  assert [row for _, row in get_task(name).read(path)] == rows
  assert next(get_task(name).read(path))[0] == "2"
  path.write_text(json.dumps(rows, indent=1))
  assert [row for _, row in get_task(name).read(path)] == rows


def test_an_unanswerable_question_is_said_to_be_one():
  row = SQUAD | {"answers": {"text": [], "answer_start": []}}
  with pytest.raises(InputError, match=r"the question has no answer.*SQuAD v2"):
    texts("squad", row)


def test_a_squad_answer_starts_with_one_space():
  row = SQUAD | {"answers": {"text": [" the city"], "answer_start": [0]}}
  assert texts("squad", row)[1] == " the city"


def test_ai2s_own_arc_rows_are_the_hubs(tmp_path):
  choices = ARC["choices"]
  own = {
    "id": "q1",
    "question": {
      "stem": ARC["question"],
      "choices": [
        {"text": text, "label": label}
        for text, label in zip(*choices.values(), strict=True)
      ],
    },
    "answerKey": "B",
  }
  path = tmp_path / "train.jsonl"
  broken = own | {"question": {"stem": "Why?", "choices": [{"label": "A"}]}}
  lines = own, ARC, broken, own | {"question": {}}
  path.write_text("".join(json.dumps(row) + "\n" for row in lines))
  first, second, third, fourth = (
    row for _, row in get_task("arc_challenge").read(path)
  )
  assert first == second == ARC
  with pytest.raises(InputError, match=r"'choices.text\[0\]': want text"):
    texts("arc_challenge", third)
  with pytest.raises(InputError, match="field 'choices"):
    texts("arc_challenge", fourth)
