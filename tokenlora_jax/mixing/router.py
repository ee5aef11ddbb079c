"""The interface of a router.

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
  """Decides the gates of a batch of sequences, anew at each refresh.

  A router is a frozen dataclass registered as a JAX pytree. Its arrays are
  leaves and what is not an array is static, so two routers of one shape share
  one trace. The decoder calls `observe` on the host and `gates` in the graph.

  A router that decides for each position inside the layers has `prototypes`,
  and the decoder calls `position_gates` at each adapted map; its `gates`, 1
  unless it says otherwise, multiply what it decides there. One that looks at
  something too (`needs`) decides for whole sequences first.

  Attributes:
    needs: what `gates` looks at: `nothing`; the mean of the base's last
      `hidden` states over the running text; the `text` itself; the `prompt`,
      read once by a pass of its own (`read_prompt`); or `evidence`, how well
      each expert alone predicted the tokens so far.
    looks_first: whether the base reads each token alone before, for `look`.
    at_prompt_only: whether it decides once, from the prompt, whatever
      `refresh_every` says.
  """

  needs: Literal["nothing", "hidden", "text", "prompt", "evidence"] = "nothing"
  looks_first: bool = False
  at_prompt_only: bool = False
  # Of a router that weighs evidence: who decides before there is any, and
  # whether the prompt's tokens are some.
  prior: Router | None = None
  counts_prompt: bool = False
  # Whether all gates of a sequence may be 0: the base alone.
  may_be_zero: bool = False
  # Whether a gate may be below 0, so that powers and shares mean nothing.
  may_be_negative: bool = False

  @property
  @abc.abstractmethod
  def experts(self) -> int:
    """E."""

  @property
  def prototypes(self) -> Sequence[Mapping[str, Any]]:
    """The arrays of each layer that `position_gates` reads at each adapted map.

    A mapping a layer, from the projection's name to a pytree of arrays. Empty:
    the router decides for whole sequences.
    """
    return ()

  def bind(self, names: Sequence[str]) -> Router:
    """Returns this router for a bank of these experts.

    Args:
      names: the experts' names, in the bank's order.

    Raises:
      InputError: the router is for another number of experts.
    """
    if len(names) != self.experts:
      raise InputError(
        f"router: made for {self.experts} experts, but the bank has "
        f"{len(names)} ({', '.join(names)})"
      )
    return self

  def observe(self, texts: Sequence[str]) -> Any:
    """Turns texts into arrays for `gates`, on the host.

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
    """Decides the gates of whole sequences; pure, for use under `jax.jit`.

    Args:
      batch: B.
      observation: the result of `observe`.
      seen: by `needs`: `hidden`, float32[B, D], the mean over the running text
        of the base's last hidden states (after the final norm); `prompt`, what
        `read_prompt` gave; `evidence`, float32[B, E], the log of the belief
        that each expert is the best (see `Posterior`); otherwise None.

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
    """Decides the gates of positions at one adapted map; pure.

    All are 1 unless a router says otherwise.

    Args:
      prototype: of this map, from `prototypes`.
      lora: the map's adapters.
      x: [B, T, in], the map's input.
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
    """Reads prompts for `gates`, once; pure. For `needs` of `prompt`.

    Args:
      base: the Llama, its layers in a list.
      layers: the adapters, a mapping a layer from projection to `Lora`.
      tokens: int32[B, P], padded in front.
      pad: int32[B], how much.
    """
    del base, layers, tokens, pad
    return None

  def learn(
    self,
    belief: Float[Array | np.ndarray, "B E"],
    log_probs: Float[Array | np.ndarray, "B E"],
  ) -> Float[Array, "B E"]:
    """Returns the belief after a token: float32[B, E], logarithms.

    Args:
      belief: float32[B, E], before it.
      log_probs: float32[B, E], of the token, by each expert alone.
    """
    return belief + log_probs

  def look(self, hidden: Float[Array, "B T D"]) -> Router:
    """Returns the router with the base's own hidden states of the tokens.

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
    """Returns the gates of a refresh, given those before it: float32[B, E]."""
    del before
    return gates
