"""The result of decoding, and its speed without compilation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import time
from typing import NamedTuple

import jax
from jaxtyping import Float, Int
import numpy as np

# The event that JAX reports for each program, compiled or read from the cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"

# Stats that count tokens of all rows of a batch.
_OF_ROWS = ("new_tokens", "timed_tokens", "tokens_per_second")


class MadeText(NamedTuple):
  """One text of a batch, cut at its end.

  Attributes:
    text: the decoded tokens.
    pieces: the string that each of the N tokens adds to it.
    tokens: int32[N].
    gates: float32[N, E].
  """

  text: str
  pieces: list[str]
  tokens: np.ndarray
  gates: np.ndarray


@dataclasses.dataclass(frozen=True)
class Generation:
  """The result of `generate`.

  Attributes:
    tokens: int32[B, N], the generated tokens; the end token after the end.
    log_probs: float32[B, N], the log-probability of each, before temperature,
      top-k and top-p; 0 after the end.
    gates: float32[B, N, E], the gates that each was generated under.
    lengths: int32[B], the number of tokens of each row up to its end, the end
      token included.
    texts: the decoded texts, without end token and stop string; None without a
      tokenizer.
    stats: `prompt_tokens`, `new_tokens`, `prefill_seconds`, `router_seconds`
      (on the host), `decode_seconds`, `tokens_per_second` and `timed_tokens`.
      The rate is that of the `timed_tokens`, generated in calls that compiled
      nothing; if there are none, it is that of all tokens, compiling included.
      The seconds include compiling.
    pieces: the string that each token up to the end adds to its text; None
      without a tokenizer.

  Example:
    >>> from tokenlora_jax import DecodeConfig, generate, load_base
    >>> base = load_base("random:tiny")
    >>> out = generate(base, [[1, 2]], config=DecodeConfig(max_new_tokens=3))
    >>> out.tokens.shape, out.gates.shape, out.texts
    ((1, 3), (1, 3, 0), None)
  """

  tokens: Int[np.ndarray, "B N"]
  log_probs: Float[np.ndarray, "B N"]
  gates: Float[np.ndarray, "B N E"]
  lengths: Int[np.ndarray, " B"]
  texts: list[str] | None
  stats: dict[str, float]
  pieces: list[list[str]] | None = None

  def row(self, i: int) -> MadeText:
    """Returns the text of row `i`, which needs a tokenizer at decoding."""
    n = self.lengths[i]
    return MadeText(
      self.texts[i], self.pieces[i], self.tokens[i, :n], self.gates[i, :n]
    )

  def pace(self, rows: int) -> dict[str, float]:
    """Returns the stats, counting only the tokens of the first rows.

    Args:
      rows: the number of these rows; the others only fill up the batch.
    """
    share = float(sum(self.lengths[:rows]) / sum(self.lengths))
    return {
      name: value * (share if name in _OF_ROWS else 1)
      for name, value in self.stats.items()
    }


def joined_pace(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns the number and the rate of tokens over several batches.

  Args:
    told: each batch's `Generation.stats`.

  Example:
    >>> slow = {"new_tokens": 8, "timed_tokens": 0, "tokens_per_second": 1.0}
    >>> fast = {"new_tokens": 8, "timed_tokens": 8, "tokens_per_second": 4.0}
    >>> joined_pace([slow, fast])["tokens_per_second"]
    4.0
  """
  key = "timed_tokens"
  if not any(stats[key] for stats in told):
    key = "new_tokens"  # Every batch compiled.
  made = sum(stats[key] for stats in told)
  seconds = sum(stats[key] / stats["tokens_per_second"] for stats in told)
  return {
    "new_tokens": sum(stats["new_tokens"] for stats in told),
    "timed_tokens": sum(stats["timed_tokens"] for stats in told),
    "tokens_per_second": made / seconds,
  }


class Pace:
  """Adds up the seconds of calls; computes the rate of those without compiling.

  Example:
    >>> pace = Pace()
    >>> with pace.timing("decode"):
    ...   pass
    >>> pace.count(4)["new_tokens"]
    4
  """

  def __init__(self):
    self._seconds = dict.fromkeys(("prefill", "router", "decode"), 0.0)
    self._tokens = self._timed_tokens = 0
    self._timed_seconds = 0.0
    # Seconds since the last `count`.
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
    """Returns the stats after a call of the loop.

    Args:
      tokens: the number of tokens generated so far.
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
  """Returns a list that grows by one for each program that JAX loads."""
  programs = []

  def listen(event: str, seconds: float, **_) -> None:
    if event == _COMPILED:
      programs.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return programs
