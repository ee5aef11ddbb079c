"""The interface of routers, which compute the gates.

Axis letters: B batch, T length, D width of the base, E experts, R rank.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Lora


class Router(abc.ABC):
  """Computes the gates of a batch of sequences, at each refresh.

  A router is a frozen dataclass registered as a JAX pytree. Its arrays are
  leaves and its other fields are static, so two routers of one shape share one
  trace. The decoder calls `observe` on the host and `gates` in the graph.

  An in-layer router has `prototypes`, and the decoder calls its
  `position_gates` at each adapted projection. The result is multiplied by
  `gates`, which are 1 by default. An in-layer router whose `needs` is not
  `nothing` computes gates of whole sequences too.

  Attributes:
    needs: the input of `gates`: `nothing`; `hidden`, the mean of the base's
      last hidden states over the running text; `text`, the running text;
      `prompt`, the result of `read_prompt`; or `evidence`, how well each expert
      alone predicted the tokens so far.
    looks_first: whether the base reads each token first, alone, for `look`.
    at_prompt_only: whether it computes gates once, from the prompt, whatever
      `refresh_every` is.

  Example:
    >>> import dataclasses, jax
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class First(Router):
    ...   experts = 2
    ...   def gates(self, batch, observation, seen):
    ...     return jnp.tile(jnp.array([1.0, 0.0]), (batch, 1))
    >>> First().gates(1, (), None).tolist()
    [[1.0, 0.0]]
  """

  needs: Literal["nothing", "hidden", "text", "prompt", "evidence"] = "nothing"
  looks_first: bool = False
  at_prompt_only: bool = False
  # Of a router of `evidence`: the router of the first gates, and whether the
  # prompt's tokens are evidence too.
  prior: Router | None = None
  counts_prompt: bool = False
  # Whether all gates of a sequence may be 0, which is the base alone.
  may_be_zero: bool = False
  # Whether a gate may be below 0: then powers and shares are undefined.
  may_be_negative: bool = False

  @property
  @abc.abstractmethod
  def experts(self) -> int:
    """The number of experts, E."""

  @property
  def prototypes(self) -> Sequence[Mapping[str, Any]]:
    """The arrays that `position_gates` reads at each adapted projection.

    One mapping per layer, from the projection's name to a pytree of arrays.
    Empty for a router of whole sequences.
    """
    return ()

  def bind(self, names: Sequence[str]) -> Router:
    """Returns this router, checked against a bank's experts.

    Args:
      names: the experts' names, in the bank's order.

    Raises:
      InputError: the router was made for another number of experts.
    """
    if len(names) != self.experts:
      raise InputError(
        f"router: made for {self.experts} experts, but the bank has "
        f"{len(names)} ({', '.join(names)})"
      )
    return self

  def observe(self, texts: Sequence[str]) -> Any:
    """Converts texts to arrays for `gates`, on the host.

    Args:
      texts: the B running texts, prompts included.

    Returns:
      A pytree of numpy arrays with a leading B; () unless `needs` is `text`.
    """
    del texts
    return ()

  def gates(
    self, batch: int, observation: Any, seen: Any
  ) -> Float[Array, "{batch} E"]:
    """Computes the gates of whole sequences; pure, for use under `jax.jit`.

    Args:
      batch: B.
      observation: the result of `observe`.
      seen: the input that `needs` names. `hidden`: float32[B, D], the mean over
        the running text of the base's last hidden states (after the final
        norm). `prompt`: the result of `read_prompt`. `evidence`: float32[B, E],
        the log of the belief in each expert (see `PosteriorRouter`). Otherwise
        None.

    Returns:
      float32[B, E].
    """
    del observation, seen
    return jnp.ones((batch, self.experts))

  def position_gates(
    self,
    prototype: Any,
    lora: Lora,
    x: Float[Array | np.ndarray, "B T I"],
    low: Float[Array, "B T E R"],
  ) -> Float[Array, "B T E"] | Float[Array, "B T E R"]:
    """Computes the gates of positions at one adapted projection; pure.

    All are 1 by default.

    Args:
      prototype: the projection's, from `prototypes`.
      lora: the projection's adapters.
      x: [B, T, in], the projection's input.
      low: float32[B, T, E, R], the rank activations A_e x.

    Returns:
      float32[B, T, E], or [B, T, E, R] for gates of each rank.
    """
    del prototype, lora, x
    return jnp.ones(low.shape[:3])

  def read_prompt(
    self,
    base: Llama,
    layers: Any,
    tokens: Int[Array | np.ndarray, "B P"],
    pad: Int[Array | np.ndarray, " B"],
  ) -> Any:
    """Runs a pass over the prompts for `gates`, once; pure.

    The decoder calls it if `needs` is `prompt`.

    Args:
      base: the Llama, in the list layout.
      layers: the adapters, one {projection: Lora} per layer.
      tokens: int32[B, P], padded on the left.
      pad: int32[B], the padding of each row.
    """
    del base, layers, tokens, pad
    return None

  def learn(
    self,
    belief: Float[Array | np.ndarray, "B E"],
    log_probs: Float[Array | np.ndarray, "B E"],
  ) -> Float[Array, "B E"]:
    """Returns the log-belief after a token: float32[B, E].

    Args:
      belief: float32[B, E], the log-belief before the token.
      log_probs: float32[B, E], the token's log-probability by each expert.
    """
    return belief + log_probs

  def look(self, hidden: Float[Array, "B T D"]) -> Router:
    """Returns the router with gates computed from the base's hidden states.

    Args:
      hidden: [B, T, D], the base's last hidden states.
    """
    del hidden
    return self

  def smooth(
    self,
    before: Float[Array | np.ndarray, "*B E"],
    gates: Float[Array | np.ndarray, "*B E"],
  ) -> Float[Array | np.ndarray, "*B E"]:
    """Returns new gates smoothed with the old ones: float32[.., E].

    Args:
      before: float32[.., E], the old gates.
      gates: float32[.., E], the new gates.
    """
    del before
    return gates
