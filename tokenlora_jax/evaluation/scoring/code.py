"""HumanEval and MBPP: runs a generated program against the row's tests.

Scoring runs code that the model wrote, so it is off unless `run_code` is set.
`sandbox.py` lists what its guards prevent, and what they do not.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from typing import Any

from tokenlora_jax.config import check
from tokenlora_jax.data.tasks.task import text as field
from tokenlora_jax.data.tasks.task import texts
from tokenlora_jax.evaluation.scoring.sandbox import Limits, run
from tokenlora_jax.evaluation.scoring.scorer import TextScorer, cut

# A line that opens or closes a Markdown block, and the language it names.
_FENCE = re.compile(r"^```[ \t]*(\w*).*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ProgramScorer(TextScorer):
  """Runs a generated program with its row's tests.

  Attributes:
    run_code: must be True, which allows running code that the model wrote.
    limits: limits of the program's time, memory and files.
  """

  run_code: bool = False
  limits: Limits = dataclasses.field(default_factory=Limits)

  name = "tests"
  metrics = ("pass@1",)

  def __post_init__(self):
    check(
      self.run_code, "run_code", self.run_code,
      "True, to run here what a model wrote (see scoring/sandbox.py)",
    )  # fmt: skip

  @abc.abstractmethod
  def program(self, text: str, row: Any) -> str:
    """Returns the program followed by the row's tests.

    Args:
      text: the generated text.
      row: the gold row, in its task's schema.
    """

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns 1 if the program passes all tests within its limits, else 0."""
    return {"pass@1": float(not run(self.program(text, row), self.limits))}


class HumanEvalTests(ProgramScorer):
  """Tests the completed function (Chen et al., 2021, arXiv 2107.03374)."""

  stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

  def program(self, text: str, row: Any) -> str:
    """Returns prompt, completion, tests and the call of the tests.

    Example:
      >>> row = {"prompt": "def two():\\n", "entry_point": "two"}
      >>> row |= {"test": "def check(f):\\n  assert f() == 2"}
      >>> scorer = HumanEvalTests(run_code=True)
      >>> print(scorer.program("  return 2\\n\\nprint(two())", row))
      def two():
        return 2
      <BLANKLINE>
      def check(f):
        assert f() == 2
      check(two)
    """
    prompt, test = field(row, "prompt"), field(row, "test")
    call = f"check({field(row, 'entry_point')})"
    return "\n".join([prompt + code(text, self.stop), test, call])


class MbppTests(ProgramScorer):
  """Tests the whole text as a program (Austin et al., 2021, arXiv 2108.07732).

  Some rows have `test_setup_code`, which runs between program and tests.
  """

  stop = ("[DONE]",)

  def program(self, text: str, row: Any) -> str:
    """Returns program and tests.

    Example:
      >>> row = {"test_list": ["assert two() == 2"]}
      >>> scorer = MbppTests(run_code=True)
      >>> print(scorer.program("two = lambda: 2\\n[DONE] So", row))
      two = lambda: 2
      <BLANKLINE>
      assert two() == 2
    """
    setup = ""
    if "test_setup_code" in row:
      setup = field(row, "test_setup_code", empty=True)
    tests = texts(row, "test_list")
    return "\n".join([code(text, self.stop), *filter(None, [setup]), *tests])


def code(text: str, stop: tuple[str, ...]) -> str:
  """Returns the code in a text.

  If the text opens a Markdown block, the code is the first block. A line of ```
  opens one if it names a language, or if the number of such lines is even. A
  block that is not closed extends to the end. Otherwise the code is the text up
  to a line of ``` or the first string of `stop`.

  Args:
    text: the generated text.
    stop: strings that end the code.

  Example:
    >>> code("Sure!\\n```python\\nx = 1\\n```\\nThat is it.", ())
    'x = 1\\n'
    >>> code("    return 1\\n```\\nThat is it.", ())
    '    return 1'
  """
  fences = list(_FENCE.finditer(text))
  if fences and (fences[0][1] or len(fences) % 2 == 0):
    end = fences[1].start() if len(fences) > 1 else len(text)
    return text[fences[0].end() + 1 : end]
  return cut(text, (*stop, "\n```"))


def pass_at_k(samples: int, passed: int, k: int) -> float:
  """Estimates the probability that at least one of k samples passes.

  1 - C(n - c, k) / C(n, k), unbiased, if c of n samples passed (Chen et al.,
  2021, arXiv 2107.03374, eq. 1). Its mean over problems is pass@k.

  Args:
    samples: n, the samples of one problem.
    passed: c, those that passed, 0 to n.
    k: 1 to n.

  Raises:
    InputError: a number is out of its range.

  Example:
    >>> pass_at_k(samples=4, passed=2, k=2)
    0.8333
  """
  check(0 <= passed <= samples, "passed", passed, f"0 to {samples} samples")
  check(1 <= k <= samples, "k", k, f"1 to {samples} samples")
  return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
