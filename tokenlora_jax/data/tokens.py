"""From text to the tokens that training and decoding share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenlora_jax.config import InputError


class Tokenizer(Protocol):
  """What is used of a fast tokenizer of transformers.

  Attributes:
    bos_token_id: stands in front of a text; None where there is none.
    eos_token_id: ends a text; None where there is none.
    all_special_ids: the tokens that a text without special ones leaves out.
    chat_template: how a conversation is written; None where there is none.
  """

  bos_token_id: int | None
  eos_token_id: int | None
  all_special_ids: Sequence[int]
  chat_template: str | None

  def __len__(self) -> int:
    """Returns how many tokens there are."""
    ...

  def encode(
    self, text: str, add_special_tokens: bool = True, **kwargs: Any
  ) -> list[int]:
    """Returns a text's tokens."""
    ...

  def decode(
    self, token_ids: Sequence[int] | int, skip_special_tokens: bool = False
  ) -> str:
    """Returns what tokens say."""
    ...

  def get_vocab(self) -> Mapping[str, int]:
    """Returns the id of every token."""
    ...

  def apply_chat_template(
    self, conversation: Sequence[Mapping[str, str]], **kwargs: Any
  ) -> Any:
    """Returns a conversation as one text."""
    ...


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the tokens that end a text, the tokenizer's own first.

  A chat model may end a turn with one token and a document with another; which
  these are, its files say, and `load_tokenizer` keeps as `end_tokens`. Rows of
  training end with the tokenizer's own, so that one always counts.

  Args:
    tokenizer: of the base.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> end_tokens(load_tokenizer("random:tiny"))
    (2,)
  """
  own = tokenizer.eos_token_id
  listed = getattr(tokenizer, "end_tokens", ())
  return tuple(dict.fromkeys([*([] if own is None else [own]), *listed]))


def special_token(text: str, tokenizer: Tokenizer) -> int | None:
  """Returns the special token that is written so, or None.

  Args:
    text: such as `<|im_end|>`.
    tokenizer: of the base.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> special_token("<eos>", load_tokenizer("random:tiny"))
    2
  """
  token = tokenizer.get_vocab().get(text)
  if token is None or tokenizer.decode([token], skip_special_tokens=True):
    return None
  return token


def check_vocab(
  tokens: Sequence[int] | None,
  tokenizer: Tokenizer,
  vocab: int,
  where: str = "tokenizer",
) -> None:
  """Raises `InputError` where a base has no row for a token.

  Args:
    tokens: of a text; None checks the tokenizer's own end token.
    tokenizer: that made them.
    vocab: how many tokens the base knows.
    where: what the tokens are of.
  """
  if tokens is None:
    end = tokenizer.eos_token_id
    tokens, where = [] if end is None else [end], f"{where}: its end token"
  largest = max(tokens, default=-1)
  if largest >= vocab:
    name = tokenizer.decode([largest], skip_special_tokens=False)
    raise InputError(
      f"{where} has id {largest} ({name!a}), and the base knows"
      f" {vocab} tokens, 0 to {vocab - 1}; use the base's own tokenizer, or give"
      " the base rows for all tokens (resize_token_embeddings)"
    )


def check_text(text: str) -> None:
  """Raises `InputError` where a text holds half a surrogate pair.

  JSON can write one (`"\\ud83d"`), and no tokenizer can read it.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f"text: character {error.start} is {text[error.start]!a}, half a"
      " surrogate pair, which is no UTF-8; write the whole character"
    ) from None


def encode_prompt(
  prompt: str, tokenizer: Tokenizer, letters: bool = False
) -> list[int]:
  """Returns a prompt's tokens, the same for training and for decoding.

  The tokenizer's own special tokens are kept at the front (BOS, where it has
  one) and dropped at the end, since the text goes on. A prompt that starts with
  BOS, as a chat template writes it, gets no second one.

  Args:
    prompt: the text.
    tokenizer: of the base.
    letters: read the names of special tokens, such as `</s>`, as the letters
      they are written with; for text that nobody wrote as a prompt, such as a
      row of data.

  Raises:
    InputError: the text is no UTF-8.
  """
  check_text(prompt)
  # An argument that only some tokenizers know, so it is given only if needed.
  how = {"split_special_tokens": True} if letters else {}
  tokens = list(tokenizer.encode(prompt, **how))
  bos = getattr(tokenizer, "bos_token_id", None)
  if bos is not None and tokens[:2] == [bos, bos]:
    tokens = list(tokenizer.encode(prompt, add_special_tokens=False, **how))
  while tokens and tokens[-1] == tokenizer.eos_token_id:
    tokens.pop()
  return tokens


def encode_pair(
  prompt: str, answer: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
  """Returns the tokens of a row's prompt, and those of its answer after it.

  Both are read as letters: `</s>` in a row does not end it. Encoded alone, a
  SentencePiece tokenizer would put a second space before an answer.

  Args:
    prompt: the text before.
    answer: the text after; starts with a space.
    tokenizer: of the base.
  """
  before = encode_prompt(prompt, tokenizer, letters=True)
  both = encode_prompt(prompt + answer, tokenizer, letters=True)
  if both[: len(before)] == before:
    return before, both[len(before) :]
  # A token spans the boundary; the prompt's tokens must stay.
  after = tokenizer.encode(
    answer, add_special_tokens=False, split_special_tokens=True
  )
  return before, list(after)
