"""Texts in, vectors out: an encoder together with its tokenizer."""

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
  # Cached, so that a long decode says it once and not at every refresh.
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

  A pytree whose leaves are the module's parameters, so it travels through
  `jax.jit` inside a router; the tokenizer rides along as a static part and is
  only called on the host.

  Attributes:
    module: the network.
    tokenize: one text to its word pieces, with exactly one special piece at
      each end. Hashable; equal tokenizers let two encoders share one trace.
    max_pieces: the most word pieces read of a text, the two specials included.
    window: which pieces of a longer text are read: `start` (as the paper does)
      or `end` (the latest ones, so gates keep following a growing text).
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
    """D_enc, the width of an embedding."""
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
    """Tokenizes, cuts to the window and pads, on the host.

    W is the longest row's length brought up to 32, 64, 128, ... and no further
    than `max_pieces`, so that a growing text compiles few shapes.

    Args:
      texts: B texts.

    Returns:
      int32[B, W] word pieces and bool[B, W], False at padding.
    """
    rows = [self._read(text) for text in texts]
    longest = max(map(len, rows), default=0)
    width = 32
    while width < longest:
      width *= 2
    width = min(width, self.max_pieces)
    pieces = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
      pieces[i, : len(row)] = row
      mask[i, : len(row)] = True
    return pieces, mask

  def embed(self, texts: Sequence[str], batch: int = 32) -> np.ndarray:
    """Embeds any number of texts, compiled once a shape.

    Args:
      texts: N texts.
      batch: how many go through the network at once.

    Returns:
      float32[N, D_enc], each row of length 1.
    """
    embeddings = np.zeros((len(texts), self.width), np.float32)
    rows = min(batch, len(texts))
    # Texts of similar length share a batch, so little of it is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), batch):
      chosen = order[start : start + batch]
      pieces, mask = self.prepare([texts[i] for i in chosen])
      # The last batch is filled up, so that it needs no program of its own.
      missing = ((0, rows - len(chosen)), (0, 0))
      embedded = _embed(
        self.module, np.pad(pieces, missing), np.pad(mask, missing)
      )
      embeddings[chosen] = embedded[: len(chosen)]
    return embeddings
