"""CodeAlpaca: instructions answered with code (Chaudhary, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
import random
from typing import Any, ClassVar

from tokenlora_jax.data.tasks.task import Task, text

# (description of the code, the code); a and b are numbers.
_OPERATIONS = (
  ("adds {a} and then multiplies by {b}", "(x + {a}) * {b}"),
  ("multiplies by {b} and then adds {a}", "x * {b} + {a}"),
  ("subtracts {a} and squares the result", "(x - {a}) ** 2"),
  ("divides by {b} and drops the fraction", "x // {b}"),
  ("gives the remainder after division by {a}", "x % {a}"),
  ("keeps values between {b} and {a}", "min(max(x, {b}), {a})"),
  ("tells whether a number is above {a}", "x > {a}"),
  ("tells whether a number is a multiple of {b}", "x % {b} == 0"),
)
_FILTERS = (
  ("the numbers above {a}", "x > {a}"),
  ("the numbers below {a}", "x < {a}"),
  ("the multiples of {b}", "x % {b} == 0"),
  ("all numbers except {a}", "x != {a}"),
)
_REQUESTS = (
  "Write a Python function that {}.",
  "Create a Python function which {}.",
  "Give me a function in Python that {}.",
)


class CodeAlpaca(Task):
  """Instruction and perhaps an input -> code."""

  name = "codealpaca"
  template = "{instruction}\nInput: {input}\n\nAnswer:"
  suffix = "json"
  hub = ("sahil2801/CodeAlpaca-20k",)
  # The hub has one split: its last rows are held out.
  splits: ClassVar[Mapping[str, str]] = {
    "train": "train[:-2000]",
    "test": "train[-2000:]",
  }

  def prompt(self, row: Any) -> str:
    # A row without an input has "" or null there, or lacks the field.
    has_input = isinstance(row, dict) and row.get("input") is not None
    given = text(row, "input", empty=True) if has_input else ""
    template = self.template
    if not given.strip():
      template = template.replace("\nInput: {input}", "")
    return template.format(instruction=text(row, "instruction"), input=given)

  def answer(self, row: Any) -> str:
    return f" {text(row, 'output')}"

  def invent(self, rng: random.Random) -> dict[str, Any]:
    numbers = {"a": rng.randint(10, 99), "b": rng.randint(2, 9)}
    if rng.random() < 0.5:
      words, code = rng.choice(_OPERATIONS)
      instruction = rng.choice(_REQUESTS).format(words)
      given, output = "", f"solve = lambda x: {code}"
    else:
      words, code = rng.choice(_FILTERS)
      instruction = f"Use Python to keep {words} in the list."
      given = str([rng.randint(2, 99) for _ in range(rng.randint(3, 5))])
      output = f"solve = [x for x in {given} if {code}]"
    return {
      "instruction": instruction.format(**numbers),
      "input": given,
      "output": output.format(**numbers),
    }
