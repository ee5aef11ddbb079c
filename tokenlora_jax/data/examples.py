"""Tokenizes rows, and selects those that fit the length.

Axes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
import logging
import sys
from typing import NamedTuple
import zlib

import jax
from jax.experimental import multihost_utils
from jaxtyping import Float, Int
import numpy as np

from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data.rows import Row
from tokenlora_jax.data.tokens import Tokenizer, check_vocab, encode_pair

# Batches are padded to a multiple of this, so that few shapes compile.
LENGTH_STEP = 64

_log = logging.getLogger(__name__)


class Example(NamedTuple):
  """One row as tokens.

  Attributes:
    tokens: int32[T], prompt, answer and end token.
    loss_mask: float32[T], 1 where a token is a target of the loss.
    prompt_length: number of tokens of the prompt.
  """

  tokens: Int[np.ndarray, " T"]
  loss_mask: Float[np.ndarray, " T"]
  prompt_length: int


def tokenize(
  row: Row, tokenizer: Tokenizer, config: DataConfig
) -> Example | None:
  """Tokenizes a row: prompt, answer and end token.

  Args:
    row: the row.
    tokenizer: a transformers-style tokenizer with an end token.
    config: `loss_on`, `length` and `too_long` count.

  Returns:
    The example, or None for a row to leave out: too long under `skip`, or
    without a target under `truncate`.

  Raises:
    InputError: the tokenizer has no end token, a token is beyond the base's
      vocabulary, or the row is too long under `fatal`.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> tokenizer = load_tokenizer("random:tiny")
    >>> found = tokenize(Row("a", " b", "mine:1"), tokenizer, DataConfig())
    >>> found.tokens.tolist(), found.loss_mask.tolist(), found.prompt_length
    ([1, 101, 36, 102, 2], [0.0, 0.0, 1.0, 1.0, 1.0], 2)
  """
  if tokenizer.eos_token_id is None:
    raise InputError("tokenizer: it has no end token, which answers need")
  # Looked up, such a token would silently be read as another.
  vocab = getattr(tokenizer, "base_vocab", None)
  if vocab is not None:
    check_vocab(None, tokenizer, vocab)
  prompt, answer = encode_pair(row.prompt, row.answer, tokenizer)
  tokens = np.array([*prompt, *answer, tokenizer.eos_token_id], np.int32)
  if vocab is not None:
    check_vocab(tokens.tolist(), tokenizer, vocab, f"{row.origin}: a token")
  loss_mask = np.ones(len(tokens), np.float32)
  # The first token has no prediction, so it is never a target.
  loss_mask[: len(prompt) if config.loss_on == "answer" else 1] = 0
  if len(tokens) > config.length:
    if config.too_long == "fatal":
      raise InputError(
        f"{row.origin}: {len(tokens)} tokens are more than data.length "
        f"{config.length}; raise it or set data.too-long to skip or truncate"
      )
    if config.too_long == "skip":
      return None
    tokens, loss_mask = tokens[: config.length], loss_mask[: config.length]
    if not loss_mask.any():
      return None
  return Example(tokens, loss_mask, min(len(prompt), len(tokens)))


def held_out(
  rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig
) -> dict[int, Example]:
  """Tokenizes one task's first `config.eval_rows` rows that fit.

  Args:
    rows: rows of one task.
    tokenizer: a transformers-style tokenizer.
    config: see `tokenize`.

  Returns:
    {index in rows: example}, in the order of the rows.

  Raises:
    InputError: no row is left.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> rows = [Row("a", " b", "mine:1"), Row("c", " d", "mine:2")]
    >>> tokenizer = load_tokenizer("random:tiny")
    >>> list(held_out(rows, tokenizer, DataConfig(eval_rows=1)))
    [0]
  """
  found = fitting(rows, tokenizer, config, config.eval_rows)
  return {i: tokenize(rows[i], tokenizer, config) for i in found}


def fitting(
  rows: Sequence[Row],
  tokenizer: Tokenizer,
  config: DataConfig,
  most: int = sys.maxsize,
) -> dict[int, int]:
  """Returns the lengths of one task's first `most` rows that fit.

  With several processes each tokenizes its share of the rows and sends the
  lengths to the others: all know all lengths, none holds the tokens of all rows.

  Args:
    rows: rows of one task, the same in every process.
    tokenizer: a transformers-style tokenizer.
    config: see `tokenize`.
    most: number of rows wanted; later rows are not read.

  Returns:
    {index in rows: number of tokens}, in the order of the rows.

  Raises:
    InputError: no row fits, one is too long under `fatal`, or processes hold
      different rows; every process raises the same error.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> rows = [Row("a", " b", "mine:1"), Row("a" * 9, " b", "mine:2")]
    >>> tokenizer = load_tokenizer("random:tiny")
    >>> fitting(rows, tokenizer, DataConfig(length=8))  # Skips the long row.
    {0: 5}
  """
  _check_same(rows)
  lengths: dict[int, int] = {}
  seen = 0
  while seen < len(rows) and len(lengths) < most:
    part = rows[seen:][:most]
    for i, length in enumerate(_lengths(part, tokenizer, config), seen):
      if length and len(lengths) < most:
        lengths[i] = int(length)
        last = i
    seen += len(part)
  if not lengths:
    raise InputError(
      f"data.length: {config.length} tokens hold none of {len(rows)} rows"
      + (f", the first from {rows[0].origin}" if rows else "")
    )
  seen = last + 1 if len(lengths) == most else len(rows)
  if len(lengths) < seen:
    _log.warning(
      "left out %d of %d rows that data.length %d does not hold (first row: %s)",
      seen - len(lengths), seen, config.length, rows[0].origin,
    )  # fmt: skip
  return lengths


def _lengths(
  rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig
) -> Int[np.ndarray, " N"]:
  """Returns the number of tokens of each row, 0 for a row that is left out."""
  count = jax.process_count()
  own = np.zeros(-(-len(rows) // count), np.int32)
  for i, row in enumerate(rows[jax.process_index() :: count]):
    try:
      example = tokenize(row, tokenizer, config)
    except InputError:
      own[i] = -1  # So that all processes raise it, not this one alone.
      break
    own[i] = 0 if example is None else len(example.tokens)
  # [processes, share]; row i of a share is the process's i-th.
  lengths = multihost_utils.process_allgather(own).T.ravel()[: len(rows)]
  for i in np.flatnonzero(lengths < 0)[:1]:
    tokenize(rows[i], tokenizer, config)
  return lengths


def _check_same(rows: Sequence[Row]) -> None:
  """Raises `InputError` in every process unless all hold the same rows."""
  digest = 0
  for row in rows:
    text = f"{row.prompt}\0{row.answer}\0"
    digest = zlib.crc32(text.encode(errors="replace"), digest)
  own = np.array([len(rows), digest], np.uint32)
  everyone = multihost_utils.process_allgather(own)
  for process in np.flatnonzero((everyone != everyone[0]).any(1))[:1]:
    raise InputError(
      f"data.dir: process {process} reads {everyone[process, 0]} rows and"
      f" process 0 other {everyone[0, 0]}; every process must read the same"
      + (f" (the first here is {rows[0].origin})" if rows else "")
    )
