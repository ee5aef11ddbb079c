"""Scores given continuations: log-likelihood, and whether they are greedy.

Token n of a continuation (n = 0, 1, ...) is predicted under the gates of chunk
floor(n / refresh_every), which the router computes from the context and the
continuation before that chunk, as in decoding. All gates are computed first: a
router of hidden states runs in the decoder, with the continuation's tokens
forced; `Evaluator.gates` computes those of any other. Then one pass with gates
[B, T, E] gives log-probabilities and greedy flags.

Axis letters: B batch, T length, N continuation tokens, E experts, K tokens
looked up, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from tokenlora_jax.config import DecodeConfig
from tokenlora_jax.data.examples import Example
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.decoding.decoder import bucket
from tokenlora_jax.evaluation.evaluator import Evaluator
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters

# Tokens of the rows that are routed together: enough to fill a text router's
# batches, but few enough that all prefixes fit in memory.
_ROUTED_TOKENS = 2**14


class Score(NamedTuple):
  """The model's score of one continuation.

  Attributes:
    place: index of its pair among the given ones.
    log_prob: the sum over its tokens of their log-probabilities, nats.
    greedy: whether each of its tokens is the likeliest.
  """

  place: int
  log_prob: float
  greedy: bool


class _Row(NamedTuple):
  """One row to read, shared by continuations that differ in their last token.

  Attributes:
    tokens: the context and the continuation but for its last token.
    context: the number of context tokens among them.
  """

  tokens: tuple[int, ...]
  context: int

  @property
  def size(self) -> int:
    """T, padded, so that few shapes compile."""
    return bucket(len(self.tokens))

  @property
  def answer(self) -> slice:
    """The positions at which the N continuation tokens are predicted."""
    return slice(self.context - 1, len(self.tokens))

  @property
  def example(self) -> Example:
    """The row with some last token, on which no gates depend."""
    tokens = np.array([*self.tokens, 0], np.int32)
    return Example(tokens, np.ones(len(tokens), np.float32), self.context)


@jax.jit
def _look_up(logits, rows, places, tokens):
  """Looks up tokens in logits [B, T, V] at [row, place], each int32[K].

  Returns (float32[K], their log-probabilities; bool[K], true for a token that
  is the likeliest at its place).
  """
  total = jax.nn.logsumexp(logits, axis=-1)
  best = jnp.argmax(logits, axis=-1)
  log_probs = logits[rows, places, tokens] - total[rows, places]
  return log_probs, best[rows, places] == tokens


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores continuations under one base, bank and router.

  Attributes:
    base: the Llama, in the list layout.
    tokenizer: the base's tokenizer; needed for routers of text.
    adapters: the experts; None is the base alone.
    router: computes the gates; needed with adapters.
    refresh_every: tokens between two router calls; 0 is once, at the context.
    rule: how the gates mix the adapters.
    batch_size: B, rows per batch. Their logits, float32[B, T, V], must fit in
      memory.

  Example:
    >>> from tokenlora_jax import load_base
    >>> scorer = Scorer(load_base("random:tiny"))
    >>> [(score.place, score.greedy) for score in scorer([([1, 2], [3])])]
    [(0, False)]
  """

  base: Llama
  tokenizer: Tokenizer | None = None
  adapters: Adapters | None = None
  router: Router | None = None
  refresh_every: int = 0
  rule: str = "exact"
  batch_size: int = 8

  def __call__(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
  ) -> Iterator[Score]:
    """Scores pairs of a context and a continuation, as tokens.

    Args:
      pairs: (context, continuation)s, neither of them empty.

    Yields:
      The `Score` of each pair, in any order.
    """
    places: dict[_Row, list[int]] = {}
    for place, (context, answer) in enumerate(pairs):
      row = _Row((*context, *answer[:-1]), len(context))
      places.setdefault(row, []).append(place)
    # Long rows first. Rows of one context are neighbours, for the router.
    order = sorted(places, key=lambda row: (-row.size, row))
    size = min(self.batch_size, len(order))
    for batch, gates in self._with_gates(order, size):
      asked = [
        (i, place, pairs[place][1])
        for i, row in enumerate(batch)
        for place in places[row]
      ]
      yield from self._score(batch, gates, asked, size)

  @functools.cached_property
  def _evaluator(self) -> Evaluator:
    """Computes gates, and caches those of earlier texts."""
    return Evaluator(self.base, self.adapters, self.tokenizer)

  def _with_gates(
    self, rows: list[_Row], size: int
  ) -> Iterator[tuple[list[_Row], list[Float[np.ndarray, "_ E"]] | None]]:
    """Yields batches of rows, and the gates [N, E] of each row."""
    if not rows:
      return
    step = size * max(1, _ROUTED_TOKENS // rows[0].size // size)
    for start in range(0, len(rows), step):
      part = rows[start : start + step]
      gates = None
      if self.adapters is not None and self.router.needs != "hidden":
        examples = [row.example for row in part]
        gates = self._evaluator.gates(self.router, self.refresh_every, examples)
      for i in range(0, len(part), size):
        batch = part[i : i + size]
        if gates is not None:
          yield batch, gates[i : i + size]
        elif self.adapters is not None:
          yield batch, self._followed(batch, size)
        else:
          yield batch, None

  def _followed(
    self, batch: list[_Row], size: int
  ) -> list[Float[np.ndarray, "_ E"]]:
    """Computes each row's gates [N, E] in the decoder, its tokens forced."""
    filled = batch + batch[-1:] * (size - len(batch))
    answers = [row.example.tokens[row.context :] for row in filled]
    longest = max(map(len, answers))
    forced = np.zeros((size, bucket(longest)), np.int32)
    for row, answer in zip(forced, answers, strict=True):
      row[: len(answer)] = answer
    *_, out = Decoder(
      self.base,
      [list(row.tokens[: row.context]) for row in filled],
      self.adapters,
      self.router,
      DecodeConfig(longest, self.refresh_every, rule=self.rule),
      forced=forced,
    )
    pairs = zip(out.gates, answers[: len(batch)], strict=False)
    return [gates[: len(answer)] for gates, answer in pairs]

  def _score(self, batch, gates, asked, size) -> Iterator[Score]:
    """Reads rows; yields the score of each (row, place, continuation)."""
    tokens = np.zeros((size, batch[0].size), np.int32)
    for i, row in enumerate(batch):
      tokens[i, : len(row.tokens)] = row.tokens
    table = None
    if gates is not None:
      table = np.zeros((*tokens.shape, gates[0].shape[1]), np.float32)
      for i, row in enumerate(batch):
        # The context is read under the first gates.
        table[i, : row.context] = gates[i][0]
        table[i, row.answer] = gates[i]
    inside = self.router if self.router and self.router.prototypes else None
    logits = forward(self.base, tokens, self.adapters, table, self.rule, inside)
    # Flat, since continuations differ in length: [row, place, token].
    spans = [range(len(batch[i].tokens))[batch[i].answer] for i, _, _ in asked]
    wanted = np.array(
      [
        (i, at, token)
        for (i, _, answer), span in zip(asked, spans, strict=True)
        for at, token in zip(span, answer, strict=True)
      ],
      np.int32,
    )
    padded = np.zeros((bucket(len(wanted)), 3), np.int32)
    padded[: len(wanted)] = wanted
    log_probs, likeliest = map(np.asarray, _look_up(logits, *padded.T))
    end = 0
    for _, place, answer in asked:
      start, end = end, end + len(answer)
      log_prob = float(log_probs[start:end].sum(dtype=np.float64))
      yield Score(place, log_prob, bool(likeliest[start:end].all()))
