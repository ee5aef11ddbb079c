"""Fits LoRA-Flow: W and b of each adapted projection, on the tasks' rows."""

from __future__ import annotations

from tokenlora_jax.mixing.mixture import routed
from tokenlora_jax.mixing.routers import LoraFlowRouter
from tokenlora_jax.training.routers.descent import descend, flat, zeros
from tokenlora_jax.training.routers.registry import Work, register_fit


@register_fit("lora-flow")
def fit_lora_flow(work: Work):
  """Fits gates = softmax(W h) + b (Wang et al., 2024, eq. 4).

  The loss under these gates is averaged over target tokens, then over experts.
  W and b start at 0, so all gates at 1/E.

  Args:
    work: the inputs of the fit.

  Returns:
    (settings, arrays): {}, and `layers.I.PROJECTION.weights` float32[E, in] and
    `.bias` float32[E].
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
