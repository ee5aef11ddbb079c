"""HumanEval: functions to complete (Chen et al., 2021, arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Mapping
import random
from typing import Any, ClassVar

from tokenlora_jax.data.tasks.task import Task, text

# (description of a function of x, its code, the function); a and b are numbers.
_FUNCTIONS = (
  ("{a} times x, plus {b}", "{a} * x + {b}", lambda x, a, b: a * x + b),
  ("x plus {b}, times {a}", "(x + {b}) * {a}", lambda x, a, b: (x + b) * a),
  ("the square of x minus {a}", "(x - {a}) ** 2", lambda x, a, b: (x - a) ** 2),
  ("x modulo {a}", "x % {a}", lambda x, a, b: x % a),
  ("the larger of x and {a}", "max(x, {a})", lambda x, a, b: max(x, a)),
  ("whether x is above {a}", "x > {a}", lambda x, a, b: x > a),
)


class HumanEval(Task):
  """Signature and docstring -> the body; scored by `test` and `entry_point`.

  The local file is the original HumanEval.jsonl under the name test.jsonl.
  """

  name = "humaneval"
  template = "{prompt}"
  hub = ("openai/openai_humaneval",)
  splits: ClassVar[Mapping[str, str]] = {"test": "test"}

  def prompt(self, row: Any) -> str:
    return self.template.format(prompt=text(row, "prompt"))

  def answer(self, row: Any) -> str:
    return text(row, "canonical_solution")

  def invent(self, rng: random.Random) -> dict[str, Any]:
    words, code, cases = invent_function(rng)
    (x, y), *hidden = cases
    checks = "".join(f"    assert candidate({x}) == {y}\n" for x, y in hidden)
    return {
      "task_id": f"builtin/{rng.getrandbits(32):08x}",
      "prompt": (
        f'def solve(x):\n    """Return {words}.\n\n    >>> solve({x})\n'
        f'    {y}\n    """\n'
      ),
      "canonical_solution": f"    return {code}\n",
      "test": f"def check(candidate):\n{checks}",
      "entry_point": "solve",
    }


def invent_function(
  rng: random.Random,
) -> tuple[str, str, list[tuple[int, int | bool]]]:
  """Returns a function's description, its code, and four (x, value) pairs.

  Args:
    rng: draws the function.
  """
  words, code, function = rng.choice(_FUNCTIONS)
  a, b = rng.randint(10, 999), rng.randint(2, 9)
  given = a + b, *rng.sample(range(3 * a), 3)
  cases = [(x, function(x, a, b)) for x in given]
  return words.format(a=a, b=b), code.format(a=a, b=b), cases
