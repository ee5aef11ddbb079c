"""The flags of `infer.py evaluate`; imports nothing heavy, for --help."""

import dataclasses

from tokenlora_jax.config import Config, check


@dataclasses.dataclass(frozen=True)
class Evaluation(Config):
  """The flags of `infer.py evaluate` besides the config.

  Attributes:
    bank: the folder that train.py wrote; WORKDIR/bank by default.
    same_base: accept a bank whose base has another fingerprint, because it is
      this base in another form.
    tasks: the tasks whose held-out rows are scored; the config's by default.
    rows: number of rows a task; 0 is data.eval-rows.
    variants: the ways to mix: `base`; `own`, the adapter of a row's own task
      (the oracle); `single`, each adapter on all tasks, or `adapter:NAME`;
      `uniform`; `sum`; and for each router `top1` (its best adapter alone),
      `prompt` (gates from the prompt) and `token:K` (new gates every K tokens).
    routers: names, optionally with settings, as in
      `centroid:encoder=hidden,sharpen=8`; the config's router by default.
    rules: how gates mix the adapters: exact, peft_linear, peft040,
      probabilities.
    caches: cache policies of `token:K`: reuse, recompute, remix.
    generate: generate answers too and score them: GSM8K's number, ARC's choice,
      SQuAD's words, CodeAlpaca's ROUGE-L. Set --decode.max-new-tokens long
      enough for an answer.
    run_code: allow running programs that the model wrote (humaneval, mbpp).
    output: write each row to this folder once it is scored. The same command
      resumes there, and may add tasks, variants, routers, rules or caches.
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
