"""Measures the host memory that loading needs beyond the base itself.

  python -m benchmarks.loading                        2.2 GB of bfloat16
  python -m benchmarks.loading --stored float32 --size smollm2-135m

Makes a random checkpoint in several safetensors files in a temporary folder,
and loads it in a fresh process each time: both layouts, kernels as they are and
in few bits, and on a mesh of eight simulated devices. On a CPU, device memory
is host memory. So what is compared with the bound is

  above = peak - floor - bytes of the loaded base,

where the peak is the largest resident memory (VmHWM: files that are mapped
count too) and the floor is what the process has once JAX runs. The bound is 1.2
times the largest tensor of the checkpoint, as one file holds it: a layer's
kernel, or the embedding; stacked layers are many such tensors. `anonymous` is
the same without mapped files, from samples of RssAnon a millisecond apart.

Linux only, since it reads /proc.
"""

import argparse
from collections.abc import Sequence
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from benchmarks import make_parser
from tokenlora_jax.commands import cli
from tokenlora_jax.formats.reader import parameter_shapes
from tokenlora_jax.model.config import PRESETS, LlamaConfig

BOUND = 1.2
ROOT = Path(__file__).parents[1]
DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Name, then arguments of `load_base`; the last says how many devices.
CASES = {
  "list": ({}, 1),
  "stacked": ({"stacked": True}, 1),
  "stacked, fsdp 4 x tensor 2": ({"stacked": True}, 8),
  "list, int8": ({"quantize": "int8"}, 1),
  "stacked, int8": ({"stacked": True, "quantize": "int8"}, 1),
  "list, nf4": ({"quantize": "nf4"}, 1),
  "stacked, nf4": ({"stacked": True, "quantize": "nf4"}, 1),
}


def their_name(name: str) -> str:
  """Returns our parameter's name in a Hugging Face checkpoint."""
  modules = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{x: f"self_attn.{x}_proj" for x in "qkvo"},
    **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
  }
  if not name.startswith("layers."):
    return f"{modules[name]}.weight"
  _, layer, module, *_ = name.split(".")
  return f"model.layers.{layer}.{modules[module]}.weight"


def write_checkpoint(
  folder: Path, config: LlamaConfig, dtype: str, shard_bytes: int
) -> int:
  """Writes a random checkpoint in shards.

  Returns:
    Bytes of its largest tensor.
  """
  from safetensors.numpy import save_file

  about = {
    "model_type": "llama",
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_width,
    "vocab_size": config.vocab,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tied,
  }
  (folder / "config.json").write_text(json.dumps(about))
  rng = np.random.default_rng(0)
  places, shard, largest = {}, {}, 0

  def close():
    file = f"model-{len(set(places.values())):05}.safetensors"
    save_file(shard, folder / file)
    places.update(dict.fromkeys(shard, file))
    shard.clear()

  for name, shape in parameter_shapes(config).items():
    if name == "head" or name.endswith(".kernel"):
      shape = shape[::-1]
    tensor = rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])
    largest = max(largest, tensor.nbytes)
    if sum(x.nbytes for x in shard.values()) + tensor.nbytes > shard_bytes:
      close()
    shard[their_name(name)] = tensor
  close()
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": places}))
  return largest


def memory(process: int | str, field: str) -> int:
  """Returns the bytes of a field of /proc/PROCESS/status, 0 after its end."""
  try:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
  except (FileNotFoundError, ProcessLookupError):
    return 0
  return sum(int(x.split()[1]) << 10 for x in lines if x.startswith(field))


def load(folder: str, settings: dict, devices: int) -> dict[str, float]:
  """Loads in this process and prints the time and memory used."""
  import jax

  from tokenlora_jax import load_base
  from tokenlora_jax.config import MeshConfig
  from tokenlora_jax.parallel.sharding import make_mesh

  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2)) if devices == 8 else None
  jax.block_until_ready(jax.numpy.zeros(1))
  floor, anonymous = memory("self", "VmRSS"), memory("self", "RssAnon")
  # From here on the peak counts anew.
  Path("/proc/self/clear_refs").write_text("5")
  start = time.perf_counter()
  base = jax.block_until_ready(load_base(folder, mesh=mesh, **settings))
  return {
    "seconds": time.perf_counter() - start,
    "base": sum(x.nbytes for x in jax.tree.leaves(base)),
    "floor": floor,
    "peak": memory("self", "VmHWM"),
    "floor_anonymous": anonymous,
  }


def measure(folder: Path, settings: dict, devices: int = 1) -> dict[str, float]:
  """Loads in a fresh process.

  Args:
    folder: the checkpoint.
    settings: arguments of `load_base`.
    devices: simulated ones.

  Returns:
    `seconds`, and bytes: `base`, `floor`, `peak`, `above` and `anonymous`, the
    part of `above` that no file backs.
  """
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  what = json.dumps([str(folder), settings, devices])
  command = [sys.executable, "-m", "benchmarks.loading", "--load", what]
  child = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
  )
  anonymous = 0
  while child.poll() is None:
    anonymous = max(anonymous, memory(child.pid, "RssAnon"))
    time.sleep(0.001)
  found = json.loads(child.stdout.read())
  found["above"] = found["peak"] - found["floor"] - found["base"]
  found["anonymous"] = anonymous - found.pop("floor_anonymous") - found["base"]
  return found


def main(argv: Sequence[str]) -> None:
  """Runs the benchmark and prints a table."""
  parser = make_parser("benchmarks.loading", __doc__)
  parser.add_argument("--size", choices=PRESETS, default="tinyllama-1.1b")
  parser.add_argument("--stored", choices=DTYPES, default="bfloat16")
  parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
  parser.add_argument("--load", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.load:
    print(json.dumps(load(*json.loads(args.load))))
    return
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    largest = write_checkpoint(
      folder, PRESETS[args.size], args.stored, shard_bytes=500_000_000
    )
    files = [*folder.glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files)
    print(
      f"{args.size}: {size / 1e6:.0f} MB of {args.stored} in {len(files)} files,"
      f" loaded as {args.dtype}; largest tensor {largest / 1e6:.0f} MB, so the"
      f" bound is {BOUND * largest / 1e6:.0f} MB.\nMB:"
    )
    head = "base", "floor", "peak", "above", "anonymous", "/ largest", "seconds"
    print(f"{'':28}" + "".join(f"{name:>11}" for name in head))
    for name, (settings, devices) in CASES.items():
      found = measure(folder, {"dtype": args.dtype} | settings, devices)
      row = [found[column] / 1e6 for column in head[:5]]
      row = [f"{value:.0f}" for value in row]
      row += [f"{found['above'] / largest:.2f}", f"{found['seconds']:.1f}"]
      print(f"{name:28}" + "".join(f"{value:>11}" for value in row), flush=True)


if __name__ == "__main__":
  cli.run(main)
