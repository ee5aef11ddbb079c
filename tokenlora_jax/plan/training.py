"""Estimates a training run's memory and step time on absent hardware.

The real step is compiled ahead of time for a described topology; nothing runs.
The compiler reports the memory; `program.py` counts FLOPs, transfers and memory
traffic in the compiled program's text.

Axis letters: E experts, B rows an expert, T length, D width, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from tokenlora_jax.config import BaseConfig, Config
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.quantize import get_quantizer
from tokenlora_jax.parallel.sharding import (
  BATCH_SPEC,
  check_heads,
  described,
  make_mesh,
)
from tokenlora_jax.plan.groups import crosses
from tokenlora_jax.plan.program import Collective, Program
from tokenlora_jax.plan.topology import Topology
from tokenlora_jax.training.step import BATCH_TYPES, describe_state, make_step


@dataclasses.dataclass(frozen=True)
class Plan:
  """The costs of one compiled program; bytes and seconds are per chip.

  Attributes:
    program: `train`, `prefill` or `decode`.
    topology: its name, as given.
    chips: number of chips.
    mesh: {axis: chips}.
    fits: whether peak_bytes is at most capacity_bytes.
    capacity_bytes: the memory of a chip that a program may use.
    peak_bytes: the most memory in use at once, by the compiler's count; the
      sum of the next five.
    weights_bytes: the frozen base.
    adapters_bytes: the adapters.
    optimizer_bytes: the adapters' optimizer state.
    other_bytes: the batch, or cache and texts, and outputs that are not donated
      inputs.
    temporaries_bytes: activations, gradients and scratch.
    tokens: read by the program, on all chips.
    parameters: N, the parameters that a token is multiplied with.
    compile_seconds: of tracing and compiling.
    advice: the setting to change if it does not fit.

  None if the compiler refused the program:
    flops_per_token: matrix products, with those of fused attention.
    products_per_token: the same without fused attention.
    memory_traffic_bytes: read from and written to the chip's memory.
    collectives: [{of, kind, count, bytes, across}] of the received transfers:
      `of` is weights, gradients, metrics or activations, `across` mesh axes.
    received_bytes: the sum of those.
    compute_seconds, memory_seconds, network_seconds: at the chip's peak rates.
    least_step_seconds: the largest of the three (the roofline).
    bound_by: the largest one: compute, memory or network.
  """

  program: str
  topology: str
  chips: int
  mesh: dict[str, int]
  fits: bool
  capacity_bytes: int
  peak_bytes: int
  weights_bytes: int
  adapters_bytes: int
  optimizer_bytes: int
  other_bytes: int
  temporaries_bytes: int
  tokens: int
  parameters: int
  compile_seconds: float
  advice: str = ""
  flops_per_token: float | None = None
  products_per_token: float | None = None
  memory_traffic_bytes: int | None = None
  collectives: list[dict[str, Any]] | None = None
  received_bytes: int | None = None
  compute_seconds: float | None = None
  memory_seconds: float | None = None
  network_seconds: float | None = None
  least_step_seconds: float | None = None
  bound_by: str | None = None


def describe_base(
  config: BaseConfig, shape: LlamaConfig, stacked: bool
) -> Llama:
  """Returns a base of shapes without arrays, in `load_base`'s layout and types.

  Args:
    config: the base's dtype and quantisation.
    shape: of the base.
    stacked: whether its layers are stacked, as in training.

  Example:
    >>> from tokenlora_jax.formats.load import base_shape
    >>> config = BaseConfig("random:tiny", dtype="bfloat16")
    >>> base = describe_base(config, base_shape(config.path), stacked=True)
    >>> base.embedding.shape, base.embedding.dtype.name
    ((260, 64), 'bfloat16')
  """

  def make(name, sizes):
    zeros = jnp.zeros(sizes, config.dtype)
    if not name.endswith(".kernel"):
      return zeros
    quantizer = get_quantizer(config.quantize, name)
    return (jax.vmap(quantizer) if stacked else quantizer)(zeros)

  return jax.eval_shape(lambda: Llama(shape, make, stacked))


def plan_training(
  config: Config, shape: LlamaConfig, topology: Topology
) -> list[tuple[Plan, Program | None]]:
  """Plans the training step of `train.py`.

  Args:
    config: of the run.
    shape: of the base.
    topology: from `get_topology`.

  Returns:
    [(plan, program)], one pair; the program is None if the compiler refused it.

  Raises:
    InputError: the mesh does not fit the chips, the rows or the base's heads.
  """
  rows = config.data.rows // config.accumulate
  mesh = make_mesh(config.mesh, rows, topology.devices)
  check_heads(shape, mesh)
  base = described(describe_base(config.base, shape, stacked=True), mesh)
  state = describe_state(config, shape, mesh)
  sizes = len(config.data.tasks), config.data.rows, config.data.length
  sharding = NamedSharding(mesh, BATCH_SPEC)
  batch = {
    name: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
    for name, dtype in BATCH_TYPES.items()
  }
  parts = {"weights": base, "adapters": state.loras, "optimizer": state.opt}
  plan = plan_program(
    "train",
    lambda: make_step(config, mesh).lower(state, base, batch),
    parts=parts,
    tokens=math.prod(sizes),
    shape=shape,
    mesh=mesh,
    topology=topology,
    config=config,
  )
  return [plan]


def plan_program(
  name: str,
  lower: Callable[[], jax.stages.Lowered],
  *,
  parts: dict[str, Any],
  tokens: int,
  shape: LlamaConfig,
  mesh: Mesh,
  topology: Topology,
  config: Config,
) -> tuple[Plan, Program | None]:
  """Compiles a program for a topology and computes its costs.

  Args:
    name: `train`, `prefill` or `decode`.
    lower: traces the program for the mesh.
    parts: its `weights`, `adapters` and `optimizer`: trees of
      `jax.ShapeDtypeStruct` with shardings.
    tokens: read by the program, on all chips.
    shape: of the base.
    mesh: of the topology's devices.
    topology: the chips to compile for.
    config: of the run.

  Returns:
    (plan, program); the program is None if the compiler refused it.
  """
  chip = topology.chip
  held = {part: _bytes_a_chip(tree) for part, tree in parts.items()}
  start = time.perf_counter()
  lowered = lower()
  program, work, other = None, {}, 0
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    # The TPU compiler refuses a program that does not fit and reports its peak.
    peak = _wanted_bytes(str(error))
    if peak is None:
      raise
  else:
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes - sum(held.values())
    given_back = memory.output_size_in_bytes - memory.alias_size_in_bytes
    other = arguments + given_back
    peak = sum(held.values()) + other + memory.temp_size_in_bytes
    if topology.devices[0].platform == "tpu":
      # The TPU compiler decides by this figure: a program whose arguments and
      # temporaries sum to 17.6 GiB, but whose peak is 14.1, compiles for a chip
      # of 15.75; one of peak 17.2 is refused with that figure.
      peak = memory.peak_memory_in_bytes
    program = Program(compiled.as_text())
    work = _work(program, config, shape, tokens, mesh, chip)
  fits = program is not None and peak <= chip.memory
  plan = Plan(
    program=name,
    topology=topology.name,
    chips=mesh.size,
    mesh=dict(mesh.shape),
    fits=fits,
    capacity_bytes=chip.memory,
    peak_bytes=int(peak),
    **{f"{part}_bytes": held.get(part, 0) for part in _PARTS},
    other_bytes=int(other),
    temporaries_bytes=int(peak - sum(held.values()) - other),
    tokens=tokens,
    parameters=shape.matmul_parameters,
    compile_seconds=time.perf_counter() - start,
    advice="" if fits else _advice(name, config, mesh),
    **work,
  )
  return plan, program


_PARTS = ("weights", "adapters", "optimizer")


def _work(program, config, shape, tokens, mesh, chip) -> dict[str, Any]:
  """Returns the work of a compiled program and a chip's time for it at peak."""
  flops = program.flops + _attention_flops(program, config, shape, mesh)
  collectives = _collectives(program, dict(mesh.shape))
  received = sum(c["bytes"] for c in collectives)
  seconds = {
    "compute": flops / chip.flops,
    "memory": program.memory_traffic / chip.memory_rate,
    "network": received / chip.network_rate,
  }
  bound_by = max(seconds, key=seconds.get)
  return dict(
    flops_per_token=flops * mesh.size / tokens,
    products_per_token=program.flops * mesh.size / tokens,
    memory_traffic_bytes=int(program.memory_traffic),
    collectives=collectives,
    received_bytes=int(received),
    least_step_seconds=seconds[bound_by],
    bound_by=bound_by,
    **{f"{kind}_seconds": value for kind, value in seconds.items()},
  )


def _bytes_a_chip(tree) -> int:
  return sum(
    jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(tree)
  )


def _wanted_bytes(message: str) -> int | None:
  """Returns the peak in a TPU compiler's out-of-memory error, or None."""
  found = re.search(
    r"(?:Used |\()([\d.]+)([KMG])(?: of [\d.]+[KMG] hbm|\) exceeds available)",
    message,
  )
  if found is None:
    return None
  return int(float(found[1]) * 1024 ** (1 + "KMG".index(found[2])))


def _attention_flops(program, config, shape, mesh) -> float:
  """Returns the FLOPs of fused attention on one device.

  The program's text does not hold them. A product of T x T scores with H
  numbers a head is 2 T^2 H, and a causal kernel does half. The forward pass has
  two such products, the backward pass five, or seven in splash attention's two
  kernels.
  """
  length = config.data.length
  rows = len(config.data.tasks) * config.data.rows / config.accumulate
  rows /= mesh.size // mesh.shape["tensor"]
  one = length**2 * shape.head_width * shape.heads / mesh.shape["tensor"]
  products = 0
  for name, runs in program.kernels.items():
    backward = 4 if "dkv" in name else 3 if "dq" in name else 5
    forward = "fwd" in name or ("dkv" not in name and "dq" not in name)
    products += runs * (2 if forward else backward)
  return products * one * rows


def _collectives(program: Program, mesh_shape: dict[str, int]):
  """Sums a program's transfers by purpose, kind and mesh axes."""
  sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
  for one in program.collectives:
    across = tuple(
      axis for axis in mesh_shape if crosses(one.groups, mesh_shape, axis)
    )
    total = sums[_of(one, mesh_shape), one.kind, across]
    total[0] += one.count
    total[1] += one.count * one.bytes
  return [
    dict(of=of, kind=kind, across=across, count=int(count), bytes=int(size))
    for (of, kind, across), (count, size) in sorted(sums.items())
  ]


def _of(one: Collective, mesh_shape) -> str:
  """Returns a transfer's purpose, by the scopes of `sharding.whole`."""
  if one.kind == "all-gather" and "whole" in one.scope:
    return "weights"
  if one.bytes <= 1024:
    return "metrics"
  # XLA may merge sums and drop their scopes. Activations are summed over the
  # axis `tensor` alone.
  summed = one.kind in ("reduce-scatter", "all-reduce")
  if summed and ("whole" in one.scope or mesh_shape["tensor"] == 1):
    return "gradients"
  return "gradients" if "psum" in one.scope else "activations"


def _advice(name: str, config: Config, mesh: Mesh) -> str:
  if name != "train":
    return "set --base.quantize int8 or nf4, or take more chips"
  own = config.data.rows // (mesh.shape["data"] * mesh.shape["fsdp"])
  if config.remat != "full":
    return "set --remat full: a layer's activations are calculated again"
  if config.accumulate < own:
    return f"set --accumulate {own}: a row at a time, and the same result"
  if config.base.quantize != "nf4":
    kind = "int8" if config.base.quantize == "none" else "nf4"
    return f"set --base.quantize {kind}: a smaller base"
  return "take more chips (--mesh.fsdp splits the base), or --data.length less"
