"""Encodes text as tokens, the same for training and for decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tokenlora_jax.config import InputError


@runtime_checkable
class Tokenizer(Protocol):
  """The methods that we use of transformers' fast tokenizers.

  Attributes:
    bos_token_id: the token before a text, or None.
    eos_token_id: the token after a text, or None.
    all_special_ids: tokens that decoding skips with `skip_special_tokens`.
    chat_template: the template of a conversation, or None.
  """

  bos_token_id: int | None
  eos_token_id: int | None
  all_special_ids: Sequence[int]
  chat_template: str | None

  def __len__(self) -> int:
    """Returns the size of the vocabulary."""
    ...

  def encode(
    self, text: str, add_special_tokens: bool = True, **kwargs: Any
  ) -> list[int]:
    """Returns a text's tokens."""
    ...

  def decode(
    self, token_ids: Sequence[int] | int, skip_special_tokens: bool = False
  ) -> str:
    """Returns the text of tokens."""
    ...

  def get_vocab(self) -> Mapping[str, int]:
    """Returns the id of every token."""
    ...

  def apply_chat_template(
    self, conversation: Sequence[Mapping[str, str]], **kwargs: Any
  ) -> str:
    """Returns a conversation as one text."""
    ...


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the tokens that end a text, the tokenizer's own first.

  A chat model may end a turn with one token and a document with another.
  `load_tokenizer` reads them from the model's files into `end_tokens`. Training
  rows end with the tokenizer's own, so that one always counts.

  Args:
    tokenizer: the base's tokenizer.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> end_tokens(load_tokenizer("random:tiny"))
    (2,)
  """
  own = tokenizer.eos_token_id
  listed = getattr(tokenizer, "end_tokens", ())
  return tuple(dict.fromkeys([*([] if own is None else [own]), *listed]))


def special_token(text: str, tokenizer: Tokenizer) -> int | None:
  """Returns the id of the special token with a name, or None.

  Args:
    text: the name, such as `<|im_end|>`.
    tokenizer: the base's tokenizer.

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
  """Raises `InputError` if a token is beyond the base's vocabulary.

  Args:
    tokens: a text's tokens; None checks the tokenizer's own end token.
    tokenizer: the tokenizer that encoded them.
    vocab: size of the base's vocabulary.
    where: the text's origin, for errors.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> check_vocab([1, 2], load_tokenizer("random:tiny"), vocab=260)
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
  """Raises `InputError` if a text holds half a surrogate pair.

  JSON can contain one (`"\\ud83d"`), but no tokenizer can encode it.

  Args:
    text: any text.

  Example:
    >>> check_text("plain")
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

  The tokenizer's special tokens are kept at the start (BOS, if it has one) and
  dropped at the end, since the answer follows. A prompt that starts with BOS
  already, as chat templates write it, gets no second one.

  Args:
    prompt: the text.
    tokenizer: the base's tokenizer.
    letters: encode names of special tokens, such as `</s>`, as plain letters;
      for rows of data, which may hold them by accident.

  Raises:
    InputError: the text is not valid UTF-8.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> encode_prompt("hi", load_tokenizer("random:tiny"))
    [1, 108, 109]
  """
  check_text(prompt)
  # Only some tokenizers take this argument, so it is passed only if needed.
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
  """Returns the tokens of a row's prompt, and of its answer.

  Names of special tokens are encoded as letters: `</s>` in a row does not end
  it. The answer is encoded together with the prompt, since a SentencePiece
  tokenizer would put a second space before an answer alone.

  Args:
    prompt: the row's prompt.
    answer: the row's answer; starts with a space.
    tokenizer: the base's tokenizer.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> encode_pair("a", " b", load_tokenizer("random:tiny"))
    ([1, 101], [36, 102])
  """
  before = encode_prompt(prompt, tokenizer, letters=True)
  both = encode_prompt(prompt + answer, tokenizer, letters=True)
  if both[: len(before)] == before:
    return before, both[len(before) :]
  # A token spans the boundary, but the prompt's tokens must stay the same.
  after = tokenizer.encode(
    answer, add_special_tokens=False, split_special_tokens=True
  )
  return before, list(after)
