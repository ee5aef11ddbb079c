"""Routers: who decides the gates, by name; one file a family."""

from tokenlora_jax.mixing.routers.ariadne import AriadneRouter, fit_ariadne
from tokenlora_jax.mixing.routers.cbtm import CbtmRouter
from tokenlora_jax.mixing.routers.centroid import (
  CentroidRouter,
  centroids,
  sharpened_softmax,
)
from tokenlora_jax.mixing.routers.clusters import fit_centroids, kmeans
from tokenlora_jax.mixing.routers.constant import ConstantRouter
from tokenlora_jax.mixing.routers.hilora import HiloraRouter, fit_hilora
from tokenlora_jax.mixing.routers.logo import LogoRouter
from tokenlora_jax.mixing.routers.lorauter import LorauterRouter, fit_lorauter
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
  "AriadneRouter",
  "CbtmRouter",
  "CentroidRouter",
  "ConstantRouter",
  "HiloraRouter",
  "LogoRouter",
  "LorauterRouter",
  "PosteriorRouter",
  "Router",
  "centroids",
  "fit_ariadne",
  "fit_centroids",
  "fit_hilora",
  "fit_lorauter",
  "kmeans",
  "make_router",
  "register_router",
  "router_settings",
  "shape_gates",
  "sharpened_softmax",
]
