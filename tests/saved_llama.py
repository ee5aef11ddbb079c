"""A random Llama, PEFT adapters for it and their bank, saved in folders."""

from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from tokenlora_jax.bank.bank import Bank, save_bank
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.peft import load_adapters
from tokenlora_jax.formats.tokenizers import load_tokenizer

EXPERTS = ("alpha", "beta")
# Positions of the base; a token is a byte.
LONGEST = 32
TEMPLATE = (
  "{% for m in messages %}"
  "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
  "<bos>{{ m['role'] }}: {{ m['content'] }}{% if not loop.last %}\n{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}\nassistant:{% endif %}"
)


def save_llama(folder: Path) -> str:
  """A Llama whose guesses are far from even, and a tokenizer of bytes."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=1,
    max_position_embeddings=LONGEST, eos_token_id=2, pad_token_id=0,
  )  # fmt: skip
  model = transformers.LlamaForCausalLM(config)
  for parameter in model.parameters():
    if parameter.ndim == 2:
      torch.nn.init.normal_(parameter, 0, 0.3)
  model.save_pretrained(folder)
  tokenizer = load_tokenizer("random:tiny")
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(folder)
  return str(folder)


def save_adapters(base: str, folder: Path) -> dict[str, Path]:
  """PEFT's own folders, by expert, with B not zero."""
  folders = {}
  for seed, name in enumerate(EXPERTS):
    torch.manual_seed(10 + seed)
    model = peft.get_peft_model(
      transformers.LlamaForCausalLM.from_pretrained(base),
      peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
        init_lora_weights=False, task_type="CAUSAL_LM",
      ),
    )  # fmt: skip
    folders[name] = folder / name
    model.save_pretrained(folders[name])
  return folders


def save_bank_of(base: str, adapters: dict[str, Path], folder: Path) -> str:
  """A bank of them, with random centroids of hidden states."""
  table = np.random.default_rng(0).normal(size=(len(adapters), 32))
  loras = load_adapters(list(adapters.values()), list(adapters))
  fingerprint = load_base(base, "float32").fingerprint
  centroids = {"hidden": table.astype(np.float32)}
  save_bank(folder, Bank(loras, base, fingerprint, centroids))
  return str(folder)
