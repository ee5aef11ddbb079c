"""A row of each task, in the schema of its hub version."""

from tokenlora_jax.data.tasks import TASKS, get_task

GSM8K = {"question": "What is 2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
ARC = {
  "id": "q1",
  "question": "Which is a metal?",
  "choices": {"text": ["oak", "iron", "rain"], "label": ["A", "B", "C"]},
  "answerKey": "B",
}
CODE = {"instruction": "Add one.", "input": "", "output": "x + 1"}
SQUAD = {
  "id": "s1",
  "title": "Rome",
  "context": "Rome was not built in a day.",
  "question": "What was not built in a day?",
  "answers": {"text": ["Rome", "the city"], "answer_start": [0, 0]},
}
HUMANEVAL = {
  "task_id": "HumanEval/0",
  "prompt": 'def two():\n    """Return 2."""\n',
  "canonical_solution": "    return 2\n",
  "test": "def check(candidate):\n    assert candidate() == 2\n",
  "entry_point": "two",
}
MBPP = {
  "task_id": 11,
  "text": "Write a function to return 2.",
  "code": "def two():\r\n  return 2",
  "test_list": ["assert two() == 2", "assert two() > 1"],
}
ROWS = dict(zip(TASKS, (GSM8K, ARC, CODE, SQUAD), strict=True))


def texts(name, row):
  task = get_task(name)
  return task.prompt(row), task.answer(row)
