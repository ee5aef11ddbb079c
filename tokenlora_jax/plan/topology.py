"""Absent devices to compile for: TPU slices, and GPUs of one machine.

libtpu compiles for any slice on a machine without a TPU, the CUDA plug-in for a
GPU on a machine without one; each must be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from tokenlora_jax.config import InputError, check_choice, first_line
from tokenlora_jax.parallel.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of chips to compile for.

  Attributes:
    name: as given: `v5e:2x4`.
    chip: the kind of all its chips.
    devices: JAX's devices, for a mesh; nothing can run on them.
  """

  name: str
  chip: Chip
  devices: Sequence[jax.Device]


# libtpu's name of each kind, to which the number of chips is added.
_TPU = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}


def get_topology(name: str) -> Topology:
  """Returns the topology of a name.

  Args:
    name: KIND:SIZE, as in `v5e:2x4` (a TPU slice) or `h100:8` (GPUs of one
      machine).

  Raises:
    InputError: there is no such kind or size, or the plug-in that compiles for
      it is not installed.
  """
  kind, _, size = name.partition(":")
  check_choice("--plan", kind, tuple(CHIPS))
  pattern = r"\d+(x\d+){1,2}" if kind in _TPU else r"\d+"
  if not re.fullmatch(pattern, size):
    want = "v5e:2x4 or v5p:2x2x1" if kind in _TPU else f"{kind}:8"
    raise InputError(
      f"--plan {name}: is not a size of {kind}; want for example {want}"
    )
  # Nothing runs, so JAX need not start this machine's own accelerators.
  jax.config.update("jax_platforms", "cpu")
  devices = _tpus(name, size) if kind in _TPU else _gpus(name, int(size))
  return Topology(name, CHIPS[kind], devices)


def _tpus(name: str, size: str) -> Sequence[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"--plan {name}: compiling for TPU needs libtpu: pip install"
      f' "jax[tpu]=={jax.__version__}"'
    )
  chips = math.prod(map(int, size.split("x")))
  # Without these, libtpu asks the metadata server of a TPU machine.
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Compiling occupies no chip, so several plans may be made at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": f"{_TPU[name.partition(':')[0]]}-{chips}",
  }
  more = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
  return _described(name, "tpu", topology_name=name, **more)


# XLA's DeviceDescription of each GPU, as its tools print it; vendors' figures.
_GPUS = {
  "a100": dict(
    major=8, minor=0, cores=108, shared=167936, l2=41943040, name="A100",
    clock=1.41, bandwidth=2039000000000, memory=85899345920,
  ),
  "h100": dict(
    major=9, minor=0, cores=132, shared=232448, l2=52428800, name="H100",
    clock=1.98, bandwidth=3352320000000, memory=85899345920,
  ),
  "h200": dict(
    major=9, minor=0, cores=132, shared=232448, l2=52428800, name="H200",
    clock=1.98, bandwidth=4800000000000, memory=151397597184,
  ),
}  # fmt: skip
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def _gpus(name: str, chips: int) -> Sequence[jax.Device]:
  found = [
    version
    for version in ("12", "13")
    if importlib.util.find_spec(f"jax_plugins.xla_cuda{version}")
  ]
  if not found:
    raise InputError(
      f"--plan {name}: compiling for NVIDIA GPUs needs the CUDA plug-in: pip"
      f' install "jax[cuda13]=={jax.__version__}"'
    )
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  target = _GPU_TARGET.format(**_GPUS[name.partition(":")[0]])
  return _described(name, "cuda", topology=f"1x1x{chips}", target_config=target)


def _described(name: str, platform: str, **settings) -> Sequence[jax.Device]:
  try:
    found = topologies.get_topology_desc(platform=platform, **settings)
  except RuntimeError as error:  # JaxRuntimeError and NotImplementedError too.
    raise InputError(
      f"--plan {name}: no such topology: {first_line(error)}"
    ) from None
  return found.devices
