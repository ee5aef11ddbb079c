"""The result of decoding, and its speed without compilation."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import time

import jax
import numpy as np

# JAX reports it for each program, whether compiled or read from the cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Generation:
  """The result of `generate`.

  Attributes:
    tokens: int32[B, N], the tokens made; the end token after the end.
    log_probs: float32[B, N], the log-probability of each, before temperature
      and restriction; 0 after the end.
    gates: float32[B, N, E], the gates under which each was made.
    lengths: int32[B], how many tokens of each row count, the end token
      included.
    texts: what the tokens say, without end token and stop string; None
      without a tokenizer.
    stats: `prompt_tokens`, `new_tokens`, `prefill_seconds`, `router_seconds`
      (on the host's side), `decode_seconds`, `tokens_per_second` and
      `timed_tokens`. The rate is that of the `timed_tokens`, made in calls
      that compiled nothing; where it is 0, all calls compiled something, and
      the rate is of all tokens, compiling included, as seconds always are.
    pieces: what each token that counts adds to its text; None without a
      tokenizer.
  """

  tokens: np.ndarray
  log_probs: np.ndarray
  gates: np.ndarray
  lengths: np.ndarray
  texts: list[str] | None
  stats: dict[str, float]
  pieces: list[list[str]] | None = None


class Pace:
  """Adds up the seconds of calls, and computes the rate of the warm ones."""

  def __init__(self):
    self._seconds = dict.fromkeys(("prefill", "router", "decode"), 0.0)
    self._tokens = self._timed_tokens = 0
    self._timed_seconds = 0.0
    # Since tokens were counted last.
    self._since = 0.0
    self._is_warm = True

  @contextlib.contextmanager
  def timing(self, part: str) -> Iterator[None]:
    """Times its block, as `prefill`, `router` or `decode`."""
    programs = _programs()
    before, start = len(programs), time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    self._seconds[part] += seconds
    if part != "prefill":
      self._since += seconds
      self._is_warm &= len(programs) == before

  def count(self, tokens: int) -> dict[str, float]:
    """Returns the stats after a call.

    Args:
      tokens: how many are made by now.
    """
    if self._is_warm:
      self._timed_tokens += tokens - self._tokens
      self._timed_seconds += self._since
    self._tokens, self._since, self._is_warm = tokens, 0.0, True
    made, seconds = self._timed_tokens, self._timed_seconds
    if not made:
      made = tokens
      seconds = self._seconds["router"] + self._seconds["decode"]
    return {
      **{f"{part}_seconds": value for part, value in self._seconds.items()},
      "new_tokens": tokens,
      "timed_tokens": self._timed_tokens,
      "tokens_per_second": made / max(seconds, 1e-9),
    }


@functools.cache
def _programs() -> list[float]:
  """A list that grows by one whenever JAX makes a program ready to run."""
  programs = []

  def listen(event: str, seconds: float, **_) -> None:
    if event == _COMPILED:
      programs.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return programs
