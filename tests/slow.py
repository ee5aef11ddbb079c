"""A slow, obvious decoder: the twin that the compiled one is compared with.

It keeps no cache: every token is a pass over the whole text, whose positions
each have their own gates. Routers are functions of plain numpy.
"""

from collections.abc import Callable, Sequence
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from tiny import by_projection, draw

from tokenlora_jax.encoders import MiniLM, MiniLMConfig, TextEncoder
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama

# All texts are padded to this, so that one pass is compiled.
LENGTH = 24


def make_base() -> Llama:
  """The preset `tiny`, in a list and in float32."""
  return Llama(PRESETS["tiny"], by_projection(PRESETS["tiny"], draw))


def letters(text: str) -> list[int]:
  return [1, *(3 + ord(letter) % 29 for letter in text), 2]


def make_encoder(seed: int = 0) -> TextEncoder:
  """A MiniLM of 8 numbers a text."""
  config = MiniLMConfig(
    vocab=32, width=8, mlp_width=16, layers=1, heads=2, max_length=64
  )
  rng = np.random.default_rng(seed)

  def make(name, shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return TextEncoder(MiniLM(config, make), letters, max_pieces=64)


@functools.partial(jax.jit, static_argnames="kept")
def whole_text(base, loras, tokens, gates, kept=None):
  """Reads texts [B, T] under gates [B, T, E], anew.

  Of the R rank activations of each expert the `kept` largest stay; None is all.

  Returns (hidden [B, T, D], log-probabilities [B, T, V], the share of rank-one
  parts that stayed, [B, T, E], a mean over the maps).
  """
  shares = []

  def adapt(lora, x, keys):
    low = jnp.einsum("bti,eri->bter", x, lora.a)
    stays = jnp.ones_like(low)
    if kept is not None:
      places = jnp.argsort(jnp.argsort(-jnp.abs(low)))
      stays = (places < kept).astype(low.dtype)
    shares.append(stays.mean(axis=-1))
    weighed = low * stays * (gates * lora.scaling)[..., None]
    return jnp.einsum("bter,ero->bto", weighed, lora.b)

  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask(jnp.ones_like(tokens))
  hidden, _ = base(tokens, places, mask, loras=loras, adapt=adapt)
  share = jnp.mean(jnp.stack(shares), axis=0)
  return hidden, jax.nn.log_softmax(base.logits(hidden)), share


def follow(
  base: Llama,
  adapters,
  prompt: Sequence[int],
  made: Sequence[int],
  route: Callable[[list[int], np.ndarray], np.ndarray],
  refresh_every: int = 0,
  smoothing: float = 0.0,
  rereads: bool = False,
  kept: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Follows a text that a decoder made.

  Args:
    base: the base.
    adapters: the experts.
    prompt: tokens.
    made: the tokens made after it.
    route: (the text's tokens so far, the mean of the hidden states of all that
      was read) -> gates [E].
    refresh_every: tokens between two calls of `route`; 0 is one call.
    smoothing: share of the gates before that stays.
    rereads: whether all that was read is read anew under new gates (not for a
      `route` that looks at hidden states: those stay what they were).
    kept: of `whole_text`.

  Returns:
    (gates [N, E] under which each token was made, times the share of parts that
    stayed; log-probabilities float[N] of the tokens made, and of the likeliest).
  """
  size, experts = len(prompt), len(adapters.names)
  tokens = np.zeros((1, LENGTH), np.int32)
  tokens[0, : size + len(made)] = [*prompt, *made]
  table = np.zeros((1, LENGTH, experts), np.float32)
  hidden, *_ = whole_text(base, adapters.layers, tokens, table)
  seen = [*np.asarray(hidden)[0, :size]]
  gates, log_probs, likeliest, now = [], [], [], None
  for n, token in enumerate(made):
    if n == 0 or (refresh_every and n % refresh_every == 0):
      new = route([*prompt, *made[:n]], np.mean(seen, axis=0))
      now = new if n == 0 else smoothing * now + (1 - smoothing) * new
      if n == 0 or rereads:
        table[0, : size + n] = now
    place = size - 1 + n
    table[0, place] = now
    hidden, rows, share = (
      np.asarray(x)[0, place]
      for x in whole_text(base, adapters.layers, tokens, table, kept)
    )
    if n > 0:
      seen.append(hidden)
    gates.append(now * share)
    log_probs.append(rows[token])
    likeliest.append(rows.max())
  return np.array(gates), np.array(log_probs), np.array(likeliest)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def softmax(x: Sequence[float]) -> np.ndarray:
  powers = [math.exp(value - max(x)) for value in x]
  return np.array(powers) / sum(powers)


def shaped(gates, top_k=0, temperature=1.0, threshold=0.0) -> np.ndarray:
  """Top-k, temperature and threshold of one row of gates, step by step."""
  gates = [float(gate) for gate in gates]
  total = sum(gates)
  if total > 0:
    powers = [gate ** (1 / temperature) for gate in gates]
    gates = [power * total / sum(powers) for power in powers]
  if top_k:
    best = sorted(range(len(gates)), key=lambda e: -gates[e])[:top_k]
    kept = sum(gates[e] for e in best)
    gates = [
      gate * total / kept if e in best and kept else 0.0
      for e, gate in enumerate(gates)
    ]
  return np.array(gates if max(gates) >= threshold else [0.0] * len(gates))
