"""Fits routers on the tasks' rows, with base and adapters frozen."""

from tokenlora_jax.training.routers import (  # noqa: F401  They register.
  embeddings,
  lora_flow,
  phatgoose,
  switch,
  x_lora,
)
from tokenlora_jax.training.routers.registry import (
  Fit,
  Work,
  get_fit,
  register_fit,
)

__all__ = ["Fit", "Work", "get_fit", "register_fit"]
