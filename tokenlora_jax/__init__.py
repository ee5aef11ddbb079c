"""Token-level mixing of LoRA adapters at decode time, in JAX.

A name's module is imported when the name is first used, so that `import
tokenlora_jax` and a program's --help do not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Type checkers and editors read these; Python, the table.
  from tokenlora_jax.bank.arrays import Fitted
  from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
  from tokenlora_jax.bank.edit import add_expert, drop_expert, save_fitted
  from tokenlora_jax.bank.expert import Expert
  from tokenlora_jax.bank.export import export_mixture
  from tokenlora_jax.config import DecodeConfig, InputError
  from tokenlora_jax.decoding import Generation, generate
  from tokenlora_jax.formats.load import load_base
  from tokenlora_jax.formats.minilm import load_minilm
  from tokenlora_jax.formats.peft import load_adapters, save_adapter
  from tokenlora_jax.formats.tokenizers import load_tokenizer
  from tokenlora_jax.mixing.mixture import forward
  from tokenlora_jax.mixing.routers import make_router, register_router
  from tokenlora_jax.mixing.rules import register_rule
  from tokenlora_jax.model.lora import Adapters, random_adapters
  from tokenlora_jax.report.trace import GateTrace

__all__ = [
  "Adapters",
  "Bank",
  "DecodeConfig",
  "Expert",
  "Fitted",
  "GateTrace",
  "Generation",
  "InputError",
  "add_expert",
  "drop_expert",
  "export_mixture",
  "forward",
  "generate",
  "load_adapters",
  "load_bank",
  "load_base",
  "load_minilm",
  "load_tokenizer",
  "make_router",
  "random_adapters",
  "register_router",
  "register_rule",
  "save_adapter",
  "save_bank",
  "save_fitted",
]

# Public name -> the module below `tokenlora_jax` that defines it.
_MODULES = {
  "Adapters": "model.lora",
  "Bank": "bank.bank",
  "DecodeConfig": "config",
  "Expert": "bank.expert",
  "Fitted": "bank.arrays",
  "GateTrace": "report.trace",
  "Generation": "decoding",
  "InputError": "config",
  "add_expert": "bank.edit",
  "drop_expert": "bank.edit",
  "export_mixture": "bank.export",
  "forward": "mixing.mixture",
  "generate": "decoding",
  "load_adapters": "formats.peft",
  "load_bank": "bank.bank",
  "load_base": "formats.load",
  "load_minilm": "formats.minilm",
  "load_tokenizer": "formats.tokenizers",
  "make_router": "mixing.routers",
  "random_adapters": "model.lora",
  "register_router": "mixing.routers",
  "register_rule": "mixing.rules",
  "save_adapter": "formats.peft",
  "save_bank": "bank.bank",
  "save_fitted": "bank.edit",
}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
  globals()[name] = value  # The next use does not come here.
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
