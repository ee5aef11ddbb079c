"""Computes held-out losses of answers under gates that a router refreshes.

An answer is scored as the decoder would decode it. Its token n (n = 0, 1, ...,
the end token included) is predicted under the gates of chunk
floor(n / refresh_every), which the router computes from the prompt and the
answer's tokens before that chunk. The prompt is read under the first gates.

Since the answer is known, all gates are computed first, and one forward pass
with gates [B, T, E] scores a text. A router of text is called on the text's
prefixes, and the evidence for each expert takes another pass. In two cases the
decoder runs with the answer's tokens forced: for a router of hidden states
between tokens, since these depend on earlier gates; and for the cache policy
`recompute`, which reads a text many times.

Axis letters: B batch, T length, N answer tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from tokenlora_jax.config import DecodeConfig
from tokenlora_jax.data.examples import LENGTH_STEP, Example
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.decoding import Decoder
from tokenlora_jax.decoding.finite import check_finite
from tokenlora_jax.mixing.mixture import read, resolve
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.rules import Rule, get_rule, mix_probabilities
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters
from tokenlora_jax.model.loss import token_losses

# Rows scored, or texts routed, in one batch.
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to mix: router, refresh, rule and cache policy.

  Attributes:
    router: computes the gates; None is the base alone.
    refresh_every: tokens between two router calls; 0 is once, at the prompt.
    rule: how the gates mix the adapters.
    cache: the policy for keys and values of older gates.
  """

  router: Router | None
  refresh_every: int = 0
  rule: str = "exact"
  cache: Literal["reuse", "recompute", "remix"] = "reuse"


class Scored(NamedTuple):
  """The losses and gates of one answer.

  Attributes:
    place: index of the row among the given ones.
    losses: float32[N], the loss of each answer token, nats.
    gates: float32[N, E], the gates of each token; of in-layer routers their
      mean over the adapted projections. None is the base alone.
  """

  place: int
  losses: Float[np.ndarray, " N"]
  gates: Float[np.ndarray, "N E"] | None


@functools.partial(jax.jit, static_argnames=("rule", "remix"))
def _states(
  base, loras, router, gates, tokens, lengths, *, rule: Rule | None, remix: bool
):
  """Computes the last hidden states [B, T, D]; returns them and their gates.

  The gates, [B, T, E], are the given ones, or those of an in-layer router.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask((positions < lengths[:, None]).astype(jnp.int32))
  found = read(
    base, tokens, positions, mask,
    rule=rule, loras=loras, gates=gates, router=router, remix=remix,
  )  # fmt: skip
  return found.hidden, found.gates


@functools.partial(jax.jit, static_argnames="count")
def _losses(base, hidden, tokens, starts, *, count):
  """Computes the loss of token t + 1 at t = start, ...: float32[B, count].

  Prompts skip the output projection, a fifth of a small model's work.
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


class _Decided(NamedTuple):
  """A router's gates for one text.

  Attributes:
    gates: float32[E].
    belief: float32[E], the log-belief of a router of `evidence`, before its
      gates are shaped; otherwise the gates again.
  """

  gates: Float[np.ndarray, " E"]
  belief: Float[np.ndarray, " E"]


def _key(tokens: Int[np.ndarray, " T"]) -> bytes:
  """Returns a hash of a text's tokens."""
  return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _identity(router: Router) -> Hashable:
  """Returns a key for a router: its structure and a hash of its arrays."""
  leaves, structure = jax.tree.flatten(router)
  numbers = hashlib.blake2b(digest_size=16)
  for leaf in map(np.asarray, leaves):
    numbers.update(f"{leaf.dtype}{leaf.shape}".encode())
    numbers.update(leaf.tobytes())
  return structure, numbers.digest()


def _alone_throughout(gates: Float[np.ndarray, "N E"]) -> int | None:
  """Returns the expert if gates [N, E] are its one-hot throughout, or None."""
  expert = int(np.argmax(gates[0]))
  alone = np.arange(gates.shape[1]) == expert
  return expert if (gates == alone).all() else None


class Evaluator:
  """Scores held-out answers of one base and bank.

  It caches router calls: variants that differ only in `refresh_every`, rule or
  cache policy route many of the same texts.

  Args:
    base: the Llama, in the list layout.
    adapters: the experts.
    tokenizer: the base's tokenizer; needed for routers of text.
  """

  def __init__(
    self, base: Llama, adapters: Adapters, tokenizer: Tokenizer | None
  ):
    adapters.check(base.config)
    self._base = base
    self._adapters = adapters
    self._tokenizer = tokenizer
    # By (hash of the tokens, expert alone, rule): a position of the text, and
    # the losses from there on.
    self._told: dict[
      tuple[bytes, int, Rule], tuple[int, Float[np.ndarray, " N"]]
    ] = {}
    # By router and text: the router's gates there.
    self._asked: dict[Hashable, dict[bytes, _Decided]] = {}

  def score(
    self, variant: Variant, examples: Sequence[Example]
  ) -> Iterator[list[Scored]]:
    """Computes the losses of answers.

    Args:
      variant: the way to mix.
      examples: rows as tokens.

    Yields:
      One list of `Scored` per batch, the longest rows first. Rows that were cut
      before the answer are left out.

    Raises:
      InputError: rule, cache policy and router do not fit together.
      FloatingPointError: a loss or a gate is not finite.
    """
    router, pace, rule = variant.router, variant.refresh_every, None
    if router is not None:
      rule, router = resolve(
        variant.rule, variant.cache, router, self._adapters
      )
      pace = 0 if router.at_prompt_only else pace
    follow = router is not None and (
      pace and (variant.cache == "recompute" or router.needs == "hidden")
    )
    remix = variant.cache == "remix"
    order = sorted(
      (i for i, e in enumerate(examples) if len(e.tokens) > e.prompt_length),
      key=lambda i: -len(examples[i].tokens),
    )
    for start in range(0, len(order), BATCH):
      places = order[start : start + BATCH]
      batch = [examples[i] for i in places]
      if rule is None:
        found = self._read(batch)
      elif follow:
        found = self._decode(batch, variant, router)
      else:
        gates = self.gates(router, pace, batch)
        found = self._score(batch, rule, remix, router, gates)
      for place, (losses, gates) in zip(places, found, strict=True):
        known = gates if gates is not None else np.zeros((len(losses), 0))
        check_finite([losses], [known], [len(losses)], [place])
      yield [
        Scored(place, losses, gates)
        for place, (losses, gates) in zip(places, found, strict=True)
      ]

  def gates(
    self, router: Router, refresh_every: int, examples: Sequence[Example]
  ) -> list[Float[np.ndarray, "_ E"]]:
    """Computes the gates of each answer token, [N, E] per answer.

    Args:
      router: any; a router of hidden states is called only at the prompt.
      refresh_every: tokens between two calls; 0 is once, at the prompt.
      examples: rows as tokens.
    """
    router = router.bind(self._adapters.names)
    if router.at_prompt_only or router.needs in ("hidden", "prompt"):
      refresh_every = 0
    if router.needs == "evidence" and refresh_every:
      return self._believed(router, refresh_every, examples)
    asked = []
    for example in examples:
      count = len(example.tokens) - example.prompt_length
      pace = refresh_every or count
      asked.append(
        [
          example.tokens[: example.prompt_length + n // pace * pace]
          for n in range(count)
        ]
      )
    known = self._decided(router, [text for row in asked for text in row])
    return [self._smoothed(router, row, known) for row in asked]

  def _decided(
    self, router: Router, texts: Iterable[Int[np.ndarray, " _"]]
  ) -> dict[bytes, _Decided]:
    """Computes a router's gates for texts as tokens, once per text."""
    known = self._asked.setdefault(_identity(router), {})
    new = {_key(text): text for text in texts}
    # Sorted by length, so that there is little padding. A short batch is filled
    # up, so that it needs no program of its own.
    new = sorted(
      (item for item in new.items() if item[0] not in known),
      key=lambda item: len(item[1]),
    )
    size = 4 * BATCH if router.needs in ("nothing", "text") else BATCH
    for start in range(0, len(new), size):
      keys, part = zip(*new[start : start + size], strict=True)
      filled = part + part[-1:] * (size - len(part))
      gates, seen = self._ask(router, [text.tolist() for text in filled])
      belief = seen if router.needs == "evidence" else gates
      rows = map(_Decided, np.asarray(gates), np.asarray(belief))
      known |= zip(keys, rows, strict=False)
    return known

  def _ask(self, router: Router, texts: list[list[int]]):
    """Computes gates [B, E] for texts; returns them and the other input."""
    if router.needs not in ("nothing", "text"):
      decoder = Decoder(
        self._base, texts, self._adapters, router,
        DecodeConfig(1, refresh_every=0), self._tokenizer,
      )  # fmt: skip
      return decoder.at_prompt()
    observation = ()
    if router.needs == "text":
      observation = router.observe(
        [self._tokenizer.decode(x, skip_special_tokens=True) for x in texts]
      )
    return np.asarray(_gates(router, observation, np.zeros(len(texts)))), None

  def _smoothed(self, router, texts, known) -> Float[np.ndarray, "N E"]:
    """Smooths an answer's gates, given those of its prefixes: [N, E]."""
    gates = [known[_key(texts[0])].gates]
    for before, text in itertools.pairwise(texts):
      now = gates[-1]
      if len(text) != len(before):
        now = np.asarray(router.smooth(now, known[_key(text)].gates))
      gates.append(now)
    return np.stack(gates)

  def _believed(
    self, router, refresh_every, examples
  ) -> list[Float[np.ndarray, "_ E"]]:
    """Computes the gates [N, E] of each answer by a router of `evidence`."""
    prompts = [e.tokens[: e.prompt_length] for e in examples]
    known, gates = self._decided(router, prompts), []
    for start in range(0, len(examples), BATCH):
      batch = examples[start : start + BATCH]
      for prompt, losses in zip(
        prompts[start:], self._by_each(batch, get_rule("exact")), strict=False
      ):
        first = known[_key(prompt)]
        belief, found = first.belief[None], [first.gates]
        for n, loss in enumerate(losses[:-1], 1):
          belief, now = _learn(router, belief, -loss[None]), found[-1]
          if n % refresh_every == 0:
            new = _gates(router, (), np.zeros(1), belief)[0]
            now = np.asarray(router.smooth(now, new))
          found.append(now)
        gates.append(np.stack(found))
    return gates

  def _alone(self, batch, experts: Sequence[int], rule: Rule):
    """Computes the losses [N] of each answer by one expert alone."""
    keys = [
      (_key(example.tokens), expert, rule)
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
      found = self._read(texts, rule, gates)
      for i, (losses, _) in zip(new, found, strict=True):
        self._told[keys[i]] = starts[i], losses
    told = [self._told[key] for key in keys]
    return [
      losses[start - first :]
      for (first, losses), start in zip(told, starts, strict=True)
    ]

  def _by_each(self, batch, rule: Rule) -> list[Float[np.ndarray, "_ E"]]:
    """Computes the losses [N, E] of each answer by each expert alone."""
    told = [
      self._alone(batch, [expert] * len(batch), rule)
      for expert in range(len(self._adapters.names))
    ]
    return [np.stack(losses, axis=1) for losses in zip(*told, strict=True)]

  def _score(self, batch, rule, remix, router, gates):
    """Scores texts under the gates [N, E] of each: [(losses, gates)]."""
    # Rules that equal `exact` for an expert alone share its losses.
    exact = get_rule("exact")
    alone = exact if rule.mix is exact.mix else rule
    if rule.of_outputs:
      mixed = [
        np.asarray(mix_probabilities(-told.T[None], now.T[None])[0])
        for told, now in zip(self._by_each(batch, alone), gates, strict=True)
      ]
      return [(-x, now) for x, now in zip(mixed, gates, strict=True)]
    experts = [_alone_throughout(now) for now in gates]
    if rule == exact and None not in experts and not router.prototypes:
      # `own`, an adapter by name and `top1` are such; often computed already.
      return list(zip(self._alone(batch, experts, rule), gates, strict=True))
    return self._read(batch, rule, gates, router, remix)

  def _read(self, batch, rule=None, gates=None, router=None, remix=False):
    """Reads texts once, under the gates [N, E] of each: [(losses, gates)]."""
    lengths = np.ones(BATCH, np.int32)
    lengths[: len(batch)] = [len(e.tokens) for e in batch]
    size = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((BATCH, size), np.int32)
    for row, example in zip(tokens, batch, strict=False):
      row[: len(example.tokens)] = example.tokens
    loras = table = None
    if gates is not None:
      loras = self._adapters.layers
      table = np.zeros((BATCH, size, len(self._adapters.names)), np.float32)
      for row, example, answer in zip(table, batch, gates, strict=False):
        # Token n is predicted at the position before it.
        first = example.prompt_length - 1
        row[:first] = answer[0]
        row[first : first + len(answer)] = answer
    hidden, seen = _states(
      self._base, loras,
      router if router is not None and router.prototypes else None,
      table, tokens, lengths,
      rule=rule, remix=remix,
    )  # fmt: skip
    starts = np.zeros(BATCH, np.int32)
    starts[: len(batch)] = [e.prompt_length - 1 for e in batch]
    counts = [len(e.tokens) - e.prompt_length for e in batch]
    # Rounded up to a power of two, so that few shapes compile.
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
    """Runs the decoder with the answers' tokens forced: [(losses, gates)]."""
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
