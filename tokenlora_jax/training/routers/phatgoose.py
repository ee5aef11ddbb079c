"""The fit of PHATGOOSE: a gate for each expert alone, on its own task."""

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
  """gates_e = sigmoid(v_e . h)."""

  def position_gates(self, prototype, lora, x, low):
    return jax.nn.sigmoid(linear(x, prototype["vectors"]))


def each_alone(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns an optimizer that steps each expert of [L, E, ...] by itself."""
  return optax.GradientTransformation(
    jax.vmap(optimizer.init, in_axes=1),
    jax.vmap(optimizer.update, in_axes=(1, 0, 1), out_axes=(1, 0)),
  )


@register_fit("phatgoose")
def fit_phatgoose(work: Work):
  """Fits v_e, with which expert e alone adds sigmoid(v_e . h) of its output.

  Each expert reads its own task's rows, and what is learned for it does not
  depend on the others (Muqeeth et al., 2024, section 3). The first v_e is 0.

  Args:
    work: what is fitted with.

  Returns:
    No settings, and `layers.I.MAP.vectors` float32[E, in].
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
