"""The fit of LoRA-Flow: W and b of each map, on the tasks' rows."""

from __future__ import annotations

from tokenlora_jax.mixing.mixture import routed
from tokenlora_jax.mixing.routers import LoraFlowRouter
from tokenlora_jax.training.routers.descent import descend, flat, zeros
from tokenlora_jax.training.routers.registry import Work, register_fit


@register_fit("lora-flow")
def fit_lora_flow(work: Work):
  """Fits gates = softmax(W h) + b (Wang et al., 2024, eq. 4), from 1/E.

  The loss is the mean over the experts of what a target token of their tasks'
  rows costs under these gates.

  Args:
    work: what is fitted with.

  Returns:
    No settings, and `layers.I.MAP.weights` float32[E, in] and `.bias`
    float32[E].
  """

  def objective(params, step):
    mixture = step.mixture(LoraFlowRouter(()))
    losses = step.losses(routed(step.loras, params), mixture)
    return losses.mean(), losses

  def shapes(width):
    return {"weights": (width,), "bias": ()}

  params = zeros(work.adapters, work.base.config.layers, shapes)
  params = descend(work, "lora-flow", params, objective)
  return {}, flat(work.adapters, params)
