"""Routers: who decides the gates, by name; one file a family."""

from tokenlora_jax.mixing.routers.arrow import ArrowRouter, arrow_vectors
from tokenlora_jax.mixing.routers.centroid import (
  CentroidRouter,
  centroids,
  sharpened_softmax,
)
from tokenlora_jax.mixing.routers.constant import ConstantRouter
from tokenlora_jax.mixing.routers.lora_flow import LoraFlowRouter
from tokenlora_jax.mixing.routers.phatgoose import PhatgooseRouter
from tokenlora_jax.mixing.routers.position import (
  PositionRouter,
  flat_table,
  linear,
  read_table,
)
from tokenlora_jax.mixing.routers.posterior import PosteriorRouter
from tokenlora_jax.mixing.routers.registry import (
  make_router,
  register_router,
  router_settings,
)
from tokenlora_jax.mixing.routers.router import Router
from tokenlora_jax.mixing.routers.shaping import keep_top, shape_gates
from tokenlora_jax.mixing.routers.spectr import SpectrRouter, output_factors
from tokenlora_jax.mixing.routers.switch import SwitchRouter
from tokenlora_jax.mixing.routers.x_lora import (
  XLoraGates,
  XLoraRouter,
  classify,
)

__all__ = [
  "ArrowRouter",
  "CentroidRouter",
  "ConstantRouter",
  "LoraFlowRouter",
  "PhatgooseRouter",
  "PositionRouter",
  "PosteriorRouter",
  "Router",
  "SpectrRouter",
  "SwitchRouter",
  "XLoraGates",
  "XLoraRouter",
  "arrow_vectors",
  "centroids",
  "classify",
  "flat_table",
  "keep_top",
  "linear",
  "make_router",
  "output_factors",
  "read_table",
  "register_router",
  "router_settings",
  "shape_gates",
  "sharpened_softmax",
]
