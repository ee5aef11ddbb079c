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


def encode_pair(
  prompt: str, answer: str, tokenizer: Any
) -> tuple[list[int], list[int]]:
  """Returns a prompt's tokens, and those that an answer has after it.

  Encoded alone, a SentencePiece tokenizer would put a second space before an
  answer.

  Args:
    prompt: the text before.
    answer: the text after; starts with a space.
    tokenizer: a transformers-style tokenizer.
  """
  before = encode_prompt(prompt, tokenizer)
  both = encode_prompt(prompt + answer, tokenizer)
  if both[: len(before)] == before:
    return before, both[len(before) :]
  # A token spans the boundary; the prompt's tokens must stay.
  return before, list(tokenizer.encode(answer, add_special_tokens=False))
