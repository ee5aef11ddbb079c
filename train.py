"""Trains one LoRA adapter a task, all at once, on one frozen Llama.

  python train.py --config FILE                     trains
  python train.py --config FILE --plan v5e:2x4      plans: would it fit, how fast
  python train.py --config FILE --fit-router NAME   fits a router to a bank

At the end the folder WORKDIR/bank holds a PEFT folder an expert, the centroids
that a router compares texts with, and bank.json; infer.py mixes them. A run
that was stopped goes on where its newest checkpoint stands; SIGTERM, as of a
preempted machine, lets it save one first.

A router that learns (lora-flow, phatgoose, switch, x-lora) is fitted on the same
tasks' training rows, base and adapters frozen, for `optim.steps` steps of
`data.rows` rows a task, and saved into the bank.
"""

from tokenlora_jax.commands.train import main, script

__all__ = ["main"]

if __name__ == "__main__":
  script()
