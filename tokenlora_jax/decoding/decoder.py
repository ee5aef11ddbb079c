"""Decodes with a base and a mixture of adapters; a router refreshes the gates.

Token n of a text (n = 0, 1, ...) is made under the gates of its chunk,
floor(n / refresh_every), which the router decided from the prompt and the
tokens before that chunk (one that looks at hidden states: all but the newest of
them, which is not read yet). Prompts are padded on the left to a bucket, and all
but their last token are read in one pass (prefill) under the first gates; then
each step reads one token and makes the next, so that a chunk is one router call
and one inner `lax.scan`, for the first chunk as for all others.

What was read under older gates is kept (`reuse`, each position lives under the
gates of its own time), read anew at each refresh (`recompute`), or kept with the
adapters' part of values apart, which then follows today's gates (`remix`).

Routers that look inside the graph run whole texts in one compiled call; a
router that reads text returns to the host once a chunk, for its tokenizer. Where
experts read alone (the rule `probabilities`, the router `posterior`) each is a
row of the batch with a cache of its own.

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

# Steps of a chunk where the gates are decided once, at the prompt.
UNREFRESHED_CHUNK = 16


def bucket(length: int) -> int:
  """Returns the padded length of a prompt, so that few shapes compile.

  Powers of two from 32 to 256, then multiples of 256.

  Example:
    >>> [bucket(n) for n in (1, 33, 256, 257)]
    [32, 64, 256, 512]
  """
  if length > 256:
    return -(-length // 256) * 256
  return max(32, 1 << (length - 1).bit_length())


class Decoder:
  """One batch of texts being made; iterate over it for chunks as they come.

  Args:
    base: with its layers in a list.
    prompts: texts, or lists of token ids.
    adapters: the experts; none is the base alone.
    router: computes the gates; needed with adapters.
    config: how.
    tokenizer: needed for text in, text out, the end token and text routers.
    chunked: come back to the host after each chunk, to show it.
    forced: int32[B, N], N at least `config.max_new_tokens`: tokens that are
      taken instead of picking some, for their `log_probs`.

  Raises:
    InputError: something of these does not fit together.
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
      # Once, not in every step.
      self._loras = adapters.astype(base.dtype).layers
    elif router is not None:
      raise InputError("router: there are no adapters to route among")
    self._router = router
    devices = base.embedding[...].sharding.device_set
    # Where the state goes; several devices decide that between themselves.
    self._place = next(iter(devices)) if len(devices) == 1 else None
    new = config.max_new_tokens
    refreshes = 0 < config.refresh_every < new
    refreshes &= router is None or not router.at_prompt_only
    chunk = config.refresh_every if refreshes else UNREFRESHED_CHUNK
    self._chunk = min(chunk, new)
    chunks = math.ceil(new / self._chunk)
    # Room for the tokens made: whole chunks, or more, so that forced texts of
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
    # A router that reads text runs on the host's side, between chunks.
    self._host_router = router if needs == "text" and refreshes else None
    decides = refreshes and needs in ("text", "hidden", "evidence")
    self._reading = graph.Reading(
      rule,
      # Where gates never move, nothing is older than they are.
      config.cache if decides else "reuse",
      evidence=refreshes and needs == "evidence",
      refresh=refreshes and needs in ("hidden", "evidence"),
      split=len(devices) > 1,
    )
    # What the compiled loop needs of the router, if anything.
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
    # Forced texts were cut to length before; their padding may reach beyond.
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
    """Asks a router about the texts so far: float32[B, E].

    Args:
      router: whom.
      made: the tokens made of each text, for one that reads text.
      seen: what else it looks at.
      before: the gates until now; None at the prompt.
      rows: the texts that one that reads text is asked about; the others keep
        their gates. None is all of them.
    """
    observation = ()
    if rows is None:
      rows = np.arange(len(self._prompts))
    # Powers of two, so that few shapes compile as texts end.
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
    """Returns the first gates, and what the router saw of the prompts."""
    whole = bucket(max(map(len, self._prompts)))
    tokens, pad = _left_pad(self._prompts, whole)
    seen = None
    if router.needs == "hidden":
      # What the base alone makes of the whole prompt, its last token included.
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
    """Returns the gates [B, E] decided at the prompts, and what they are from:
    of a router that weighs evidence its belief, float32[B, E], logarithms."""
    return self._ask_at_prompt(self._router)

  def prompt_gates(self) -> Float[np.ndarray, "B E"]:
    """Returns the gates that are decided at the prompts, float32[B, E]."""
    return np.asarray(self.at_prompt()[0])

  def _start(self) -> graph.DecodeState:
    """Decides the first gates and reads the prompts."""
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
    # Arrays of NumPy, since JAX compiles a program for each way to fill one;
    # and placed like the state that a call returns, or the next call would be
    # another program.
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
    """Makes the texts; yields all that is made so far, again and again."""
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
    """Returns what is made so far, and bool[B], which texts have ended."""
    # Copies, since the state's buffers are given to the next call.
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
  """Returns (int32[B, length] with zeros in front, int32[B] how many)."""
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

  Token n is made under gates that the router decided from the prompt and the
  first floor(n / refresh_every) * refresh_every tokens made (Belofsky, 2023,
  "Token-Level Adaptation of LoRA Adapters"); with refresh_every 0, from the
  prompt alone.

  Args:
    base: from `load_base`.
    prompts: B texts, or B lists of token ids, of any lengths.
    adapters: from `load_adapters`; none is the base alone.
    router: from `make_router`; needed with adapters.
    config: how many tokens, how often gates are refreshed, what they mean, what
      becomes of the cache, how tokens are picked.
    tokenizer: from `load_tokenizer`; needed for text in, text out, the end
      token and routers that read text.

  Returns:
    A `Generation`: tokens [B, N], gates [B, N, E], texts, stats.

  Raises:
    InputError: something of these does not fit together.

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
