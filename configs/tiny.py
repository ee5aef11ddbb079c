"""Trains and mixes on a tiny random base, for tests and a first look.

What: four adapters on a Llama of 2 layers and random weights, with built-in
tasks and a byte tokenizer. The router reads the base's hidden states, so there
is no second model.
Hardware: any laptop. Time: under a minute.
Expect: the losses fall from 5.6 (= ln 260), as the adapters learn which bytes
occur in answers. The texts mean nothing.
  python train.py --config configs/tiny.py
  python infer.py --config configs/tiny.py --examples 1
"""

from tokenlora_jax.config import (
  BaseConfig,
  Config,
  DataConfig,
  DecodeConfig,
  LoraConfig,
  OptimConfig,
  RouterConfig,
)

config = Config(
  workdir="runs/tiny",
  base=BaseConfig(path="random:tiny", dtype="float32"),
  lora=LoraConfig(rank=8, alpha=16.0, targets=("q", "v", "o", "down")),
  data=DataConfig(source="builtin", rows=4, length=512, eval_rows=16),
  optim=OptimConfig(steps=60, learning_rate=1e-2, warmup_steps=5),
  router=RouterConfig(encoder="hidden", centroid_rows=32),
  decode=DecodeConfig(max_new_tokens=32, refresh_every=4),
  eval_every=20,
  save_every=20,
)
