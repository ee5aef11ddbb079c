"""The compiled parts of decoding: prefill, router calls, and the loop.

Axis letters: B batch, P prompt bucket, N new tokens, S cache slots, E experts,
D width, V vocabulary, M rows that read one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from tokenlora_jax.decoding.sampling import Sampler
from tokenlora_jax.mixing.mixture import (
  Read,
  expert_rows,
  one_hot_rows,
  read,
)
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.rules import Rule, get_rule, mix_probabilities
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.cache import KV, Cache
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import LayerLoras
from tokenlora_jax.model.loss import token_losses

# The end tokens are padded to this number, so that one program serves nearly
# all bases.
ENDS = 8


def pad_ends(ends: Sequence[int]) -> Int[np.ndarray, " K"]:
  """Pads the tokens that end a text with -1: int32[K], K a multiple of 8.

  Example:
    >>> pad_ends([2, 5]).tolist()
    [2, 5, -1, -1, -1, -1, -1, -1]
  """
  room = max(1, -(-len(ends) // ENDS)) * ENDS
  return np.array([*ends, *[-1] * (room - len(ends))], np.int32)


@dataclasses.dataclass(frozen=True)
class Reading:
  """The static settings of a compiled decoding program.

  Attributes:
    rule: how gates mix the adapters; None is the base alone.
    cache: the policy for keys and values of older gates.
    evidence: whether each expert also reads alone, for the posterior.
    refresh: whether the router runs in the graph, at each chunk.
    split: whether the base is sharded over several devices.
  """

  rule: Rule | None = None
  cache: Literal["reuse", "recompute", "remix"] = "reuse"
  evidence: bool = False
  refresh: bool = False
  split: bool = False

  @property
  def apart(self) -> bool:
    """True if each expert has a row of its own."""
    return self.rule is not None and (self.rule.of_outputs or self.evidence)

  @property
  def of_prompt(self) -> Reading:
    """The settings that a prefill needs, so that few prefills compile."""
    cache = "remix" if self.cache == "remix" else "reuse"
    return dataclasses.replace(self, cache=cache, refresh=False)

  def copies(self, experts: int) -> int:
    """M, the rows that read one sequence.

    1; or E, one per expert; or E + 1, if the mixture is a row too.
    """
    return experts + (not self.rule.of_outputs) if self.apart else 1

  def row_gates(
    self, gates: Float[Array | np.ndarray, "B E"]
  ) -> Float[Array | np.ndarray, "BM E"]:
    """Returns the rows' gates, float32[B * M, E], for gates [B, E]."""
    if not self.apart:
      return gates
    batch, experts = gates.shape
    rows = one_hot_rows(batch, experts)
    if self.rule.of_outputs:
      return rows
    rows = rows.reshape(batch, experts, experts)
    return jnp.append(rows, gates[:, None], axis=1).reshape(-1, experts)

  def read(
    self,
    base: Llama,
    loras: Sequence[LayerLoras] | None,
    router: Router | None,
    gates: Float[Array | np.ndarray, "B E"],
    tokens: Int[Array, "BM T"],
    places: Int[Array, "BM T"],
    mask: Bool[Array, "BM T S"],
    caches: tuple[Cache | None, Cache | None] = (None, None),
  ) -> Read:
    """Reads tokens [B * M, T] under gates [B, E]; see `mixing.mixture.read`."""
    return read(
      base, tokens, places, mask,
      rule=self.rule and self._each(gates.shape[-1]),
      loras=loras,
      gates=self.row_gates(gates),
      router=router,
      remix=self.cache == "remix",
      caches=caches,
    )  # fmt: skip

  def _each(self, experts: int) -> Rule:
    """Returns a rule for all rows: `exact` for experts that read alone."""
    alone = get_rule("exact").mix
    if not self.apart or self.rule.of_outputs or self.rule.mix is alone:
      return self.rule

    def mix(low, gates, scaling):
      low, gates = (
        x.reshape(-1, experts + 1, *x.shape[1:]) for x in (low, gates)
      )
      rows = [
        alone(low[:, :-1], gates[:, :-1], scaling),
        self.rule.mix(low[:, -1:], gates[:, -1:], scaling),
      ]
      mixed = jnp.concatenate(rows, axis=1)
      return mixed.reshape(-1, *mixed.shape[2:])

    return dataclasses.replace(self.rule, mix=mix)

  def join(
    self,
    gates: Float[Array, "B E"],
    logits: Float[Array, "BM V"],
    hidden: Float[Array, "BM D"],
  ) -> tuple[
    Float[Array, "B V"], Float[Array, "B D"], Float[Array, "B E V"] | None
  ]:
    """Combines the predictions of each sequence's rows.

    Args:
      gates: float32[B, E].
      logits: float32[B * M, V].
      hidden: [B * M, D].

    Returns:
      (logits [B, V]; hidden [B, D]; log-probabilities by each expert alone,
      [B, E, V], or None if none reads alone).
    """
    if not self.apart:
      return logits, hidden, None
    batch, experts = gates.shape
    logits = logits.reshape(batch, -1, logits.shape[-1])
    hidden = hidden.reshape(batch, -1, hidden.shape[-1])
    alone = jax.nn.log_softmax(logits[:, :experts])
    if not self.rule.of_outputs:
      return logits[:, -1], hidden[:, -1], alone
    shares = gates / gates.sum(axis=1, keepdims=True)
    hidden = jnp.einsum("bed,be->bd", hidden, shares.astype(hidden.dtype))
    return mix_probabilities(alone, gates[..., None]), hidden, alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """The carry of the decoding loop.

  Attributes:
    cache: keys and values of all tokens read, B * M rows.
    looked: the base's own cache, for routers with `looks_first`; or None.
    token: int32[B], the last token of each text, not read yet.
    gates: float32[B, E], the current chunk's gates.
    belief: float32[B, E], the log-belief in each expert, for routers of
      `evidence`; otherwise [B, 0].
    hidden: float32[B, D], the sum of the last hidden states of the tokens
      read, for routers of `hidden`.
    lengths: int32[B], tokens of each prompt.
    made: int32 scalar, new tokens of each text so far.
    done: bool[B], texts that have ended.
    tokens: int32[B, N], the new tokens; filler after the end.
    log_probs: float32[B, N], their log-probabilities; 0 after the end.
    trace: float32[B, N, E], the gates of each new token; of in-layer routers
      the mean over the adapted projections.
    key: the PRNG key of sampling.
  """

  cache: Cache
  looked: Cache | None
  token: Int[Array | np.ndarray, " B"]
  gates: Float[Array | np.ndarray, "B E"]
  belief: Float[Array | np.ndarray, "B E"] | Float[Array | np.ndarray, "B 0"]
  hidden: Float[Array | np.ndarray, "B D"]
  lengths: Int[Array | np.ndarray, " B"]
  made: Int[Array | np.integer, ""]
  done: Bool[Array | np.ndarray, " B"]
  tokens: Int[Array | np.ndarray, "B N"]
  log_probs: Float[Array | np.ndarray, "B N"]
  trace: Float[Array | np.ndarray, "B N E"]
  key: Key[Array, ""]

  def seen(self, needs: str) -> Float[Array, "B _"]:
    """Returns the input of a router that runs in the graph."""
    if needs == "evidence":
      return self.belief
    # The mean over the prompt and the new tokens that were read.
    read = self.lengths + jnp.maximum(self.made - 1, 0)
    return self.hidden / read[:, None]


def _read_whole(reading, base, loras, router, gates, tokens, pad):
  """Reads padded texts [B, P] from their start.

  Returns (hidden [B * M, P, D]; one `KV` per layer; the base's own, or None).
  """
  copies = reading.copies(gates.shape[-1])
  tokens, pad = expert_rows(tokens, copies), expert_rows(pad, copies)
  places = jnp.arange(tokens.shape[1]) - pad[:, None]
  found = reading.read(
    base, loras, router, gates, tokens,
    jnp.maximum(places, 0),
    causal_mask((places >= 0).astype(jnp.int32)),
  )  # fmt: skip
  return found.hidden, found.cache, found.looked


@functools.partial(jax.jit, static_argnames=("reading", "slots"))
def prefill(
  base: Llama,
  loras: Sequence[LayerLoras] | None,
  router: Router | None,
  gates: Float[Array, "B E"],
  tokens: Int[Array, "B P"],
  pad: Int[Array, " B"],
  *,
  reading: Reading,
  slots: int,
) -> tuple[Cache, Cache | None]:
  """Reads padded prompts [B, P]; returns (cache, the base's own or None)."""
  with jax.named_scope("prefill"):
    _, layers, looked = _read_whole(
      reading, base, loras, router, gates, tokens, pad
    )
  rows = expert_rows(pad, reading.copies(gates.shape[-1]))
  cache = Cache.of_prompt(layers, rows, slots, reading.split)
  if looked:
    looked = Cache.of_prompt(looked, rows, slots, reading.split)
  return cache, looked


@jax.jit
def prompt_hidden(
  base: Llama, tokens: Int[Array, "B P"], pad: Int[Array, " B"]
) -> Float[Array, "B D"]:
  """Computes the base's mean last hidden state over padded prompts: [B, D]."""
  real = jnp.arange(tokens.shape[1]) >= pad[:, None]
  gates = jnp.zeros((len(tokens), 0))
  hidden, _, _ = _read_whole(Reading(), base, None, None, gates, tokens, pad)
  total = jnp.sum(hidden * real[..., None], axis=1, dtype=jnp.float32)
  return total / real.sum(axis=1, keepdims=True)


@jax.jit
def prompt_evidence(
  base: Llama,
  loras: Sequence[LayerLoras],
  tokens: Int[Array, "B P"],
  pad: Int[Array, " B"],
  gates: Float[Array, "B E"],
) -> Float[Array, "B E"]:
  """Computes each prompt's log-probability by each expert alone: [B, E].

  Prompts are padded. Of `gates` [B, E] only the shape counts. The first token
  is given, so it has no probability.
  """
  batch, experts = gates.shape
  rows = expert_rows(tokens, experts), expert_rows(pad, experts)
  gates = one_hot_rows(batch, experts)
  reading = Reading(get_rule("exact"))
  hidden, _, _ = _read_whole(reading, base, loras, None, gates, *rows)
  losses = token_losses(base, hidden, jnp.roll(rows[0], -1, axis=1))
  places = jnp.arange(tokens.shape[1] - 1)
  told = -losses[:, :-1] * (places >= rows[1][:, None])
  return told.sum(axis=1).reshape(batch, experts)


@jax.jit
def read_prompt(
  router: Router,
  base: Llama,
  loras: Sequence[LayerLoras],
  tokens: Int[Array, "B P"],
  pad: Int[Array, " B"],
) -> Any:
  """Runs the router's own pass over padded prompts [B, P]."""
  return router.read_prompt(base, loras, tokens, pad)


@jax.jit
def route(
  router: Router, observation: Any, seen: Any, batch: Float[Array, " B"]
) -> Float[Array, "B E"]:
  """Calls a router: float32[B, E]. Of `batch` [B] only the length counts."""
  with jax.named_scope("router"):
    return router.gates(batch.shape[0], observation, seen)


@jax.jit
def smooth(
  router: Router, before: Float[Array, "B E"], gates: Float[Array, "B E"]
) -> Float[Array, "B E"]:
  """Smooths a router's new gates with the old ones: float32[B, E]."""
  return router.smooth(before, gates)


@functools.partial(
  jax.jit,
  static_argnames=("reading", "sampler", "chunk"),
  donate_argnames="state",
)
def decode(
  base: Llama,
  loras: Sequence[LayerLoras] | None,
  router: Router | None,
  state: DecodeState,
  prompt: Int[Array, "B _"],
  forced: Int[Array, "B N"] | None,
  limit: Int[Array, ""],
  ends: Int[Array, " K"],
  *,
  reading: Reading,
  sampler: Sampler,
  chunk: int,
) -> DecodeState:
  """Decodes up to `limit` chunks of tokens, until all texts have ended.

  Args:
    prompt: int32[B, P + 1], padded on the left.
    forced: int32[B, N], given tokens; None samples them.
    ends: int32[K], the tokens that end a text, padded with -1; the first one
      fills a text after its end.
  """
  copies = reading.copies(state.gates.shape[-1])

  def step(state, _):
    key, now = jax.random.split(state.key)
    cache = state.cache
    with jax.named_scope("step"):
      found = reading.read(
        base, loras, router, state.gates,
        expert_rows(state.token, copies)[:, None],
        cache.positions(1),
        cache.mask(1),
        (cache, state.looked),
      )  # fmt: skip
      logits, hidden, alone = reading.join(
        state.gates, base.logits(found.hidden[:, 0]), found.hidden[:, 0]
      )
      gates = state.gates
      if router is not None and router.prototypes:
        gates = found.gates[:, -1]
      token = sampler(logits, now) if forced is None else forced[:, state.made]
    token = jnp.where(state.done, jnp.maximum(ends[0], 0), token)
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=1)
    log_prob = jnp.where(state.done[:, None], 0, log_prob)
    belief = state.belief
    if reading.evidence:
      told = jnp.take_along_axis(alone, token[:, None, None], axis=2)[..., 0]
      belief = router.learn(belief, told)
    # The first step reads the prompt's last token, which the sum holds already.
    fresh = jnp.where(state.made > 0, hidden, 0).astype(jnp.float32)
    at = (0, state.made)
    return DecodeState(
      cache=found.cache,
      looked=found.looked,
      token=token,
      gates=state.gates,
      belief=belief,
      hidden=state.hidden + fresh,
      lengths=state.lengths,
      made=state.made + 1,
      done=state.done | jnp.isin(token, ends),
      tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
      log_probs=jax.lax.dynamic_update_slice(state.log_probs, log_prob, at),
      trace=jax.lax.dynamic_update_slice(state.trace, gates[:, None], (*at, 0)),
      key=key,
    ), None

  def reread(state):
    """Recomputes the KV cache of all tokens read, under the current gates."""
    slots = state.cache.layers[0].k.shape[2]
    # The token of each slot. Slots after the newest are masked until written.
    texts = jnp.concatenate([prompt, state.tokens], axis=1)[:, :slots]
    pad = prompt.shape[1] - state.lengths
    with jax.named_scope("reread"):
      _, layers, looked = _read_whole(
        reading, base, loras, router, state.gates, texts, pad
      )

    def filled(
      cache: Cache | None, layers: tuple[KV, ...] | None
    ) -> Cache | None:
      return cache and dataclasses.replace(cache, layers=tuple(layers))

    return dataclasses.replace(
      state,
      cache=filled(state.cache, layers),
      looked=filled(state.looked, looked),
    )

  def one_chunk(carry):
    state, count = carry
    first = state.made == 0
    if reading.refresh:
      with jax.named_scope("router"):
        seen = state.seen(router.needs)
        gates = router.gates(len(state.token), (), seen)
        gates = jnp.where(first, gates, router.smooth(state.gates, gates))
      state = dataclasses.replace(state, gates=gates)
    if reading.cache == "recompute":
      # The prefill ran under the first chunk's gates.
      state = jax.lax.cond(first, lambda state: state, reread, state)
    state, _ = jax.lax.scan(step, state, length=chunk)
    return state, count + 1

  def more(carry):
    state, count = carry
    left = state.made < state.tokens.shape[1]
    # If gates or logits are not finite, no log-probability is finite either.
    sound = jnp.all(jnp.isfinite(state.log_probs))
    return (count < limit) & left & sound & ~jnp.all(state.done)

  return jax.lax.while_loop(more, one_chunk, (state, jnp.int32(0)))[0]
