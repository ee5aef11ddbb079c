"""The paper's experiment: four adapters of Llama-2-7b (Belofsky, 2023).

What: R 64, alpha 16, dropout 0.1 on q and v. The loss is on prompt and answer.
The paper keeps the base in 4 bits; here it is bfloat16.
Data: the four data sets from the hub.
Hardware: 8 chips of a TPU v5e; weights and rows are sharded over them.
docs/plans.md lists other hardware that it fits on.
Expect: we planned this run but did not run it, so we claim no result.
  python train.py --config configs/llama2_7b.py --plan v5e:2x4
  python train.py --config configs/llama2_7b.py --base PATH_TO_LLAMA_2_7B
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
  workdir="runs/llama2_7b",
  base=BaseConfig(path="meta-llama/Llama-2-7b-hf", dtype="bfloat16"),
  lora=LoraConfig(rank=64, alpha=16.0, dropout=0.1),
  data=DataConfig(
    source="hub", rows=8, length=1024, loss_on="all", bad_rows="skip"
  ),
  optim=OptimConfig(steps=1000, learning_rate=2e-4, warmup_steps=30),
  router=RouterConfig(centroid_rows=1000),
  decode=DecodeConfig(max_new_tokens=256, refresh_every=2),
  remat="full",
  eval_every=100,
  save_every=100,
)
