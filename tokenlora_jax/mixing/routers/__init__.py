"""Routers: who decides the gates, by name; one file a family."""

from tokenlora_jax.mixing.routers.centroid import (
  CentroidRouter,
  centroids,
  sharpened_softmax,
)
from tokenlora_jax.mixing.routers.constant import ConstantRouter
from tokenlora_jax.mixing.routers.router import (
  Router,
  make_router,
  register_router,
)

__all__ = [
  "CentroidRouter",
  "ConstantRouter",
  "Router",
  "centroids",
  "make_router",
  "register_router",
  "sharpened_softmax",
]
