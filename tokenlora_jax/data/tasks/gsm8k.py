"""GSM8K: grade-school word problems (Cobbe et al., 2021, arXiv 2110.14168)."""

from __future__ import annotations

import random
from typing import Any

from tokenlora_jax.data.tasks.task import Task, text

_NAMES = (
  "Ada", "Ben", "Cleo", "Dario", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jun",
  "Kofi", "Lena", "Mila", "Nils", "Omar", "Pia", "Rosa", "Sami", "Tess", "Yuki",
)  # fmt: skip
_THINGS = (
  "apples", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs",
  "flowers", "lemons", "marbles", "nuts", "pears", "pencils", "shells",
  "stamps", "stickers", "stones", "tickets", "toys",
)  # fmt: skip


class Gsm8k(Task):
  """Question -> steps with <<a+b=c>> annotations -> "#### n".

  Example:
    >>> Gsm8k().prompt({"question": "What is 2 + 2?"})
    'Question: What is 2 + 2?\\n\\nAnswer:'
  """

  name = "gsm8k"
  template = "Question: {question}\n\nAnswer:"
  hub = ("openai/gsm8k", "main")
  tfds = "gsm8k"

  def prompt(self, row: Any) -> str:
    return self.template.format(question=text(row, "question"))

  def answer(self, row: Any) -> str:
    return f" {text(row, 'answer')}"

  def invent(self, rng: random.Random) -> dict[str, Any]:
    name, other = rng.sample(_NAMES, 2)
    things = rng.choice(_THINGS)
    a, b, c = rng.randint(11, 60), rng.randint(3, 10), rng.randint(2, 9)
    question, *steps = rng.choice(
      (
        (
          f"{name} has {a} {things} and finds {b} more. How many {things} "
          f"does {name} have now?",
          (a, "+", b),
        ),
        (
          f"{name} has {a} {things} and gives {b} of them to {other}. How many "
          f"{things} does {name} keep?",
          (a, "-", b),
        ),
        (
          f"{name} fills {b} bags with {c} {things} each. How many {things} "
          f"are in the bags?",
          (b, "*", c),
        ),
        (
          f"{name} has {a} {things}. {other} has {b} more than {name}. How "
          f"many {things} do they have together?",
          (a, "+", b),
          (a, "+", a + b),
        ),
        (
          f"{name} buys {b} boxes of {c} {things} and already had {a}. How "
          f"many {things} does {name} have now?",
          (b, "*", c),
          (a, "+", b * c),
        ),
        (
          f"{name} packs {b} boxes of {c} {things}, then loses {b - 1} "
          f"{things}. How many {things} are left?",
          (b, "*", c),
          (b * c, "-", b - 1),
        ),
      )
    )
    lines, result = [], 0
    for left, sign, right in steps:
      result = {"+": left + right, "-": left - right, "*": left * right}[sign]
      step = f"{left}{sign}{right}"
      lines.append(f"{step} = <<{step}={result}>>{result} {things}")
    answer = "\n".join([*lines, f"#### {result}"])
    return {"question": question, "answer": answer}
