"""The paper's experiment on Llama-2-70b instead of 7b.

What: as llama2_7b.py, with more rows a step: one a chip and expert.
Data: the four data sets from the hub.
Hardware: a TPU v5e of 64 chips, over which weights and rows are split; see
docs/plans.md.
Expect: planned, not run by us; no result is claimed.
  python train.py --config configs/llama2_70b.py --plan v5e:8x8
  python train.py --config configs/llama2_70b.py --base PATH_TO_LLAMA_2_70B
"""

import dataclasses

from llama2_7b import config as of_7b

config = dataclasses.replace(
  of_7b,
  workdir="runs/llama2_70b",
  base=dataclasses.replace(of_7b.base, path="meta-llama/Llama-2-70b-hf"),
  data=dataclasses.replace(of_7b.data, rows=64),
)
