"""The paper's experiment on Llama-2-13b instead of 7b.

What: as llama2_7b.py, but with one row per chip and expert in each step.
Data: the four data sets from the hub.
Hardware: 16 chips of a TPU v5e; weights and rows are sharded over them. See
docs/plans.md.
Expect: we planned this run but did not run it, so we claim no result.
  python train.py --config configs/llama2_13b.py --plan v5e:4x4
  python train.py --config configs/llama2_13b.py --base PATH_TO_LLAMA_2_13B
"""

import dataclasses

from llama2_7b import config as of_7b

config = dataclasses.replace(
  of_7b,
  workdir="runs/llama2_13b",
  base=dataclasses.replace(of_7b.base, path="meta-llama/Llama-2-13b-hf"),
  data=dataclasses.replace(of_7b.data, rows=16),
)
