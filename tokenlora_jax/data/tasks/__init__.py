"""The tasks by name, for training and for evaluation."""

from __future__ import annotations

from tokenlora_jax.config import check_choice
from tokenlora_jax.data.tasks.arc_challenge import ArcChallenge
from tokenlora_jax.data.tasks.codealpaca import CodeAlpaca
from tokenlora_jax.data.tasks.gsm8k import Gsm8k
from tokenlora_jax.data.tasks.humaneval import HumanEval
from tokenlora_jax.data.tasks.mbpp import Mbpp
from tokenlora_jax.data.tasks.squad import Squad
from tokenlora_jax.data.tasks.task import Task

_TRAINED = (Gsm8k(), ArcChallenge(), CodeAlpaca(), Squad())
_EVALUATED = (HumanEval(), Mbpp())
_REGISTRY = {task.name: task for task in (*_TRAINED, *_EVALUATED)}

# Tasks that train an expert each, and tasks for evaluation alone.
TASKS = tuple(task.name for task in _TRAINED)
EVALUATION_TASKS = tuple(task.name for task in _EVALUATED)


def get_task(name: str) -> Task:
  """Returns the task with a name.

  Args:
    name: one of `TASKS` or `EVALUATION_TASKS`.

  Raises:
    InputError: there is no such task; names the nearest.

  Example:
    >>> get_task("gsm8k").prompt({"question": "What is 2 + 2?"})
    'Question: What is 2 + 2?\\n\\nAnswer:'
  """
  check_choice("data.tasks", name, tuple(_REGISTRY))
  return _REGISTRY[name]
