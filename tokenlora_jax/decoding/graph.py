"""The compiled parts of decoding: read prompts, ask the router, make chunks.

Axis letters: B batch, P prompt bucket, N new tokens, E experts, D width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokenlora_jax.mixing.rules import mixture
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.cache import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Everything that changes while a batch of texts is made.

  Attributes:
    cache: keys and values of all tokens read.
    token: int32[B], the last token of each text, not read yet.
    gates: float32[B, E], of the running chunk.
    hidden: float32[B, D], the sum of the last hidden states of the tokens
      read, for routers that look at their mean.
    lengths: int32[B], tokens of each prompt.
    made: int32 scalar, tokens made of each text.
    done: bool[B], texts that have ended.
    tokens: int32[B, N], the tokens made; filler after the end.
    log_probs: float32[B, N], their log-probabilities.
    trace: float32[B, N, E], the gates of each token made.
    key: of the sampling.
  """

  cache: Cache
  token: jax.Array
  gates: jax.Array
  hidden: jax.Array
  lengths: jax.Array
  made: jax.Array
  done: jax.Array
  tokens: jax.Array
  log_probs: jax.Array
  trace: jax.Array
  key: jax.Array

  @property
  def mean_hidden(self) -> jax.Array:
    """float32[B, D], over the prompt and the tokens made that were read."""
    read = self.lengths + jnp.maximum(self.made - 1, 0)
    return self.hidden / read[:, None]


@functools.partial(jax.jit, static_argnames=("rule", "slots"))
def prefill(base, loras, gates, tokens, pad, *, rule, slots):
  """Reads padded prompts [B, P]; returns (cache, sum of hidden [B, D])."""
  places = jnp.arange(tokens.shape[1]) - pad[:, None]
  real = places >= 0
  with jax.named_scope("prefill"):
    hidden, layers = base(
      tokens,
      jnp.maximum(places, 0),
      causal_mask(real.astype(jnp.int32)),
      loras=loras,
      adapt=None if rule is None else mixture(rule, gates),
    )
  cache = Cache.of_prompt(layers, pad, slots)
  return cache, jnp.sum(hidden * real[..., None], axis=1, dtype=jnp.float32)


@jax.jit
def route(router, observation, hidden, batch):
  """Asks a router: float32[B, E]. Only the length of `batch` [B] matters."""
  with jax.named_scope("router"):
    return router.gates(batch.shape[0], observation, hidden)


@functools.partial(
  jax.jit,
  static_argnames=("rule", "sampler", "chunk"),
  donate_argnames="state",
)
def decode(
  base, loras, router, state, forced, limit, end, *, rule, sampler, chunk
) -> DecodeState:
  """Makes up to `limit` chunks of tokens, until all texts have ended.

  `router` is None where the gates of the state are to be kept, and `forced`
  where tokens are to be picked: otherwise they are int32[B, N], given.
  """

  def step(state, _):
    key, now = jax.random.split(state.key)
    cache = state.cache
    with jax.named_scope("step"):
      hidden, cache = base(
        state.token[:, None],
        cache.positions(1),
        cache.mask(1),
        cache,
        loras=loras,
        adapt=None if rule is None else mixture(rule, state.gates),
      )
      logits = base.logits(hidden[:, 0])
      token = sampler(logits, now) if forced is None else forced[:, state.made]
    token = jnp.where(state.done, jnp.maximum(end, 0), token)
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=1)
    # The first token read is the prompt's last, which is in the sum already.
    fresh = jnp.where(state.made > 0, hidden[:, 0], 0).astype(jnp.float32)
    at = (0, state.made)
    return DecodeState(
      cache=cache,
      token=token,
      gates=state.gates,
      hidden=state.hidden + fresh,
      lengths=state.lengths,
      made=state.made + 1,
      done=state.done | (token == end),
      tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
      log_probs=jax.lax.dynamic_update_slice(state.log_probs, log_prob, at),
      trace=jax.lax.dynamic_update_slice(
        state.trace, state.gates[:, None], (*at, 0)
      ),
      key=key,
    ), None

  def one_chunk(carry):
    state, count = carry
    if router is not None:
      with jax.named_scope("router"):
        gates = router.gates(state.token.shape[0], (), state.mean_hidden)
      state = dataclasses.replace(state, gates=gates)
    state, _ = jax.lax.scan(step, state, length=chunk)
    return state, count + 1

  def more(carry):
    state, count = carry
    left = state.made < state.tokens.shape[1]
    return (count < limit) & left & ~jnp.all(state.done)

  return jax.lax.while_loop(more, one_chunk, (state, jnp.int32(0)))[0]
