"""Detokenises generated tokens as a stream, one piece a token."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.tokens import Tokenizer, end_tokens, special_token

# The number of a prompt's last tokens that are decoded before the first new
# one.
_CONTEXT = 8
# Stands for the bytes of an unfinished character.
_UNFINISHED = "\ufffd"


def text_ends(
  config: DecodeConfig, tokenizer: Tokenizer | None
) -> tuple[list[int], list[str]]:
  """Returns (the tokens, the strings) that end a text.

  A stop string that names a special token becomes that token, since a decoded
  text does not show it.

  Args:
    config: whether end tokens count, and the stop strings.
    tokenizer: the base's tokenizer; needed for stop strings.

  Raises:
    InputError: there are stop strings, but no tokenizer.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> tokenizer = load_tokenizer("random:tiny")
    >>> text_ends(DecodeConfig(stop=("<bos>", ".")), tokenizer)
    ([2, 1], ['.'])
  """
  if tokenizer is None:
    if config.stop:
      raise InputError("decode.stop: stop strings need a tokenizer")
    return [], []
  ends = list(end_tokens(tokenizer)) if config.stop_at_eos else []
  special = {text: special_token(text, tokenizer) for text in config.stop}
  named = [i for i in special.values() if i is not None and i not in ends]
  return [*ends, *named], [text for text, i in special.items() if i is None]


class TextStream:
  """Detokenises a stream of tokens.

  Tokens are decoded after the prompt: without it, a SentencePiece tokenizer
  would drop the first space. Each token is decoded with only the few before it
  that its character may need, so the work is linear in the number of tokens.

  Args:
    tokenizer: the base's tokenizer.
    prompt: the prompt's tokens.
    stop: strings that end the text and are cut from it.
    ends: tokens that end the text and add nothing to it.

  Attributes:
    pieces: the string that each token adds to the text. A character that
      several tokens spell belongs to the last of them, so pieces never change
      later.
    stopped: whether a stop string was found; later tokens are ignored.
    ended: whether an end token was found; it is the last token taken.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> stream = TextStream(load_tokenizer("random:tiny"), stop=["."])
    >>> stream.push([4 + byte for byte in "é.b".encode()])
    >>> stream.text, stream.pieces
    ('é', ['', 'é', ''])
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    prompt: Sequence[int] = (),
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
  ):
    self._tokenizer = tokenizer
    self._stop = [text for text in stop if text]
    self.pieces: list[str] = []
    self.stopped = self.ended = False
    self._ends = frozenset(ends)
    self._text = ""
    # The context before the newest tokens (`_fresh`), the text of both, and the
    # part of that text that pieces hold already.
    size = _CONTEXT
    self._window = list(prompt[-size:])
    self._said = self._decode(self._window)
    # Control tokens alone do not show a space, and a character may be cut.
    while size < len(prompt) and (not self._said or _UNFINISHED in self._said):
      size *= 2
      self._window = list(prompt[-size:])
      self._said = self._decode(self._window)
    self._shown = self._said.rstrip(_UNFINISHED)
    self._fresh: list[int] = []

  def _decode(self, tokens: Sequence[int]) -> str:
    if not tokens:
      return ""
    return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

  @property
  def text(self) -> str:
    """The text of all tokens, an unfinished character as U+FFFD."""
    if self.stopped:
      return self._text
    whole = len(self._said.rstrip(_UNFINISHED))
    return self._text + (self._said[whole:] if self._fresh else "")

  def push(self, tokens: Sequence[int] | Int[np.ndarray, " N"]) -> None:
    """Appends the next tokens, until one ends the text.

    Args:
      tokens: the tokens that follow those pushed before.
    """
    for token in tokens:
      if self.stopped or self.ended:
        return
      if int(token) in self._ends:
        self.ended = True
        self.pieces.append("")
      else:
        self._take(self._piece(int(token)))

  def _piece(self, token: int) -> str:
    """Returns the string that a token adds to the text."""
    context = [*self._window, *self._fresh]
    said = self._decode([*context, token])
    if self._window and not self._fresh and said == self._said:
      return ""  # A control token is no context for the next one.
    self._fresh.append(token)
    self._said = said
    whole = said.rstrip(_UNFINISHED)
    if whole.startswith(self._shown) or whole == said:
      piece, self._shown = whole[len(self._shown) :], whole
    else:
      piece = ""
    if whole == said:
      self._window, self._fresh = self._fresh, []
      self._said = self._shown = self._decode(self._window)
    return piece

  def _take(self, piece: str) -> None:
    before = len(self._text)
    self._text += piece
    found = [
      # A stop string may begin in earlier pieces.
      self._text.find(stop, max(0, before - len(stop) + 1))
      for stop in self._stop
    ]
    place = min((place for place in found if place >= 0), default=None)
    if place is not None:
      self.stopped = True
      cut = max(0, before - place)
      for i in reversed(range(len(self.pieces))):
        if not cut:
          break
        kept = max(0, len(self.pieces[i]) - cut)
        cut -= len(self.pieces[i]) - kept
        self.pieces[i] = self.pieces[i][:kept]
      self._text = self._text[:place]
      piece = self._text[before:]
    self.pieces.append(piece)
