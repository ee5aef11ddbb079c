"""LoGo: weighs adapters by the size of their output at the prompt.

Lee et al., "LoRA on the Go: Instance-level Dynamic LoRA Selection and Merging"
(2025, arXiv 2511.07129).

Axis letters: B batch, P padded prompt, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenlora_jax.config import PROJECTIONS, InputError, check_choice
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.lora import Adapters, LayerLoras, Lora

# So that untrained adapters, whose outputs are all 0, get equal gates.
_LEAST = 1e-6


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LogoRouter(Router):
  """gates_e = s_e / sum of s, with s_e the score of o_e = scaling_e B_e A_e h.

  s_e = |o_e|, or 1 / the entropy of softmax(o_e). h is the input of the last
  layer's query projection at the prompt's last token, in a pass over the prompt
  under gates of 1.

  Attributes:
    count: E.
    measure: the score: `norm` or `entropy`.
  """

  needs = "prompt"
  at_prompt_only = True

  count: int
  measure: Literal["norm", "entropy"]

  @property
  def experts(self):
    return self.count

  def read_prompt(self, base, layers, tokens, pad):
    # Imported here, since that module imports the routers.
    from tokenlora_jax.mixing.mixture import Mixture

    asked = _asked(layers)
    everything = Mixture(
      get_rule("exact"), jnp.ones((len(tokens), self.experts))
    )
    scores = []

    def adapt(lora, x, keys):
      if lora is asked:
        low = everything.down(lora, x[:, -1:])[:, 0]
        scores.append(self._score(lora, low))
      return everything(lora, x, keys)

    places = jnp.arange(tokens.shape[1]) - pad[:, None]
    mask = causal_mask((places >= 0).astype(jnp.int32))
    with jax.named_scope("logo_router"):
      base(tokens, jnp.maximum(places, 0), mask, loras=layers, adapt=adapt)
    return scores[0]

  def gates(self, batch, observation, seen):
    del batch, observation
    return seen / seen.sum(axis=-1, keepdims=True)

  def _score(
    self, lora: Lora, low: Float[Array, "B E R"]
  ) -> Float[Array, "B E"]:
    """Computes s, float32[B, E], from rank activations [B, E, R]."""
    b = lora.b.astype(jnp.float32)
    out = jnp.einsum("ber,ero->beo", low, b, precision="highest")
    out = out * lora.scaling[:, None]
    if self.measure == "norm":
      return jnp.maximum(jnp.linalg.norm(out, axis=-1), _LEAST)
    logs = jax.nn.log_softmax(out, axis=-1)
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    return 1 / jnp.maximum(entropy, _LEAST)


def _asked(layers: Sequence[LayerLoras]) -> Lora:
  """Returns the projection that is scored: q of the last adapted layer.

  If no adapter adapts q, it is the first projection of that layer.
  """
  last = next(layer for layer in reversed(layers) if layer)
  return last[next(p for p in PROJECTIONS if p in last)]


@register_router("logo", top_k=20)
def logo(adapters: Adapters, measure: str = "norm") -> LogoRouter:
  """Makes LoGo's router (Lee et al., 2025): larger outputs, larger gates.

  As in the paper's code: one pass with all adapters attached, the last layer's
  query projection, the prompt's last token, and the 20 largest gates, scaled to
  sum to 1. That code applies A_e to the layer's input before its norm, which is
  not the projection's input; ours applies it after the norm.

  Args:
    adapters: the experts.
    measure: score of an adapter's output: its `norm`, or the inverse of its
      `entropy`.

  Raises:
    InputError: a setting is not allowed, or nothing is adapted.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2)
    >>> logo(adapters).gates(1, (), jnp.array([[3.0, 1.0]])).tolist()
    [[0.75, 0.25]]
  """
  check_choice("router.measure", measure, ("norm", "entropy"))
  if not any(adapters.layers):
    raise InputError("router logo: the adapters adapt nothing")
  return LogoRouter(len(adapters.names), measure)
