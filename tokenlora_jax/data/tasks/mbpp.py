"""MBPP: short programs from a sentence (Austin et al., 2021, 2108.07732)."""

from __future__ import annotations

from collections.abc import Mapping
import random
from typing import Any, ClassVar

from tokenlora_jax.data.tasks.humaneval import invent_function
from tokenlora_jax.data.tasks.task import Task, text, texts


class Mbpp(Task):
  """Sentence and tests -> the program; scored by the tests in `test_list`.

  The local file has rows of the original mbpp.jsonl; the test set is task_id 11
  to 510. The paper puts three solved rows before the prompt; here the prompt
  stands alone.
  """

  name = "mbpp"
  template = (
    "You are an expert Python programmer, and here is your task: {text} Your "
    "code should pass these tests:\n\n{tests}\n[BEGIN]\n"
  )
  hub = ("google-research-datasets/mbpp", "full")
  splits: ClassVar[Mapping[str, str]] = {"test": "test"}

  def prompt(self, row: Any) -> str:
    tests = "\n".join(texts(row, "test_list"))
    return self.template.format(text=text(row, "text"), tests=tests)

  def answer(self, row: Any) -> str:
    # Lines of the original file end with CRLF.
    code = text(row, "code").replace("\r\n", "\n")
    return f"{code}\n[DONE]"

  def invent(self, rng: random.Random) -> dict[str, Any]:
    words, code, cases = invent_function(rng)
    return {
      "task_id": rng.getrandbits(31),
      "text": f"Write a function to find {words}.",
      "code": f"def solve(x):\r\n    return {code}",
      "test_list": [f"assert solve({x}) == {y}" for x, y in cases[:3]],
    }
