"""HumanEval and MBPP: runs the text's program against the row's tests.

Scoring runs what the model wrote, so it is off unless `run_code` asks for it;
`sandbox.py` says what guards it, and what does not.
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

# A line that opens or closes a block of Markdown, with the language it names.
_FENCE = re.compile(r"^```[ \t]*(\w*).*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ProgramScorer(TextScorer):
  """Runs a text with its row's tests.

  Attributes:
    run_code: must be True: that what a model wrote may be run here.
    limits: the most that a program may take.
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
    """Returns the program and its tests."""

  def score(self, text: str, row: Any) -> dict[str, float]:
    """Returns 1 if the program passes all tests within its limits."""
    return {"pass@1": float(not run(self.program(text, row), self.limits))}


class HumanEvalTests(ProgramScorer):
  """The function that the text completes (Chen et al., 2021, 2107.03374)."""

  stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

  def program(self, text: str, row: Any) -> str:
    """Returns prompt, completion, tests and the call of them.

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
  """The program that the text is (Austin et al., 2021, arXiv 2108.07732).

  `test_setup_code`, which some rows have, runs between the two.
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

  That is the first block of Markdown, if one is opened: by a line of ``` that
  names a language, or one of an even number of such lines. A block that is not
  closed goes on to the end. Otherwise it is the text up to a line of ``` or the
  first of `stop`.

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
  """Returns the chance that one of k samples of a problem passes.

  The unbiased estimate 1 - C(n - c, k) / C(n, k), from c of n samples that
  passed (Chen et al., 2021, arXiv 2107.03374, eq. 1); its mean over problems is
  pass@k.

  Args:
    samples: n.
    passed: c, 0 to n.
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
