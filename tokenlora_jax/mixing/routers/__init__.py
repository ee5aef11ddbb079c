"""Routers, which compute the gates: by name, one file per family."""

from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers.ariadne import AriadneRouter, fit_ariadne
from tokenlora_jax.mixing.routers.arrow import ArrowRouter, arrow_vectors
from tokenlora_jax.mixing.routers.cbtm import CbtmRouter
from tokenlora_jax.mixing.routers.centroid import (
  CentroidRouter,
  Embeds,
  centroids,
  sharpened_softmax,
)
from tokenlora_jax.mixing.routers.classifier import (
  ClassifierRouter,
  fit_classifier,
)
from tokenlora_jax.mixing.routers.clusters import fit_centroids, kmeans
from tokenlora_jax.mixing.routers.constant import ConstantRouter
from tokenlora_jax.mixing.routers.hilora import HiloraRouter, fit_hilora
from tokenlora_jax.mixing.routers.logo import LogoRouter
from tokenlora_jax.mixing.routers.lora_flow import LoraFlowRouter
from tokenlora_jax.mixing.routers.lorauter import LorauterRouter, fit_lorauter
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
  router_defaults,
  router_settings,
)
from tokenlora_jax.mixing.routers.spectr import SpectrRouter, output_factors
from tokenlora_jax.mixing.routers.switch import SwitchRouter
from tokenlora_jax.mixing.routers.x_lora import (
  XLoraGates,
  XLoraRouter,
  classify,
)
from tokenlora_jax.mixing.shaping import SHAPING, keep_top, shape_gates

__all__ = [
  "SHAPING",
  "AriadneRouter",
  "ArrowRouter",
  "CbtmRouter",
  "CentroidRouter",
  "ClassifierRouter",
  "ConstantRouter",
  "Embeds",
  "HiloraRouter",
  "LogoRouter",
  "LoraFlowRouter",
  "LorauterRouter",
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
  "fit_ariadne",
  "fit_centroids",
  "fit_classifier",
  "fit_hilora",
  "fit_lorauter",
  "flat_table",
  "keep_top",
  "kmeans",
  "linear",
  "make_router",
  "output_factors",
  "read_table",
  "register_router",
  "router_defaults",
  "router_settings",
  "shape_gates",
  "sharpened_softmax",
]
