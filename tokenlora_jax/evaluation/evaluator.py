"""Held-out loss of answers under gates that a router refreshes.

An answer is scored as the decoder would make it: its token n (n = 0, 1, ...,
the end token included) is predicted under the gates of chunk
floor(n / refresh_every), which the router decided from the prompt and the
answer's tokens before that chunk; the prompt is read under the first gates.
Since the answer is given, all gates can be said beforehand, and a text is scored
in one forward pass with gates [B, T, E]: a router that reads text is asked about
its prefixes, and the evidence for each expert is another pass. Only a router that
looks at hidden states between tokens, which depend on the gates before, is
followed by the decoder, and so is the cache policy `recompute`, which reads a
text many times.

Axis letters: B batch, T length, N answer tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenlora_jax.config import DecodeConfig
from tokenlora_jax.data.examples import LENGTH_STEP, Example
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.mixing.mixture import Mixture, check_mixable, route_layers
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.rules import Rule, get_rule, mix_probabilities
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters
from tokenlora_jax.model.loss import token_losses

# Rows that are scored, or texts that are routed, at once.
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to mix, to be compared with others.

  Attributes:
    router: who decides the gates; None is the base alone.
    refresh_every: tokens between two router calls; 0 is once, at the prompt.
    rule: what the gates mean.
    cache: what becomes of what was read under older gates.
  """

  router: Router | None
  refresh_every: int = 0
  rule: str = "exact"
  cache: Literal["reuse", "recompute", "remix"] = "reuse"


class Scored(NamedTuple):
  """What became of one answer.

  Attributes:
    place: of the row among those that were scored.
    losses: float32[N], of each answer token, nats.
    gates: float32[N, E], under which each was predicted; of routers that decide
      in the layers their mean over the adapted maps. None: the base alone.
  """

  place: int
  losses: np.ndarray
  gates: np.ndarray | None


@functools.partial(jax.jit, static_argnames=("rule", "remix"))
def _states(
  base, loras, router, gates, tokens, lengths, *, rule: Rule | None, remix: bool
):
  """Last hidden states [B, T, D], and the gates [B, T, E] under which they are.

  The gates are as given, or the layers' own where these decide.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask((positions < lengths[:, None]).astype(jnp.int32))
  if rule is None:
    hidden, _ = base(tokens, positions, mask)
    return hidden, gates
  if router is not None and router.looks_first:
    router = router.look(base(tokens, positions, mask)[0])
  mixture = Mixture(rule, gates, router)
  hidden, _ = base(
    tokens, positions, mask,
    loras=route_layers(loras, router),
    adapt=mixture,
    remix=mixture if remix else None,
  )  # fmt: skip
  if mixture.seen:
    gates = jnp.mean(jnp.stack(mixture.seen), axis=0)
  return hidden, gates


@functools.partial(jax.jit, static_argnames="count")
def _losses(base, hidden, tokens, starts, *, count):
  """Loss of predicting token t + 1 at t, t = start, ..., float32[B, count].

  The output map is a fifth of a small model's work, and prompts need none of it.
  """
  places = jnp.minimum(starts[:, None] + jnp.arange(count), tokens.shape[1] - 1)
  hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
  targets = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), places, axis=1)
  return token_losses(base, hidden, targets)


@jax.jit
def _gates(router, observation, batch, seen=None):
  return router.gates(batch.shape[0], observation, seen)


@jax.jit
def _learn(router, belief, log_probs):
  return router.learn(belief, log_probs)


def _alone_throughout(gates: np.ndarray) -> int | None:
  """Returns the expert that gates [N, E] leave alone all the time, or None."""
  expert = int(np.argmax(gates[0]))
  alone = np.arange(gates.shape[1]) == expert
  return expert if (gates == alone).all() else None


class Evaluator:
  """Scores held-out answers of one base and bank.

  Router calls are remembered: variants that differ only in `refresh_every`,
  rule or cache ask about many of the same texts.

  Args:
    base: with its layers in a list.
    adapters: the experts.
    tokenizer: the base's.
  """

  def __init__(self, base: Llama, adapters: Adapters, tokenizer: Any):
    adapters.check(base.config)
    self._base = base
    self._adapters = adapters
    self._tokenizer = tokenizer
    # By tokens and expert alone: a place of the text, and the losses of
    # predicting from there on.
    self._told: dict[tuple[bytes, int], tuple[int, np.ndarray]] = {}
    # By the router's id, with the router, so that the id is not given again:
    # the router bound to the adapters, and its gates by text.
    self._routed: dict[int, tuple[Router, Router, dict[bytes, np.ndarray]]] = {}

  def score(
    self, variant: Variant, examples: Sequence[Example]
  ) -> Iterator[list[Scored]]:
    """Scores answers.

    Args:
      variant: how to mix.
      examples: rows as tokens.

    Yields:
      A batch after the other, the longest rows first; rows that were cut before
      the answer are left out.

    Raises:
      InputError: rule, cache policy and router do not fit together.
    """
    router, pace = variant.router, variant.refresh_every
    if router is not None:
      router, _ = self._memory(router)
      pace = 0 if router.at_prompt_only else pace
      rule = get_rule(variant.rule)
      check_mixable(rule, variant.cache, router, self._adapters)
    follow = router is not None and (
      pace and (variant.cache == "recompute" or router.needs == "hidden")
    )
    order = sorted(
      (i for i, e in enumerate(examples) if len(e.tokens) > e.prompt_length),
      key=lambda i: -len(examples[i].tokens),
    )
    for start in range(0, len(order), BATCH):
      places = order[start : start + BATCH]
      batch = [examples[i] for i in places]
      if router is None:
        found = self._read(batch, variant, None, None)
      elif follow:
        found = self._decode(batch, variant, router)
      else:
        gates = self.gates(variant.router, pace, batch)
        found = self._score(batch, variant, router, gates)
      yield [
        Scored(place, losses, gates)
        for place, (losses, gates) in zip(places, found, strict=True)
      ]

  def gates(
    self, router: Router, refresh_every: int, examples: Sequence[Example]
  ) -> list[np.ndarray]:
    """Returns the gates under which each answer token is made, [N, E] each.

    Args:
      router: any; one that looks at hidden states only at the prompt.
      refresh_every: tokens between two calls; 0 is once, at the prompt.
      examples: rows as tokens.
    """
    if router.at_prompt_only or router.needs in ("hidden", "prompt"):
      refresh_every = 0
    if router.needs == "evidence" and refresh_every:
      return self._believed(router, refresh_every, examples)
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
    router, known = self._memory(router)
    new = [text for text in texts if text not in known]
    # By length, so that little is padding; a short batch is filled up, so
    # that it does not compile anew.
    new.sort(key=len)
    size = 4 * BATCH if router.needs in ("nothing", "text") else BATCH
    for start in range(0, len(new), size):
      part = new[start : start + size]
      filled = part + part[-1:] * (size - len(part))
      tokens = [np.frombuffer(text, np.int32).tolist() for text in filled]
      known |= dict(zip(part, self._ask(router, tokens), strict=False))
    return [self._smoothed(router, row, known) for row in asked]

  def _ask(self, router: Router, texts: list[list[int]]) -> np.ndarray:
    """Returns the router's gates [B, E] for texts as tokens."""
    if router.needs not in ("nothing", "text"):
      decoder = Decoder(
        self._base, texts, self._adapters, router,
        DecodeConfig(1, refresh_every=0), self._tokenizer,
      )  # fmt: skip
      return decoder.prompt_gates()
    words = [
      self._tokenizer.decode(text, skip_special_tokens=True) for text in texts
    ]
    observation = router.observe(words)
    return np.asarray(_gates(router, observation, np.zeros(len(texts))))

  def _memory(self, router: Router) -> tuple[Router, dict[bytes, np.ndarray]]:
    """Returns the router bound to the adapters, and its gates by text."""
    if id(router) not in self._routed:
      bound = router.bind(self._adapters.names)
      self._routed[id(router)] = router, bound, {}
    return self._routed[id(router)][1:]

  def _smoothed(self, router, texts, known) -> np.ndarray:
    """Returns the gates [N, E] of an answer, given those of its prefixes."""
    gates = [known[texts[0]]]
    for before, text in itertools.pairwise(texts):
      now = gates[-1]
      if text != before:
        now = np.asarray(router.smooth(now, known[text]))
      gates.append(now)
    return np.stack(gates)

  def _believed(self, router, refresh_every, examples) -> list[np.ndarray]:
    """Returns the gates [N, E] of answers by a router that weighs evidence."""
    firsts = self.gates(router, 0, examples)
    router, gates = self._memory(router)[0], []
    for start in range(0, len(examples), BATCH):
      batch = examples[start : start + BATCH]
      for first, losses in zip(
        firsts[start:], self._by_each(batch), strict=False
      ):
        pace = refresh_every or len(losses)
        belief, found = jnp.log(first[:1]), [first[0]]
        for n, loss in enumerate(losses[:-1], 1):
          belief, now = _learn(router, belief, -loss[None]), found[-1]
          if n % pace == 0:
            new = _gates(router, (), np.zeros(1), belief)[0]
            now = np.asarray(router.smooth(now, new))
          found.append(now)
        gates.append(np.stack(found))
    return gates

  def _alone(self, batch, experts: Sequence[int]) -> list[np.ndarray]:
    """Returns the losses [N] of each answer by one expert alone."""
    keys = [
      (example.tokens.tobytes(), expert)
      for example, expert in zip(batch, experts, strict=True)
    ]
    starts = [example.prompt_length - 1 for example in batch]
    new = [
      i
      for i, (key, start) in enumerate(zip(keys, starts, strict=True))
      if key not in self._told or self._told[key][0] > start
    ]
    if new:
      one_hot = np.eye(len(self._adapters.names), dtype=np.float32)
      texts = [batch[i] for i in new]
      gates = [
        np.tile(one_hot[experts[i]], (len(text.tokens) - starts[i] - 1, 1))
        for i, text in zip(new, texts, strict=True)
      ]
      found = self._read(texts, Variant(None), None, gates)
      for i, (losses, _) in zip(new, found, strict=True):
        self._told[keys[i]] = starts[i], losses
    told = [self._told[key] for key in keys]
    return [
      losses[start - first :]
      for (first, losses), start in zip(told, starts, strict=True)
    ]

  def _by_each(self, batch) -> list[np.ndarray]:
    """Returns the losses [N, E] of each answer by each expert alone."""
    told = [
      self._alone(batch, [expert] * len(batch))
      for expert in range(len(self._adapters.names))
    ]
    return [np.stack(losses, axis=1) for losses in zip(*told, strict=True)]

  def _score(self, batch, variant, router, gates):
    """Scores texts under the gates [N, E] of each: [(losses, gates)]."""
    if get_rule(variant.rule).of_outputs:
      mixed = [
        np.asarray(mix_probabilities(-told.T[None], now.T[None])[0])
        for told, now in zip(self._by_each(batch), gates, strict=True)
      ]
      return [(-x, now) for x, now in zip(mixed, gates, strict=True)]
    experts = [_alone_throughout(now) for now in gates]
    alone = None not in experts and not router.prototypes
    if variant.rule == "exact" and alone:
      # As `own`, an adapter by name and `top1` have it: often read already.
      return list(zip(self._alone(batch, experts), gates, strict=True))
    return self._read(batch, variant, router, gates)

  def _read(self, batch, variant, router, gates):
    """Reads texts once, under the gates [N, E] of each: [(losses, gates)]."""
    lengths = np.ones(BATCH, np.int32)
    lengths[: len(batch)] = [len(e.tokens) for e in batch]
    size = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((BATCH, size), np.int32)
    for row, example in zip(tokens, batch, strict=False):
      row[: len(example.tokens)] = example.tokens
    loras = rule = table = None
    if gates is not None:
      loras, rule = self._adapters.layers, get_rule(variant.rule)
      table = np.zeros((BATCH, size, len(self._adapters.names)), np.float32)
      for row, example, answer in zip(table, batch, gates, strict=False):
        # Token n is made at the position before it.
        first = example.prompt_length - 1
        row[:first] = answer[0]
        row[first : first + len(answer)] = answer
    hidden, seen = _states(
      self._base, loras,
      router if router is not None and router.prototypes else None,
      table, tokens, lengths,
      rule=rule, remix=variant.cache == "remix" and rule is not None,
    )  # fmt: skip
    starts = np.zeros(BATCH, np.int32)
    starts[: len(batch)] = [e.prompt_length - 1 for e in batch]
    counts = [len(e.tokens) - e.prompt_length for e in batch]
    # A power of two, so that few shapes compile.
    count = min(1 << (max(counts) - 1).bit_length(), size)
    losses = np.asarray(
      _losses(self._base, hidden, tokens, starts, count=count)
    )
    if gates is None:
      return [(row[:n], None) for row, n in zip(losses, counts, strict=False)]
    table = np.asarray(seen)
    return [
      (losses[i, :n], table[i, starts[i] : starts[i] + n])
      for i, n in enumerate(counts)
    ]

  def _decode(self, batch, variant, router):
    """Follows texts as the decoder makes them: [(losses, gates)]."""
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
        variant.refresh_every,
        rule=variant.rule,
        cache=variant.cache,
        stop_at_eos=False,
      ),
      self._tokenizer,
      forced=forced,
    )
    return [
      (-out.log_probs[i, : len(answer)], out.gates[i, : len(answer)])
      for i, answer in enumerate(answers[: len(batch)])
    ]
