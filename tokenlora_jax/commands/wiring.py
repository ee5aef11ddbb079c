"""The base, tokenizer and bank that a command's settings name."""

from pathlib import Path

import jax

from tokenlora_jax.bank.bank import load_bank
from tokenlora_jax.commands.evaluate_args import Evaluation
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.formats.load import base_shape, load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.parallel.sharding import decoding_mesh


def bank_folder(args: Arguments | Evaluation) -> Path:
  """Returns the bank's folder."""
  return Path(args.bank or Path(args.workdir) / "bank")


def load(args: Arguments | Evaluation):
  """Returns (base, tokenizer, bank), checked to belong together.

  The base is split between this machine's devices, by its kv heads.
  """
  tokenizer = load_tokenizer(args.base.path)
  path, quantize, mesh = args.base.path, args.base.quantize, None
  devices = jax.local_devices()
  if len(devices) > 1:
    mesh = decoding_mesh(base_shape(path), devices, quantize)
  base = load_base(path, args.base.dtype, mesh, quantize=quantize)
  bank = load_bank(bank_folder(args), base, same_base=args.same_base)
  return base, tokenizer, bank
