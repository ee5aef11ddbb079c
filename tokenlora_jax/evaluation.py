"""Held-out loss of answers under gates that a router refreshes.

An answer is scored as the decoder would make it: its token n (n = 0, 1, ...,
the end token included) is predicted under the gates of chunk
floor(n / refresh_every), which the router decided from the prompt and the
answer's tokens before that chunk; the prompt is read under the first gates.
Since the answer is given, a router that reads text can say all gates beforehand,
one that decides in the layers needs nothing else, and a text is scored in one
forward pass with gates [B, T, E]. One that looks at hidden states or evidence,
which depend on the tokens before, is followed by the decoder, and so is the cache
policy `recompute`, which reads a text many times.

Axis letters: B batch, T length, N answer tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenlora_jax.config import DecodeConfig
from tokenlora_jax.data import LENGTH_STEP, Example
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.mixing.mixture import (
  Mixture,
  check_mixable,
  expert_rows,
  one_hot_rows,
  route_layers,
)
from tokenlora_jax.mixing.routers import Router, make_router
from tokenlora_jax.mixing.rules import Rule, get_rule, mix_probabilities
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters
from tokenlora_jax.model.loss import token_losses

# Rows that are scored, or texts that are routed, at once.
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to set the gates, to be compared with others.

  Attributes:
    name: what tables call it.
    router: who decides; None is the base alone, `own` one-hot on the expert of
      the row's own task, which no router can know: the oracle.
    refresh_every: tokens between two router calls; 0 is once, at the prompt.
  """

  name: str
  router: Router | str | None
  refresh_every: int = 0


def standard_variants(
  router: Router, refresh_every: Sequence[int] = (1, 2, 4)
) -> list[Variant]:
  """Returns base, own adapter, uniform, and a router at several paces.

  Example:
    >>> router = make_router("fixed", gates=[0.5, 0.5])
    >>> [v.name for v in standard_variants(router)][3:]
    ['prompt', 'every 1', 'every 2', 'every 4']
  """
  return [
    Variant("base", None),
    Variant("own adapter", "own"),
    Variant("uniform", make_router("uniform")),
    Variant("prompt", router),
    *(Variant(f"every {n}", router, n) for n in refresh_every),
  ]


@functools.partial(jax.jit, static_argnames=("rule", "remix"))
def _losses(
  base, loras, router, gates, tokens, lengths, *, rule: Rule | None, remix: bool
):
  """Loss of predicting token t + 1 at t, float32[B, T]; gates [B, T, E]."""
  batch = tokens.shape[0]
  apart, mixing = rule is not None and rule.of_outputs, gates
  if apart:
    experts = gates.shape[-1]
    tokens, lengths = (
      expert_rows(tokens, experts),
      expert_rows(lengths, experts),
    )
    mixing = one_hot_rows(batch, experts)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask((positions < lengths[:, None]).astype(jnp.int32))
  if rule is None:
    hidden, _ = base(tokens, positions, mask)
  else:
    if router is not None and router.looks_first:
      router = router.look(base(tokens, positions, mask)[0])
    mixture = Mixture(rule, mixing, router)
    hidden, _ = base(
      tokens, positions, mask,
      loras=route_layers(loras, router),
      adapt=mixture,
      remix=mixture if remix else None,
    )  # fmt: skip
  losses = token_losses(base, hidden, jnp.roll(tokens, -1, axis=1))
  if not apart:
    return losses
  losses = losses.reshape(batch, experts, -1)
  return -mix_probabilities(-losses, gates.swapaxes(1, 2))


@jax.jit
def _gates(router, observation, batch):
  return router.gates(batch.shape[0], observation, None)


class Evaluator:
  """Scores held-out answers of one base and bank.

  Router calls are remembered: variants that differ only in `refresh_every` ask
  about many of the same texts.

  Args:
    base: with its layers in a list.
    adapters: the experts.
    tokenizer: the base's.
    rule: what the gates mean.
    cache: what becomes of what was read under older gates.
  """

  def __init__(
    self,
    base: Llama,
    adapters: Adapters,
    tokenizer: Any,
    rule: str = "exact",
    cache: Literal["reuse", "recompute", "remix"] = "reuse",
  ):
    adapters.check(base.config)
    self._base = base
    self._adapters = adapters
    self._tokenizer = tokenizer
    self._rule = get_rule(rule)
    self._cache = cache
    # By the router's id, with the router, so that the id is not given again.
    self._routed: dict[int, tuple[Router, dict[bytes, np.ndarray]]] = {}

  def losses(
    self, variant: Variant, expert: str, examples: Sequence[Example]
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Scores answers, a batch after the other.

    Args:
      variant: who decides the gates.
      expert: the expert of the rows' own task.
      examples: rows as tokens.

    Yields:
      (place in `examples`, float32[N], the loss of each answer token in nats),
      in some order; rows that were cut before the answer are left out.
    """
    router = variant.router
    if router == "own":
      router = make_router("one-hot", expert=self._adapters.index(expert))
    if router is not None:
      router = router.bind(self._adapters.names)
      check_mixable(self._rule, self._cache, router, self._adapters)
    pace = variant.refresh_every
    rereads = self._cache == "recompute" and pace
    order = sorted(
      (i for i, e in enumerate(examples) if len(e.tokens) > e.prompt_length),
      key=lambda i: -len(examples[i].tokens),
    )
    for start in range(0, len(order), BATCH):
      places = order[start : start + BATCH]
      batch = [examples[i] for i in places]
      if router is None:
        losses = self._score(batch, None, None)
      elif rereads or router.needs not in ("nothing", "text"):
        losses = self._decode(batch, router, pace)
      else:
        losses = self._score(batch, router, self.gates(router, pace, batch))
      yield from zip(places, losses, strict=True)

  def gates(
    self, router: Router, refresh_every: int, examples: Sequence[Example]
  ) -> list[np.ndarray]:
    """Returns the gates under which each answer token is made, [N, E] each.

    Args:
      router: one that does not look at hidden states.
      refresh_every: tokens between two calls; 0 is once, at the prompt.
      examples: rows as tokens.
    """
    if router.at_prompt_only:
      refresh_every = 0
    asked, texts = [], {}
    for example in examples:
      count = len(example.tokens) - example.prompt_length
      pace = refresh_every or count
      prefixes = [
        example.tokens[: example.prompt_length + n // pace * pace].tobytes()
        for n in range(count)
      ]
      asked.append(prefixes)
      texts |= dict.fromkeys(prefixes)
    _, known = self._routed.setdefault(id(router), (router, {}))
    new = [text for text in texts if text not in known]
    # By length, so that little is padding; a short batch is filled up, so
    # that it does not compile anew.
    new.sort(key=len)
    for start in range(0, len(new), 4 * BATCH):
      part = new[start : start + 4 * BATCH]
      filled = part + part[-1:] * (4 * BATCH - len(part))
      observation = router.observe(
        [
          self._tokenizer.decode(
            np.frombuffer(text, np.int32).tolist(), skip_special_tokens=True
          )
          for text in filled
        ]
      )
      gates = np.asarray(_gates(router, observation, np.zeros(len(filled))))
      known |= dict(zip(part, gates, strict=False))
    return [self._smoothed(router, row, known) for row in asked]

  def _smoothed(self, router, texts, known) -> np.ndarray:
    """Returns the gates [N, E] of an answer, given those of its prefixes."""
    gates = [known[texts[0]]]
    for before, text in itertools.pairwise(texts):
      now = gates[-1]
      if text != before:
        now = np.asarray(router.smooth(now, known[text]))
      gates.append(now)
    return np.stack(gates)

  def _score(self, batch, router, gates) -> list[np.ndarray]:
    lengths = np.ones(BATCH, np.int32)
    lengths[: len(batch)] = [len(e.tokens) for e in batch]
    size = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((BATCH, size), np.int32)
    for row, example in zip(tokens, batch, strict=False):
      row[: len(example.tokens)] = example.tokens
    loras = rule = table = None
    if gates is not None:
      loras, rule = self._adapters.layers, self._rule
      # Any gates do behind a text, but those of predictions must have a sum.
      table = np.ones((BATCH, size, len(self._adapters.names)), np.float32)
      for row, example, answer in zip(table, batch, gates, strict=False):
        # Token n is made at the position before it.
        first = example.prompt_length - 1
        row[:first] = answer[0]
        row[first : first + len(answer)] = answer
    losses = np.asarray(
      _losses(
        self._base, loras,
        router if router is not None and router.prototypes else None,
        table, tokens, lengths,
        rule=rule, remix=self._cache == "remix" and rule is not None,
      )
    )  # fmt: skip
    return [
      losses[i, e.prompt_length - 1 : len(e.tokens) - 1]
      for i, e in enumerate(batch)
    ]

  def _decode(self, batch, router, refresh_every) -> list[np.ndarray]:
    filled = batch + batch[-1:] * (BATCH - len(batch))
    answers = [e.tokens[e.prompt_length :] for e in filled]
    longest = max(map(len, answers))
    size = -(-longest // LENGTH_STEP) * LENGTH_STEP
    forced = np.zeros((BATCH, size), np.int32)
    for row, answer in zip(forced, answers, strict=True):
      row[: len(answer)] = answer
    *_, out = Decoder(
      self._base,
      [e.tokens[: e.prompt_length].tolist() for e in filled],
      self._adapters,
      router,
      DecodeConfig(
        longest,
        refresh_every,
        rule=self._rule.name,
        cache=self._cache,
        stop_at_eos=False,
      ),
      self._tokenizer,
      forced=forced,
    )
    pairs = zip(out.log_probs, answers[: len(batch)], strict=False)
    return [-row[: len(answer)] for row, answer in pairs]


def mean_loss(losses: Mapping[int, np.ndarray]) -> float:
  """Returns the mean over all tokens of all rows, nats a token.

  Example:
    >>> mean_loss({0: np.array([1.0, 2.0]), 1: np.array([6.0])})
    3.0
  """
  return float(np.concatenate(list(losses.values())).mean())
