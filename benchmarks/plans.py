"""Writes the tables of plans: `python -m benchmarks.plans > docs/plans.md`.

Each plan is a command of train.py or infer.py in a process of its own, as a user
would run it. TPUs need libtpu, GPUs the CUDA plug-in (see requirements.txt).
"""

from collections.abc import Sequence
import json
from pathlib import Path
import subprocess
import sys
import tempfile

from benchmarks import track
from tokenlora_jax.commands import cli
from tokenlora_jax.config import InputError
from tokenlora_jax.plan.report import gib

TRAINING = (
  ("llama2_7b", "v5e:2x4", ()),
  ("llama2_7b", "v5e:4x4", ("--data.rows", "16")),
  ("llama2_7b", "v5e:1x1", ("--data.rows", "1", "--base.quantize", "int8")),
  ("llama2_7b", "v5e:1x1", ("--data.rows", "1", "--base.quantize", "nf4")),
  ("llama2_7b", "h100:1", ("--data.rows", "4", "--accumulate", "4")),
  ("llama2_13b", "v5e:4x4", ()),
  ("llama2_70b", "v5e:8x8", ()),
)
DECODING = (
  ("llama2_7b", "v5e:1x1", ()),
  ("llama2_7b", "v5e:1x1", ("--base.quantize", "int8")),
  ("llama2_7b", "v5e:2x4", ()),
  ("llama2_7b", "v6e:1x1", ("--data.length", "512")),
  (
    "llama2_7b", "v6e:1x1",
    ("--data.length", "512", "--decode.rule", "probabilities"),
  ),
)  # fmt: skip
HEAD = """# Plans

Each row is the plan that one command prints, for example:

    python train.py --config configs/llama2_7b.py --plan v5e:2x4

The programs were compiled ahead of time for hardware that was not there, and not run.
Unless a row says otherwise: four adapters of rank 64 on q and v, and 1,024 tokens a
sequence; in decoding a prompt of 1,024 tokens and 256 new ones. Bytes are per chip, and
the bytes that a chip receives are counted in the compiled program. N is the number of
parameters that a token is multiplied with. The least step time is the roofline's: compute,
memory or network at the makers' peak rates. `python -m benchmarks.plans` writes this page.
"""


def plan(script: str, config: str, topology: str, flags: Sequence[str]) -> dict:
  """Runs one command; returns its plan, or plans, as JSON.

  Raises:
    InputError: the command failed; says how.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plan.json"
    command = [
      sys.executable, script, "--config", f"configs/{config}.py", "--plan",
      topology, "--plan-json", str(file), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise InputError(f"{' '.join(command[1:])}: {done.stderr.strip()}")
    return json.loads(file.read_text())


def training_row(config, topology, flags, found) -> str:
  """Returns a row of the first table."""
  received = dict.fromkeys(("weights", "activations", "gradients"), 0)
  for one in found["collectives"] or ():
    received[one["of"]] = received.get(one["of"], 0) + one["bytes"]
  cells = [
    " ".join([config, *flags]),
    topology,
    gib(found["weights_bytes"]),
    gib(found["adapters_bytes"] + found["optimizer_bytes"]),
    gib(found["temporaries_bytes"]),
    f"{gib(found['peak_bytes'])} of {gib(found['capacity_bytes'])}",
    "yes" if found["fits"] else "no",
    *(gib(received[of]) for of in ("weights", "gradients", "activations")),
    f"{found['flops_per_token'] / (4 * found['parameters']):.2f} x 4N",
    f"{found['least_step_seconds']:.3g} s ({found['bound_by']})",
    f"{found['compile_seconds']:.0f} s",
  ]
  return f"| {' | '.join(cells)} |"


def decoding_row(config, topology, flags, found) -> str:
  """Returns a row of the second table."""
  prefill, decode = found["prefill"], found["decode"]
  cells = [
    " ".join([config, *flags]),
    topology,
    gib(decode["weights_bytes"]),
    gib(max(prefill["peak_bytes"], decode["peak_bytes"])),
    "yes" if prefill["fits"] and decode["fits"] else "no",
    f"{1000 * prefill['least_step_seconds']:.3g} ms ({prefill['bound_by']})",
    gib(decode["memory_traffic_bytes"]),
    f"{1000 * decode['least_step_seconds']:.3g} ms ({decode['bound_by']})",
  ]
  return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> None:
  """Prints the page."""
  if argv:
    raise InputError(f"{argv[0]}: takes no arguments")
  work = [("train.py", *row) for row in TRAINING]
  work += [("infer.py", *row) for row in DECODING]
  found = [plan(*row) for row in track(work, "plans")]
  print(HEAD)
  print(
    "## Training\n\n| config | topology | base | adapters, optimizer | activations,"
    " gradients, scratch | together | fits | weights received | gradients |"
    " activations | FLOPs a token | least step | compiled in |\n"
    + "|---" * 13 + "|"
  )  # fmt: skip
  for row, one in zip(TRAINING, found, strict=False):
    print(training_row(*row, one))
  print(
    "\n## Decoding one text\n\n| config | topology | base | together | fits |"
    " prefill | a step's memory traffic | a step |\n"
    + "|---" * 8 + "|"
  )  # fmt: skip
  for row, one in zip(DECODING, found[len(TRAINING) :], strict=True):
    print(decoding_row(*row, one))


if __name__ == "__main__":
  cli.run(main)
