"""Token-level mixing of LoRA adapters at decode time, in JAX."""

from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import Bank, Expert, load_bank, save_bank
from tokenlora_jax.bank.edit import add_expert, drop_expert, save_fitted
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
