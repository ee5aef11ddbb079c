"""From text to the tokens that training and decoding share."""

from __future__ import annotations

from typing import Any


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
  """Returns a prompt's tokens, the same for training and for decoding.

  The tokenizer's own special tokens are kept at the front (BOS, where it has
  one) and dropped at the end, since the text goes on.

  Args:
    prompt: the text.
    tokenizer: a transformers-style tokenizer.
  """
  tokens = list(tokenizer.encode(prompt))
  while tokens and tokens[-1] == tokenizer.eos_token_id:
    tokens.pop()
  return tokens
