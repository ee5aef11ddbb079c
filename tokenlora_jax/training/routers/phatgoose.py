"""Fits PHATGOOSE: one gate vector per expert, on its own task's rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from tokenlora_jax.mixing.mixture import routed
from tokenlora_jax.mixing.routers import PositionRouter, linear
from tokenlora_jax.training.routers.descent import descend, flat, zeros
from tokenlora_jax.training.routers.registry import Work, register_fit
from tokenlora_jax.training.step import make_optimizer


@dataclasses.dataclass(frozen=True)
class _Alone(PositionRouter):
  """Gates of one expert alone: gates_e = sigmoid(v_e . h)."""

  def position_gates(self, prototype, lora, x, low):
    return jax.nn.sigmoid(linear(x, prototype["vectors"]))


def each_alone(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns an optimizer with a state, and a clipped norm, per expert.

  Args:
    optimizer: of one expert's [L, ...].

  Returns:
    The same over [L, E, ...].
  """
  return optax.GradientTransformation(
    jax.vmap(optimizer.init, in_axes=1),
    jax.vmap(optimizer.update, in_axes=(1, 0, 1), out_axes=(1, 0)),
  )


@register_fit("phatgoose")
def fit_phatgoose(work: Work):
  """Fits v_e, where expert e alone is gated by sigmoid(v_e . h).

  Each expert reads its own task's rows, so its v_e does not depend on the other
  experts (Muqeeth et al., 2024, section 3). v_e starts at 0.

  Args:
    work: the inputs of the fit.

  Returns:
    (settings, arrays): {}, and `layers.I.PROJECTION.vectors` float32[E, in].
  """

  def objective(params, step):
    rows = step.rows["tokens"].shape[0] // step.experts
    own = jnp.repeat(jnp.eye(step.experts), rows, axis=0)
    mixture = step.mixture(_Alone(()), own)
    losses = step.losses(routed(step.loras, params), mixture)
    return losses.sum(), losses

  optimizer = each_alone(make_optimizer(work.config.optim))
  params = zeros(
    work.adapters, work.base.config.layers, lambda width: {"vectors": (width,)}
  )
  params = descend(work, "phatgoose", params, objective, optimizer)
  return {}, flat(work.adapters, params)
