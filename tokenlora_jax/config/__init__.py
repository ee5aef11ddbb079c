"""Frozen settings of a run, and one-line errors for bad input.

  config = Config(workdir="runs/a", lora=LoraConfig(rank=8))
  config.lora.scaling  # 2.0

Plain data: no JAX, no files. Each file of `configs/` holds one `Config`; flags
on the command line override single fields.
"""

from tokenlora_jax.config.decoding import DecodeConfig, RouterConfig
from tokenlora_jax.config.errors import (
  InputError,
  check,
  check_choice,
  first_line,
  nearest,
)
from tokenlora_jax.config.settings import (
  PROJECTIONS,
  BaseConfig,
  Config,
  DataConfig,
  LoraConfig,
  MeshConfig,
  OptimConfig,
  differences,
)

__all__ = [
  "PROJECTIONS",
  "BaseConfig",
  "Config",
  "DataConfig",
  "DecodeConfig",
  "InputError",
  "LoraConfig",
  "MeshConfig",
  "OptimConfig",
  "RouterConfig",
  "check",
  "check_choice",
  "differences",
  "first_line",
  "nearest",
]
