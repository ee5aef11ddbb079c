"""Tokenises prompts, and checks their tokens against the base."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tokens import Tokenizer, encode_prompt
from tokenlora_jax.model.config import LlamaConfig

# A text, or its tokens.
Prompt = str | Sequence[int] | Int[np.ndarray, " P"]


def encode_checked(
  prompt: Prompt,
  tokenizer: Tokenizer | None,
  shape: LlamaConfig,
  new: int = 0,
  letters: bool = False,
) -> list[int]:
  """Returns a prompt's tokens, checked against the base.

  Args:
    prompt: a text, or its tokens.
    tokenizer: the base's tokenizer; needed for a text.
    shape: the base's shape.
    new: the most tokens to decode after it.
    letters: encode names of special tokens as letters; see `encode_prompt`.

  Raises:
    InputError: the prompt is empty, has a token beyond the base's vocabulary,
      or is too long together with the new tokens.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> encode_checked([1, 2], None, PRESETS["tiny"], new=8)
    [1, 2]
  """
  if isinstance(prompt, str):
    if tokenizer is None:
      raise InputError("text needs a tokenizer")
    prompt = encode_prompt(prompt, tokenizer, letters)
  if len(prompt) == 0:
    raise InputError("is empty")
  if not 0 <= min(prompt) <= max(prompt) < shape.vocab:
    raise InputError(f"has tokens outside 0..{shape.vocab - 1}")
  if len(prompt) + new > shape.max_length:
    raise InputError(
      f"decode.max-new-tokens: {new} after a prompt of {len(prompt)} tokens is"
      f" more than the base's {shape.max_length} positions"
    )
  return [int(token) for token in prompt]
