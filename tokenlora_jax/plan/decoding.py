"""Plans `infer.py`: the prefill of a prompt, and a decode step of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokenlora_jax.config import Config
from tokenlora_jax.decoding import graph
from tokenlora_jax.decoding.sampling import Sampler
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.lora import Adapters, init_stacked
from tokenlora_jax.parallel.sharding import decoding_mesh, described
from tokenlora_jax.plan.program import Program
from tokenlora_jax.plan.topology import Topology
from tokenlora_jax.plan.training import Plan, describe_base, plan_program


def plan_decoding(
  config: Config,
  shape: LlamaConfig,
  topology: Topology,
  phases: Sequence[str] = ("prefill", "decode"),
) -> list[tuple[Plan, Program]]:
  """Plans one text: a prompt of `data.length` tokens and `max_new_tokens` more.

  Args:
    config: of the bank and the decoding.
    shape: of the base.
    topology: from `get_topology`.
    phases: what to plan, each compiled on its own.

  Returns:
    [(plan, program)] by phase: of the prefill, and of one decode step.

  Raises:
    InputError: the settings do not fit the base.
  """
  mesh = decoding_mesh(shape, topology.devices, config.base.quantize)
  base = described(describe_base(config.base, shape, stacked=False), mesh)
  loras = described(
    jax.eval_shape(functools.partial(_adapters, config, shape)), mesh
  )
  length, new = config.data.length, config.decode.max_new_tokens
  reading = graph.Reading(get_rule(config.decode.rule), split=mesh.size > 1)
  experts = len(config.data.tasks)

  def put(tree: Any) -> Any:
    def one(x):
      # The cache is sharded by kv heads; the rest is small and replicated.
      spec = P(None, "tensor") if len(x.shape) == 4 else P()
      return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
      )

    return jax.tree.map(one, tree)

  gates = put(jax.ShapeDtypeStruct((1, experts), jnp.float32))
  tokens = put(jax.ShapeDtypeStruct((1, length), jnp.int32))
  pad = put(jax.ShapeDtypeStruct((1,), jnp.int32))
  prefill = functools.partial(
    graph.prefill, reading=reading, slots=length + new
  )
  cache, _ = jax.eval_shape(prefill, base, loras, None, gates, tokens, pad)
  state = put(
    jax.eval_shape(
      lambda cache: graph.DecodeState(
        cache=cache,
        looked=None,
        token=jnp.zeros(1, jnp.int32),
        gates=jnp.zeros((1, experts)),
        belief=jnp.zeros((1, 0)),
        hidden=jnp.zeros((1, shape.width)),
        lengths=jnp.zeros(1, jnp.int32),
        made=jnp.int32(0),
        done=jnp.zeros(1, bool),
        tokens=jnp.zeros((1, 1), jnp.int32),
        log_probs=jnp.zeros((1, 1)),
        trace=jnp.zeros((1, 1, experts)),
        key=jax.random.key(0),
      ),
      cache,
    )
  )
  prompt = put(jax.ShapeDtypeStruct((1, length + 1), jnp.int32))
  number = put(jax.ShapeDtypeStruct((), jnp.int32))
  ends = put(jax.ShapeDtypeStruct((graph.ENDS,), jnp.int32))
  parts = {"weights": base, "adapters": loras}
  alike = dict(
    parts=parts, shape=shape, mesh=mesh, topology=topology, config=config
  )
  programs = {
    "prefill": lambda: graph.prefill.lower(
      base, loras, None, gates, tokens, pad,
      reading=reading, slots=length + new,
    ),
    # A buffer of one token makes the loop run once.
    "decode": lambda: graph.decode.lower(
      base, loras, None, state, prompt, None, number, ends,
      reading=reading, sampler=Sampler(), chunk=1,
    ),
  }  # fmt: skip
  made = {"prefill": length, "decode": 1}
  return [
    plan_program(phase, programs[phase], tokens=made[phase], **alike)
    for phase in phases
  ]


def _adapters(config: Config, shape: LlamaConfig):
  names = config.data.tasks
  stacked = init_stacked(jax.random.key(0), shape, config.lora, names)
  return Adapters.unstack(names, stacked).astype(config.base.dtype).layers
