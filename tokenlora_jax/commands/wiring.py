"""Loads the base, tokenizer and bank that a command's flags name."""

from pathlib import Path

import jax

from tokenlora_jax.bank.bank import load_bank
from tokenlora_jax.commands.evaluate_args import Evaluation
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.formats.load import Base
from tokenlora_jax.formats.tokenizers import importing_beside


def bank_folder(args: Arguments | Evaluation) -> Path:
  """Returns the bank's folder: `--bank`, or WORKDIR/bank."""
  return Path(args.bank or Path(args.workdir) / "bank")


def load(args: Arguments | Evaluation):
  """Returns (base, tokenizer, bank), after checks that they fit together.

  The base is sharded over this machine's devices by its kv heads.

  Raises:
    InputError: one of them cannot be read, or the bank is another base's.
  """
  with importing_beside():
    found = Base.open(args.base.path)
    base = found.weights(
      args.base.dtype,
      quantize=args.base.quantize,
      devices=tuple(jax.local_devices()),
    )
  tokenizer = found.tokenizer()
  bank = load_bank(bank_folder(args), base, same_base=args.same_base)
  return base, tokenizer, bank
