"""Mixing rules: how gates combine several adapters.

  z_e = A_e x  [.., E, R],   m = mix(z, gates, scaling),   y = sum_e B_e m_e

A rule acts only between A and B. So the A of all experts are read as one
matrix, and so are the B, and gates may differ between rows and tokens.

The rule `probabilities` lets each expert predict alone, and mixes predictions.

Axis letters: B batch, T length, E experts, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import check_choice

# (rank activations [.., E, R], gates [.., E, 1 or R], scaling [E, 1]) ->
# [.., E, R]
Mix = Callable[
  [Float[Array, "*B E R"], Float[Array, "*B E #R"], Float[Array, "E 1"]],
  Float[Array, "*B E R"],
]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A mixing rule.

  Attributes:
    name: its name in settings.
    mix: mixes the experts' rank activations; see `register_rule`.
    of_outputs: whether each expert reads the text alone, under one-hot gates,
      and the gates mix the experts' predicted probabilities.

  Example:
    >>> get_rule("probabilities").of_outputs, get_rule("exact").of_outputs
    (True, False)
  """

  name: str
  mix: Mix
  of_outputs: bool = False


_RULES: dict[str, Rule] = {}


def register_rule(name: str, of_outputs: bool = False) -> Callable[[Mix], Mix]:
  """Registers a function as a mixing rule under a name.

  The function takes rank activations float32[.., E, R], gates float32[.., E, 1]
  (or [.., E, R] from routers that gate single ranks) and scaling float32[E, 1],
  and returns [.., E, R]. A second registration of a name replaces the first, so
  a notebook cell may run twice.

  Args:
    name: its name in settings.
    of_outputs: whether the gates mix predictions; see `Rule`.

  Example:
    >>> @register_rule("winner")
    ... def winner(low, gates, scaling):
    ...   best = gates == gates.max(axis=-2, keepdims=True)
    ...   return low * best * scaling
    >>> get_rule("winner").of_outputs
    False
  """

  def register(mix: Mix) -> Mix:
    _RULES[name] = Rule(name, mix, of_outputs)
    return mix

  return register


def get_rule(name: str) -> Rule:
  """Returns the rule with a name.

  Args:
    name: the rule's name.

  Raises:
    InputError: there is no such rule.

  Example:
    >>> get_rule("exact").name
    'exact'
  """
  check_choice("rule", name, tuple(_RULES))
  return _RULES[name]


@register_rule("exact")
def exact(
  low: Float[Array | np.ndarray, "*B E R"],
  gates: Float[Array | np.ndarray, "*#B E #R"],
  scaling: Float[Array | np.ndarray, "E 1"],
) -> Float[Array, "*B E R"]:
  """The weighted sum of the experts' outputs, with no cross terms.

  y = sum_e gates_e scaling_e B_e A_e x: one adapter of rank E*R, which PEFT
  calls "cat". The gates enter once, between A and B.

  Args:
    low: float32[.., E, R].
    gates: float32[.., E, 1] or [.., E, R].
    scaling: float32[E, 1].

  Returns:
    float32[.., E, R].

  Example:
    >>> low, gates = jnp.ones((2, 3)), jnp.array([[0.5], [1.0]])
    >>> exact(low, gates, jnp.ones((2, 1)))[:, 0].tolist()
    [0.5, 1.0]
  """
  return low * (gates * scaling)


@register_rule("peft_linear")
def peft_linear(
  low: Float[Array | np.ndarray, "*B E R"],
  gates: Float[Array | np.ndarray, "*#B E #R"],
  scaling: Float[Array | np.ndarray, "E 1"],
) -> Float[Array, "*B E R"]:
  """PEFT's combination "linear" since 0.7.

  y = B A x, A = sum_e sign(w_e) sqrt|w_e| A_e, B = sum_e sqrt|w_e| B_e with
  w_e = gates_e scaling_e: each adapter, and cross terms sqrt|w_e w_f| B_f A_e.

  Args:
    low: float32[.., E, R].
    gates: float32[.., E, 1] or [.., E, R].
    scaling: float32[E, 1].

  Returns:
    float32[.., E, R].

  Example:
    >>> low, gates = jnp.ones((2, 3)), jnp.array([[0.0], [1.0]])
    >>> peft_linear(low, gates, jnp.ones((2, 1)))[:, 0].tolist()
    [0.0, 1.0]
  """
  weights = gates * scaling
  roots = jnp.sqrt(jnp.abs(weights))
  into = jnp.sum(jnp.sign(weights) * roots * low, axis=-2, keepdims=True)
  return roots * into


@register_rule("peft040")
def peft040(
  low: Float[Array | np.ndarray, "*B E R"],
  gates: Float[Array | np.ndarray, "*#B E #R"],
  scaling: Float[Array | np.ndarray, "E 1"],
) -> Float[Array, "*B E R"]:
  """PEFT 0.4.0's combination "linear", which the paper's code uses.

  y = B A x, A = sum_e gates_e scaling_e A_e, B = sum_e B_e: gates multiply only
  A, so even one-hot gates do not reproduce an adapter.

  Args:
    low: float32[.., E, R].
    gates: float32[.., E, 1] or [.., E, R].
    scaling: float32[E, 1].

  Returns:
    float32[.., E, R].

  Example:
    >>> low, gates = jnp.ones((2, 3)), jnp.array([[0.0], [1.0]])
    >>> peft040(low, gates, jnp.ones((2, 1)))[:, 0].tolist()
    [1.0, 1.0]
  """
  into = jnp.sum(gates * scaling * low, axis=-2, keepdims=True)
  return jnp.broadcast_to(into, low.shape)


# P(x_t) = sum_e w_e p_e(x_t), w = gates / sum gates: a mixture of experts'
# predictions (Li et al., 2022, "Branch-Train-Merge", eq. 2). Each expert is a
# row of the batch with a one-hot gate, a cache of its own and the exact rule.
register_rule("probabilities", of_outputs=True)(exact)


def mix_probabilities(
  log_probs: Float[Array | np.ndarray, "B E *N"],
  gates: Float[Array | np.ndarray, "B E *#N"],
) -> Float[Array, "B ..."]:
  """Mixes predictions: log sum_e w_e exp(log_probs_e), w = gates / sum gates.

  Args:
    log_probs: float32[B, E, ..], the experts' log-probabilities.
    gates: float32[B, E, ..], at least 0 and not all 0; a trailing axis may be
      1.

  Returns:
    float32[B, ..].

  Example:
    >>> log_probs = jnp.log(jnp.array([[[0.5, 0.5], [0.1, 0.9]]]))
    >>> gates = jnp.array([[[1.0], [3.0]]])
    >>> jnp.exp(mix_probabilities(log_probs, gates)).round(3)
    Array([[0.2, 0.8]], dtype=float32)
  """
  weights = gates / gates.sum(axis=1, keepdims=True)
  return jax.nn.logsumexp(log_probs + jnp.log(weights), axis=1)
