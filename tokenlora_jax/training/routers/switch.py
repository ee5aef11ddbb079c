"""Fits the sparse gate: noisy top-k with a load-balancing loss.

Axis letters: B rows, T length, E experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key
import numpy as np

from tokenlora_jax.mixing.mixture import routed
from tokenlora_jax.mixing.routers import PositionRouter, linear
from tokenlora_jax.mixing.shaping import keep_top
from tokenlora_jax.training.routers.descent import descend, flat, zeros
from tokenlora_jax.training.routers.registry import Work, register_fit

# Coefficient of each projection's balance loss: alpha of Fedus et al. (2022).
BALANCE = 0.01


def balance_loss(
  soft: Float[Array | np.ndarray, "B T E"],
  kept: Float[Array | np.ndarray, "B T E"],
  real: Bool[Array | np.ndarray, "B T"],
) -> Float[Array, ""]:
  """Returns the balance loss E sum_e f_e P_e (Fedus et al., 2022, eq. 4).

  f_e is the share of tokens (with top-k, of choices) that expert e gets, P_e
  its mean probability. The loss is 1 where all experts get the same.

  Args:
    soft: float32[B, T, E], probabilities.
    kept: float32[B, T, E], 0 for the experts that are not chosen.
    real: bool[B, T], False for padding.

  Returns:
    float32 scalar.

  Example:
    >>> gates, real = jnp.array([[[0.9, 0.1], [0.3, 0.7]]]), jnp.ones((1, 2))
    >>> balance_loss(gates, keep_top(gates, 1), real > 0).round(3).item()
    1.0
  """
  real = real[..., None] / jnp.maximum(real.sum(), 1)
  chosen = (kept > 0) / jnp.sum(kept > 0, axis=-1, keepdims=True)
  shares = jnp.sum(chosen * real, axis=(0, 1))
  return soft.shape[-1] * jnp.sum(shares * jnp.sum(soft * real, axis=(0, 1)))


@jax.custom_vjp
def with_cost(
  gates: Float[Array, "*N"], cost: Float[Array, ""]
) -> Float[Array, "*N"]:
  """Returns the gates; in the backward pass, adds `cost` to the loss.

  Inside lax.scan we cannot return an extra loss term, so we inject its
  gradient.

  Args:
    gates: any array.
    cost: float32 scalar.

  Example:
    >>> jax.grad(lambda x: 0 * with_cost(jnp.ones(2), x**2).sum())(3.0).item()
    6.0
  """
  del cost
  return gates


with_cost.defvjp(
  lambda gates, cost: (gates, None),
  lambda _, cotangent: (cotangent, jnp.float32(1)),
)


@dataclasses.dataclass(frozen=True)
class _Noisy(PositionRouter):
  """Top-k of softmax(W h + normal * softplus(N h)), straight through.

  The forward pass uses the gates of decoding, the backward pass those of the
  softmax: a single kept gate is always 1 and has no gradient.

  Attributes:
    keys: PRNG keys [B].
    real: bool[B, T], False for padding.
    top_k: number of gates that stay; 0 is all.
    balance: coefficient of the load-balancing loss.
  """

  keys: Key[Array, " B"]
  real: Bool[Array, "B T"]
  top_k: int
  balance: float

  def position_gates(self, prototype, lora, x, low):
    logits = linear(x, prototype["weights"])
    spread = jax.nn.softplus(linear(x, prototype["noise"]))
    noise = jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))
    soft = jax.nn.softmax(logits + noise(self.keys) * spread, axis=-1)
    kept = keep_top(soft, self.top_k) if self.top_k else soft
    gates = soft + jax.lax.stop_gradient(kept - soft)
    return with_cost(gates, self.balance * balance_loss(soft, kept, self.real))


@register_fit("switch")
def fit_switch(work: Work):
  """Fits W of gates = softmax(W h), of which the top k stay.

  Noise, normal * softplus(N h), makes the fit explore other experts; N is
  fitted too and dropped afterwards (Shazeer et al., 2017, eq. 4). Each
  projection's balance loss keeps all experts in use (Fedus et al., 2022, eq.
  4). W and N start at 0. k is `router.top-k`, by default the router's own 1.

  Args:
    work: the inputs of the fit.

  Returns:
    (settings, arrays): {}, and `layers.I.PROJECTION.weights` float32[E, in].
  """
  told = work.config.router.top_k
  top_k = min(1 if told is None else told, len(work.adapters.names))
  balance = BALANCE / work.config.accumulate

  def objective(params, step):
    real = step.rows["segment_ids"] > 0
    keys = jax.random.split(step.key, len(real))

    def adapt(lora, x, keys):
      return step.mixture(_Noisy((), keys, real, top_k, balance))(lora, x)

    losses = step.losses(routed(step.loras, params), adapt, keys)
    return losses.mean(), losses

  def shapes(width):
    return {"weights": (width,), "noise": (width,)}

  params = zeros(work.adapters, work.base.config.layers, shapes)
  params = descend(work, "switch", params, objective)
  gates = {name: {"weights": own["weights"]} for name, own in params.items()}
  return {}, flat(work.adapters, gates)
