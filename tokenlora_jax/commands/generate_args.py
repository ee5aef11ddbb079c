"""What `infer.py` takes to make text, apart from what makes it."""

import dataclasses
from typing import Annotated

import tyro

from tokenlora_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
  """What infer.py takes besides the config.

  Attributes:
    bank: the folder that train.py wrote; WORKDIR/bank by default.
    same_base: go on with a bank whose base has another fingerprint, because it
      is this base in another form.
    prompt: a prompt; may be given several times.
    prompts_file: a file with a prompt a line; in a .jsonl file a line is
      {"prompt": ...}, or {"messages": [{"role": ..., "content": ...}]}, which
      the base's chat template writes as text.
    examples: take the first so many held-out prompts of each task.
    compare: show base, each adapter, uniform, prompt-level and token-level
      gates side by side.
    output: write each text with its tokens, gates, and their entropy, switches
      and shares to this new JSONL file, as soon as it and those before it are
      made.
    html: draw each text, its tokens tinted by the expert that leads them, over
      the course of the gates, in this new file, a page that any browser shows.
    png: draw the same in this new file, a picture.
    plan: make no text, but compile the programs for hardware that need not be
      here and say whether they fit and what they take: v5e:1x1, h100:1. A
      prompt of data.length tokens is read, and decode.max-new-tokens are made.
    plan_json: write the plan to this new JSON file too.
  """

  bank: str = ""
  same_base: bool = False
  prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
  prompts_file: str = ""
  examples: int = 0
  compare: bool = False
  output: str = ""
  html: str = ""
  png: str = ""
  plan: str = ""
  plan_json: str = ""
