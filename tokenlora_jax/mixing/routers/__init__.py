"""Routers: who decides the gates, by name; one file a family."""

from tokenlora_jax.mixing.routers.arrow import ArrowRouter, arrow_vectors
from tokenlora_jax.mixing.routers.centroid import (
  CentroidRouter,
  centroids,
  sharpened_softmax,
)
from tokenlora_jax.mixing.routers.constant import ConstantRouter
from tokenlora_jax.mixing.routers.position import (
  PositionRouter,
  flat_table,
  read_table,
)
from tokenlora_jax.mixing.routers.posterior import PosteriorRouter
from tokenlora_jax.mixing.routers.registry import (
  make_router,
  register_router,
  router_settings,
)
from tokenlora_jax.mixing.routers.router import Router
from tokenlora_jax.mixing.routers.shaping import shape_gates
from tokenlora_jax.mixing.routers.spectr import SpectrRouter, output_factors

__all__ = [
  "ArrowRouter",
  "CentroidRouter",
  "ConstantRouter",
  "PositionRouter",
  "PosteriorRouter",
  "Router",
  "SpectrRouter",
  "arrow_vectors",
  "centroids",
  "flat_table",
  "make_router",
  "output_factors",
  "read_table",
  "register_router",
  "router_settings",
  "shape_gates",
  "sharpened_softmax",
]
