"""Typed, frozen settings, and the one-line errors that bad input gets.

Everything here is plain data: no JAX, no files. An experiment is one `Config`
instance in a file of `configs/`; the command line overrides single fields.
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
