"""The flags of `infer.py` for generation; imports nothing heavy, for --help."""

import dataclasses
from typing import Annotated

import tyro

from tokenlora_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
  """The flags of infer.py besides the config.

  Attributes:
    bank: the folder that train.py wrote; WORKDIR/bank by default.
    same_base: accept a bank whose base has another fingerprint, because it is
      this base in another form.
    prompt: a prompt; may be given several times.
    prompts_file: a file with a prompt a line; in a .jsonl file a line is
      {"prompt": ...}, or {"messages": [{"role": ..., "content": ...}]}, which
      the base's chat template formats.
    examples: number of held-out prompts to take from each task.
    compare: show base, each adapter, uniform, prompt-level and token-level
      gates side by side.
    output: write each text with its tokens, gates, and their entropy, switches
      and shares to this new JSONL file, in the prompts' order, as texts finish.
    html: write a heat map to this new HTML file: each token coloured by its
      leading expert, above the gates over time.
    png: write the same heat map to this new PNG file.
    plan: generate nothing; compile for absent hardware (v5e:1x1, h100:1) and
      print whether the programs fit, their memory and time. Plans a prompt of
      data.length tokens and decode.max-new-tokens new ones.
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
