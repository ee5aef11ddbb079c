"""What `infer.py evaluate` takes, apart from what evaluates."""

import dataclasses

from tokenlora_jax.config import Config, check


@dataclasses.dataclass(frozen=True)
class Evaluation(Config):
  """What `infer.py evaluate` takes besides the config.

  Attributes:
    bank: the folder that train.py wrote; WORKDIR/bank by default.
    same_base: go on with a bank whose base has another fingerprint, because it
      is this base in another form.
    tasks: whose held-out rows are scored; those of the config by default.
    rows: how many rows a task; 0 is data.eval-rows.
    variants: what is compared: `base`; `own`, the adapter of a row's own task
      (the oracle); `single`, each adapter on all tasks, or `adapter:NAME`;
      `uniform`; `sum`; and of each router `top1` (its best adapter alone),
      `prompt` (its gates at the prompt) and `token:K` (anew every K tokens).
    routers: by name, perhaps with settings of their own, as in
      `centroid:encoder=hidden,sharpen=8`; the config's by default.
    rules: what gates mean: exact, peft_linear, peft040, probabilities.
    caches: of `token:K`: reuse, recompute, remix.
    generate: answer the questions too, and have the answers scored: GSM8K's
      number, ARC's choice, SQuAD's words, CodeAlpaca's ROUGE-L. See --decode for
      how; --decode.max-new-tokens should hold an answer.
    run_code: that programs which the model wrote may be run (humaneval, mbpp).
    output: keep each row in this folder as it comes. The same command goes on
      where it stopped, and more tasks, variants, routers, rules or caches may be
      added later.
  """

  bank: str = ""
  same_base: bool = False
  tasks: tuple[str, ...] = ()
  rows: int = 0
  variants: tuple[str, ...] = (
    "base", "own", "uniform", "prompt", "token:1", "token:2", "token:4",
  )  # fmt: skip
  routers: tuple[str, ...] = ()
  rules: tuple[str, ...] = ("exact",)
  caches: tuple[str, ...] = ("reuse",)
  generate: bool = False
  run_code: bool = False
  output: str = ""

  def __post_init__(self):
    super().__post_init__()
    check(self.rows >= 0, "rows", self.rows, "0 (data.eval-rows) or more")
