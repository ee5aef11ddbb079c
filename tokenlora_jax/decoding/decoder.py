"""Decodes with a base and a mixture of adapters; a router refreshes the gates.

  refresh_every 2:   router  token 0  token 1  router  token 2  token 3  ...

Token n of a text (n = 0, 1, ...) is decoded under the gates of its chunk,
floor(n / refresh_every). The router computes them from the prompt and the
tokens before that chunk; a router of hidden states lacks the newest of these,
which is not read yet. Prompts are padded on the left to a bucket. The prefill
reads all but their last token in one pass, under the first gates. Then each
step reads one token and predicts the next, so every chunk, the first too, is
one router call and one inner `lax.scan`.

A cache policy says what a refresh does to keys and values of older gates:
`reuse` keeps them, `recompute` reads the whole text again, `remix` applies the
current gates to the values' adapters.

If the router runs in the graph, one compiled call decodes whole texts. A router
that reads text needs the host's tokenizer, so the loop returns after each
chunk. Under the rule `probabilities` and the router `posterior` each expert
reads alone, as a row of the batch with its own cache.

Axis letters: B batch, P prompt bucket, N new tokens, E experts, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.tokens import Tokenizer, check_vocab
from tokenlora_jax.decoding import graph
from tokenlora_jax.decoding.finite import check_finite
from tokenlora_jax.decoding.generation import Generation, Pace
from tokenlora_jax.decoding.prompts import Prompt, encode_checked
from tokenlora_jax.decoding.sampling import Sampler
from tokenlora_jax.decoding.text import TextStream, text_ends
from tokenlora_jax.mixing.mixture import resolve
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters

# Steps of a chunk if the gates are computed once, at the prompt.
UNREFRESHED_CHUNK = 16


def bucket(length: int) -> int:
  """Returns the padded length of a prompt; few lengths mean few programs.

  Powers of two from 32 to 256, then multiples of 256.

  Args:
    length: tokens of the prompt.

  Example:
    >>> [bucket(n) for n in (1, 33, 256, 257)]
    [32, 64, 256, 512]
  """
  if length > 256:
    return -(-length // 256) * 256
  return max(32, 1 << (length - 1).bit_length())


class Decoder:
  """Decodes one batch of texts; iterating yields the texts so far.

  Args:
    base: the Llama, in the list layout.
    prompts: texts, or lists of token ids.
    adapters: the experts; None is the base alone.
    router: computes the gates; needed with adapters.
    config: settings of decoding.
    tokenizer: needed for text in, text out, the end token and text routers.
    chunked: return to the host after each chunk, to show the texts so far.
    forced: int32[B, N], N at least `config.max_new_tokens`: given tokens, which
      are decoded in place of sampled ones, for their `log_probs`.

  Raises:
    InputError: two of the arguments do not fit together.

  Example:
    >>> from tokenlora_jax import load_base, make_router, random_adapters
    >>> base = load_base("random:tiny")
    >>> adapters = random_adapters(base, experts=2, rank=4)
    >>> decoder = Decoder(base, [[1, 2]], adapters, make_router("uniform"))
    >>> decoder.prompt_gates().tolist()
    [[0.5, 0.5]]
  """

  def __init__(
    self,
    base: Llama,
    prompts: Sequence[Prompt],
    adapters: Adapters | None = None,
    router: Router | None = None,
    config: DecodeConfig = DecodeConfig(),
    tokenizer: Tokenizer | None = None,
    chunked: bool = False,
    forced: Int[np.ndarray, "B N"] | None = None,
  ):
    self.config = config
    self.tokenizer = tokenizer
    self._base = base
    self._loras = rule = None
    if adapters is not None:
      adapters.check(base.config)
      if router is None:
        raise InputError("router: adapters need one, such as 'uniform'")
      rule, router = resolve(config.rule, config.cache, router, adapters)
      # Cast once, not in every step.
      self._loras = adapters.astype(base.dtype).layers
    elif router is not None:
      raise InputError("router: there are no adapters to route among")
    self._router = router
    devices = base.embedding[...].sharding.device_set
    # The state's device; None if there are several, since XLA then shards it.
    self._place = next(iter(devices)) if len(devices) == 1 else None
    new = config.max_new_tokens
    refreshes = 0 < config.refresh_every < new
    refreshes &= router is None or not router.at_prompt_only
    chunk = config.refresh_every if refreshes else UNREFRESHED_CHUNK
    self._chunk = min(chunk, new)
    chunks = math.ceil(new / self._chunk)
    # Slots for new tokens: whole chunks, or more, so that forced texts of
    # several lengths share a shape.
    self._room = chunks * self._chunk
    self._forced = None
    if forced is not None:
      self._room = max(self._room, forced.shape[1])
      missing = self._room - forced.shape[1]
      self._forced = np.pad(forced, ((0, 0), (0, missing)))
    self._prompts = self._encode(prompts)
    self._sampler = Sampler(config.temperature, config.top_k, config.top_p)
    if tokenizer is not None and config.stop_at_eos:
      check_vocab(None, tokenizer, base.config.vocab)
    ends, self._stop = text_ends(config, tokenizer)
    self._ends = graph.pad_ends(ends)
    needs = self._needs = router.needs if router is not None else "nothing"
    reads_text = needs == "text" or (
      needs == "evidence" and router.prior.needs == "text"
    )
    if reads_text and tokenizer is None:
      raise InputError("router: one that reads text needs a tokenizer")
    # A router that reads text runs on the host, between chunks.
    self._host_router = router if needs == "text" and refreshes else None
    decides = refreshes and needs in ("text", "hidden", "evidence")
    self._reading = graph.Reading(
      rule,
      # If gates never change, no cached value is older than they are.
      config.cache if decides else "reuse",
      evidence=refreshes and needs == "evidence",
      refresh=refreshes and needs in ("hidden", "evidence"),
      split=len(devices) > 1,
    )
    # The compiled loop gets the router only if it calls it.
    inside = self._reading.refresh or (router is not None and router.prototypes)
    self._graph_router = router if inside else None
    stops = self._host_router is not None or bool(self._stop) or chunked
    self._chunks_a_call = 1 if stops else chunks
    self._pace = Pace()

  def _encode(self, prompts) -> list[list[int]]:
    if isinstance(prompts, str):
      raise InputError("prompts: want a list of texts, not one text")
    if len(prompts) == 0:
      raise InputError("prompts: there are none")
    # Forced texts are cut to length already; their padding may be longer.
    new = self.config.max_new_tokens if self._forced is None else 0
    encoded = []
    for i, prompt in enumerate(prompts):
      try:
        encoded.append(
          encode_checked(prompt, self.tokenizer, self._base.config, new)
        )
      except InputError as error:
        raise InputError(f"prompt {i}: {error}") from None
    return encoded

  def _ask(self, router: Router, made=None, seen=None, before=None, rows=None):
    """Calls a router on the texts so far; returns float32[B, E].

    Args:
      router: the router.
      made: each text's new tokens, for a router that reads text.
      seen: the router's other input; see `Router.gates`.
      before: the gates until now; None at the prompt.
      rows: indices of the texts for a router that reads text; the others keep
        their gates. None is all texts.
    """
    observation = ()
    if rows is None:
      rows = np.arange(len(self._prompts))
    # Rounded up to a power of two, so that few shapes compile as texts end.
    size = min(1 << (len(rows) - 1).bit_length(), len(self._prompts))
    asked = np.resize(rows, size)
    with self._pace.timing("router"):
      if router.needs == "text":
        made = made or [[]] * len(self._prompts)
        observation = router.observe(
          [
            self.tokenizer.decode(
              [*self._prompts[i], *made[i]], skip_special_tokens=True
            )
            for i in asked
          ]
        )
      gates = graph.route(router, observation, seen, np.zeros(size))
      if len(rows) < len(self._prompts):
        whole = np.array(before)
        whole[asked] = gates
        gates = jnp.asarray(whole)
      if before is not None:
        gates = graph.smooth(router, before, gates)
      gates.block_until_ready()
    return gates

  def _ask_at_prompt(self, router: Router) -> tuple[Float[Array, "B E"], Any]:
    """Computes the first gates; returns them and the router's other input."""
    whole = bucket(max(map(len, self._prompts)))
    tokens, pad = _left_pad(self._prompts, whole)
    seen = None
    if router.needs == "hidden":
      # The base alone reads the whole prompt, its last token included.
      seen = graph.prompt_hidden(self._base, tokens, pad)
    elif router.needs == "prompt":
      seen = graph.read_prompt(router, self._base, self._loras, tokens, pad)
    elif router.needs == "evidence":
      prior, _ = self._ask_at_prompt(router.prior)
      seen = jnp.log(prior / prior.sum(axis=1, keepdims=True))
      if router.counts_prompt:
        told = graph.prompt_evidence(
          self._base, self._loras, tokens, pad, prior
        )
        seen = router.learn(seen, told)
    return self._ask(router, seen=seen), seen

  def at_prompt(self) -> tuple[Float[Array, "B E"], Any]:
    """Computes the gates [B, E] at the prompts.

    Returns:
      (float32[B, E], the router's other input: of a router of `evidence` its
      log-belief float32[B, E]; see `Router.gates`).
    """
    return self._ask_at_prompt(self._router)

  def prompt_gates(self) -> Float[np.ndarray, "B E"]:
    """Computes the gates at the prompts, float32[B, E]."""
    return np.asarray(self.at_prompt()[0])

  def _start(self) -> graph.DecodeState:
    """Computes the first gates and runs the prefill."""
    self._streams = (
      [
        TextStream(self.tokenizer, prompt, self._stop, self._ends)
        for prompt in self._prompts
      ]
      if self.tokenizer is not None
      else []
    )
    batch = len(self._prompts)
    lengths = np.array([len(p) for p in self._prompts], np.int32)
    size = bucket(int(lengths.max()) - 1)
    gates, seen = np.zeros((batch, 0), np.float32), None
    router = self._router
    if router is not None:
      gates, seen = self._ask_at_prompt(router)
    hidden = np.zeros((batch, self._base.config.width), np.float32)
    if self._needs == "hidden":
      hidden = seen * lengths[:, None]
    tokens, pad = _left_pad([p[:-1] for p in self._prompts], size)
    last = np.array([p[-1] for p in self._prompts], np.int32)
    self._padded = np.append(tokens, last[:, None], axis=1)
    with self._pace.timing("prefill"):
      cache, looked = graph.prefill(
        self._base, self._loras,
        router if router is not None and router.prototypes else None,
        gates, tokens, pad,
        reading=self._reading.of_prompt, slots=size + self._room,
      )  # fmt: skip
      jax.block_until_ready(cache)
    room = batch, self._room
    # NumPy arrays, since JAX compiles a program for each way to fill one. They
    # are placed like the state that a call returns: otherwise the second call
    # would compile again.
    return self._placed(
      graph.DecodeState(
        cache=cache,
        looked=looked,
        token=last,
        gates=gates,
        belief=(
          seen
          if self._needs == "evidence"
          else np.zeros((batch, 0), np.float32)
        ),
        hidden=hidden,
        lengths=lengths,
        made=np.int32(0),
        done=np.zeros(batch, bool),
        tokens=np.full(room, max(self._ends[0], 0), np.int32),
        log_probs=np.zeros(room, np.float32),
        trace=np.zeros((*room, gates.shape[1]), np.float32),
        key=jax.random.key(self.config.seed),
      )
    )

  def _placed(self, tree):
    return jax.device_put(tree, self._place)

  def __iter__(self) -> Iterator[Generation]:
    """Decodes; yields the texts so far after each call of the loop."""
    state = self._start()
    while True:
      with self._pace.timing("decode"):
        state = graph.decode(
          self._base, self._loras, self._graph_router, state, self._padded,
          self._forced, self._chunks_a_call, self._ends,
          reading=self._reading, sampler=self._sampler, chunk=self._chunk,
        )  # fmt: skip
        made = min(int(state.made), self.config.max_new_tokens)
      so_far, ended = self._read_out(state, made)
      yield so_far
      if made == self.config.max_new_tokens or ended.all():
        return
      state = dataclasses.replace(state, done=self._placed(ended))
      if self._host_router is not None:
        texts = zip(so_far.tokens.tolist(), so_far.lengths, strict=True)
        gates = self._ask(
          self._host_router,
          made=[row[:n] for row, n in texts],
          before=state.gates,
          rows=np.flatnonzero(~ended),
        )
        state = dataclasses.replace(state, gates=self._placed(gates))

  def _read_out(
    self, state: graph.DecodeState, made: int
  ) -> tuple[Generation, Bool[np.ndarray, " B"]]:
    """Returns the texts so far, and bool[B], true for texts that have ended."""
    # Copies, since the next call reuses the state's buffers.
    tokens, log_probs, gates = (
      np.asarray(array)[:, :made].copy()
      for array in (state.tokens, state.log_probs, state.trace)
    )
    at_end = np.isin(tokens, self._ends)
    ended = at_end.any(axis=1)
    lengths = np.where(ended, at_end.argmax(axis=1) + 1, made).astype(np.int32)
    texts = pieces = None
    if self.tokenizer is not None:
      texts, pieces = [], []
      for i, row in enumerate(tokens):
        stream = self._streams[i]
        stream.push(row[len(stream.pieces) : lengths[i]])
        lengths[i] = len(stream.pieces)
        ended[i] |= stream.stopped
        texts.append(stream.text)
        pieces.append(list(stream.pieces))
    check_finite(log_probs, gates, lengths)
    stats = {
      "prompt_tokens": sum(map(len, self._prompts)),
      **self._pace.count(int(lengths.sum())),
    }
    after = np.arange(made)[None] >= lengths[:, None]
    tokens[after], log_probs[after] = max(self._ends[0], 0), 0
    so_far = Generation(tokens, log_probs, gates, lengths, texts, stats, pieces)
    return so_far, ended


def _left_pad(
  prompts: Sequence[Sequence[int]], length: int
) -> tuple[Int[np.ndarray, "B {length}"], Int[np.ndarray, " B"]]:
  """Pads on the left: (int32[B, length], int32[B] zeros of each row)."""
  tokens = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[length - len(prompt) :] = prompt
  pad = np.array([length - len(prompt) for prompt in prompts], np.int32)
  return tokens, pad


def generate(
  base: Llama,
  prompts: Sequence[Prompt],
  adapters: Adapters | None = None,
  router: Router | None = None,
  config: DecodeConfig = DecodeConfig(),
  tokenizer: Tokenizer | None = None,
) -> Generation:
  """Generates texts with a mixture of adapters.

  The router computes the gates of token n from the prompt and the first
  floor(n / refresh_every) * refresh_every new tokens (Belofsky, 2023,
  "Token-Level Adaptation of LoRA Adapters"); with refresh_every 0, from the
  prompt alone.

  Args:
    base: from `load_base`.
    prompts: B texts, or B lists of token ids, of any lengths.
    adapters: from `load_adapters` or a bank; None is the base alone.
    router: from `make_router` or a bank; needed with adapters.
    config: new tokens, refresh, rule, cache policy and sampling.
    tokenizer: from `load_tokenizer`; needed for text in, text out, the end
      token and routers that read text.

  Returns:
    A `Generation`: tokens [B, N], gates [B, N, E], texts, stats.

  Raises:
    InputError: two of the arguments do not fit together.
    FloatingPointError: gates or logits are not finite; names row and token.

  Example:
    >>> from tokenlora_jax import load_base, make_router, random_adapters
    >>> base = load_base("random:tiny")
    >>> out = generate(
    ...   base,
    ...   [[1, 2, 3]],
    ...   random_adapters(base, experts=2, rank=4),
    ...   make_router("uniform", experts=2),
    ...   DecodeConfig(max_new_tokens=4),
    ... )
    >>> out.tokens.shape, out.gates[0, 0].tolist()
    ((1, 4), [0.5, 0.5])
  """
  *_, last = Decoder(base, prompts, adapters, router, config, tokenizer)
  return last
