"""Counting what a compiled program does."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from tokenlora_jax.config import MeshConfig
from tokenlora_jax.parallel.sharding import MANUAL_AXES, make_mesh
from tokenlora_jax.plan.groups import crosses, replica_groups
from tokenlora_jax.plan.program import Program


def compile(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return Program(jax.jit(function).lower(*args).compile().as_text())


def test_a_loop_counts_as_often_as_it_runs():
  def inner(x, w):
    return jnp.tanh(x @ w), None

  def outer(x, ws):
    # 3 times 5 products of [8, 16] with [16, 16], then one with [16, 4].
    x, _ = jax.lax.scan(
      lambda x, _: (jax.lax.scan(inner, x, ws)[0], None), x, length=3
    )
    return x @ jnp.ones((16, 4))

  program = compile(outer, (8, 16), (5, 16, 16))
  assert program.flops == 15 * 2 * 8 * 16 * 16 + 2 * 8 * 16 * 4


def test_the_tests_flags_leave_what_plans_read_as_it_is():
  """They save time in making code of a program that is the same."""
  real = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
  }

  def steps(x, ws):
    def step(x, w):
      return jax.nn.softmax(x @ w) + x, x.sum()

    return jax.lax.scan(step, x, ws)

  shapes = ((8, 16), (5, 16, 16))
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  lowered = jax.jit(jax.grad(lambda *x: steps(*x)[0].sum())).lower(*args)
  quick, slow = (
    lowered.compile(compiler_options=options) for options in (None, real)
  )
  assert "fusion" in quick.as_text()
  mine, theirs = (Program(x.as_text()) for x in (quick, slow))
  assert mine.flops == theirs.flops > 0
  assert mine.memory_traffic == theirs.memory_traffic > 0
  assert mine.kernels == theirs.kernels
  memory = quick.memory_analysis()
  assert memory.temp_size_in_bytes == slow.memory_analysis().temp_size_in_bytes


TPU = """HloModule m

%body (p: (s32[], f32[4,8,5])) -> (s32[], f32[4,8,5]) {
  %p = (s32[]{:T(128)}, f32[4,8,5]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8,5]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = f32[4,5,6]{2,1,0:T(8,128)S(1)} constant({...})
  %y = f32[4,8,6]{2,1,0} convolution(%x, %w), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  %g = f32[32,8]{1,0} all-gather(%y), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="2"}, metadata={op_name="jit(step)/whole/all_gather"}
  %h = f32[32,8]{1,0} all-gather(%y), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="2"}, metadata={op_name="jit(step)/whole/all_gather"}
  ROOT %t = (s32[], f32[4,8,5]{2,1,0}) tuple(%i, %x)
}

%condition (q: (s32[], f32[4,8,5])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[4,8,5]{2,1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} constant(32)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[4,8,5]) -> f32[4,8,5] {
  %a = f32[4,8,5]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8,5]{2,1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,8,5]{2,1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[4,8,5]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_dialect_of_tpus():
  program = Program(TPU)
  assert program.runs["body"] == 32
  # The two halves of one transfer are one: 7/8 of 32 x 8 floats arrive.
  [gather] = program.collectives
  assert (gather.count, gather.bytes) == (32, 32 * 8 * 4 * 7 / 8)
  assert "whole" in gather.scope
  # A batch of products is a convolution there: 4 of [8, 5] with [5, 6].
  assert program.flops == 32 * 4 * 2 * 8 * 5 * 6


def test_what_devices_send_is_found():
  mesh = make_mesh(MeshConfig(expert=2, fsdp=4))

  def local(x, w):
    def body(x, w):
      w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
      return x @ w, None

    x, _ = jax.lax.scan(body, x, w)
    return jax.lax.psum(x.sum(), ("expert", "fsdp"))

  run = jax.shard_map(
    local, mesh=mesh, in_specs=(P(("expert", "fsdp")), P(None, "fsdp")),
    out_specs=P(), axis_names=MANUAL_AXES, check_vma=False,
  )  # fmt: skip
  program = compile(run, (8, 16), (5, 16, 16))
  sent = {c.kind: c for c in program.collectives}
  assert set(sent) == {"all-gather", "all-reduce"}
  assert sent["all-gather"].count == 5
  assert sent["all-gather"].bytes == 16 * 16 * 4 * 3 / 4
  shape = dict(mesh.shape)
  assert not crosses(sent["all-gather"].groups, shape, "expert")
  assert crosses(sent["all-gather"].groups, shape, "fsdp")
  assert crosses(sent["all-reduce"].groups, shape, "expert")


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
    ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
    (
      "replica_groups=mesh['a'=2,'b'=2] {'a'}, x",
      ((0, 2), (1, 3)),
    ),
    ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}, x", ((0, 2), (1, 3))),
    ("nothing", ()),
  ],
)
def test_groups_in_every_notation(text, groups):
  assert replica_groups(text) == groups


def test_traffic_counts_the_slices_that_a_loop_reads():
  def body(x, w):
    return jnp.tanh(x * w), None

  size = 1 << 16
  program = compile(
    lambda x, w: jax.lax.scan(body, x, w)[0], (size,), (6, size)
  )
  # Each of six rounds reads x and a slice of w and writes x.
  least = 6 * 3 * size * 4
  assert least <= program.memory_traffic <= 2 * least
