"""Fits X-LoRA: its classifier of hidden states, on the tasks' rows."""

from __future__ import annotations

import jax

from tokenlora_jax.mixing.mixture import routed
from tokenlora_jax.mixing.routers import XLoraGates, classify
from tokenlora_jax.training.routers.descent import descend, flat, zeros
from tokenlora_jax.training.routers.registry import Work, register_fit


@register_fit("x-lora")
def fit_x_lora(work: Work):
  """Fits gates = softmax(W h + b), h of the base alone (Buehler, 2024).

  The loss under these gates is averaged over target tokens, then over experts.
  W and b start at 0, so all gates at 1/E.

  Args:
    work: the inputs of the fit.

  Returns:
    (settings, arrays): {}, and `layers.I.PROJECTION.weights` float32[E, D] and
    `.bias` float32[E].
  """

  def objective(params, step):
    hidden = step.read()
    gates = {
      # Gates of every layer, [L, E * B, T, E].
      name: jax.vmap(classify, (0, None))(known, hidden)
      for name, known in params.items()
    }
    mixture = step.mixture(XLoraGates(()))
    losses = step.losses(routed(step.loras, gates), mixture)
    return losses.mean(), losses

  config = work.base.config
  shapes = {"weights": (config.width,), "bias": ()}
  params = zeros(work.adapters, config.layers, lambda _: shapes)
  params = descend(work, "x-lora", params, objective)
  return {}, flat(work.adapters, params)
