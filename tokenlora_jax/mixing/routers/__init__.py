"""Routers: who decides the gates, by name; one file a family."""

from tokenlora_jax.mixing.routers.centroid import (
  CentroidRouter,
  centroids,
  sharpened_softmax,
)
from tokenlora_jax.mixing.routers.constant import ConstantRouter
from tokenlora_jax.mixing.routers.posterior import PosteriorRouter
from tokenlora_jax.mixing.routers.registry import (
  make_router,
  register_router,
  router_settings,
)
from tokenlora_jax.mixing.routers.router import Router
from tokenlora_jax.mixing.routers.shaping import SHAPING, shape_gates

__all__ = [
  "SHAPING",
  "CentroidRouter",
  "ConstantRouter",
  "PosteriorRouter",
  "Router",
  "centroids",
  "make_router",
  "register_router",
  "router_settings",
  "shape_gates",
  "sharpened_softmax",
]
