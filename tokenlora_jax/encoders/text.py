"""Embeds texts with a sentence encoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
from typing import Literal

import jax
import numpy as np

from tokenlora_jax.config import check_choice
from tokenlora_jax.encoders.minilm import MiniLM

_log = logging.getLogger(__name__)
_embed = jax.jit(MiniLM.__call__)


@functools.cache
def _warn_frozen(max_pieces: int) -> None:
  # Cached, so that a long decode warns once and not at every refresh.
  _log.warning(
    "a text is longer than the %d word pieces the encoder reads from its "
    "start: gates that depend on it no longer change; window='end' reads its "
    "end instead",
    max_pieces,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """A sentence encoder: `prepare` on the host, then `module` in the graph.

  A pytree whose leaves are the module's parameters, so a router can pass it
  through `jax.jit`. The tokenizer is static, and is called on the host alone.

  Attributes:
    module: the network.
    tokenize: maps a text to its word pieces, with exactly one special piece at
      each end. Hashable: encoders with equal tokenizers share one trace.
    max_pieces: the most word pieces per text, the two special ones included.
    window: the pieces read of a longer text: `start` (as in the paper) or `end`
      (the latest ones, so that gates follow a growing text).
  """

  module: MiniLM
  tokenize: Callable[[str], Sequence[int]] = dataclasses.field(
    metadata={"static": True}
  )
  max_pieces: int = dataclasses.field(default=256, metadata={"static": True})
  window: Literal["start", "end"] = dataclasses.field(
    default="start", metadata={"static": True}
  )

  def __post_init__(self):
    check_choice("encoder window", self.window, ("start", "end"))

  @property
  def width(self) -> int:
    """The width of an embedding, D_enc."""
    return self.module.config.width

  def _read(self, text: str) -> list[int]:
    pieces = list(self.tokenize(text))
    if len(pieces) <= self.max_pieces:
      return pieces
    if self.window == "end":
      return pieces[:1] + pieces[1 - self.max_pieces :]
    _warn_frozen(self.max_pieces)
    return pieces[: self.max_pieces - 1] + pieces[-1:]

  def prepare(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes texts, cuts them to the window and pads them, on the host.

    W is the longest row's length rounded up to 32, 48, 64, 96, 128, ..., at
    most `max_pieces`: a growing text compiles few shapes, with little padding.

    Args:
      texts: B texts.

    Returns:
      int32[B, W] word pieces and bool[B, W], False at padding.
    """
    rows = [self._read(text) for text in texts]
    longest = max(map(len, rows), default=0)
    width, wider = 32, 48
    while width < longest:
      width, wider = wider, 2 * width
    width = min(width, self.max_pieces)
    pieces = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
      pieces[i, : len(row)] = row
      mask[i, : len(row)] = True
    return pieces, mask

  def embed(self, texts: Sequence[str], batch: int = 32) -> np.ndarray:
    """Embeds any number of texts; compiles once per shape.

    Args:
      texts: N texts.
      batch: number of texts per forward pass.

    Returns:
      float32[N, D_enc], each row of length 1.
    """
    embeddings = np.zeros((len(texts), self.width), np.float32)
    rows = min(batch, len(texts))
    # Texts of similar length share a batch, so that there is little padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), batch):
      chosen = order[start : start + batch]
      pieces, mask = self.prepare([texts[i] for i in chosen])
      # The last batch is filled up, so that its shape is compiled already.
      missing = ((0, rows - len(chosen)), (0, 0))
      embedded = _embed(
        self.module, np.pad(pieces, missing), np.pad(mask, missing)
      )
      embeddings[chosen] = embedded[: len(chosen)]
    return embeddings
