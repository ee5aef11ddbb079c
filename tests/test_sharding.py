"""The table of shardings, and that no mesh changes a result."""

import dataclasses
import random
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from tiny import (
  FOUR,
  SHAPE,
  by_projection,
  draw,
  first_batches,
  make_config,
  one_device,
  random_state,
  run_steps,
)

from tokenlora_jax.config import PROJECTIONS, InputError, LoraConfig, MeshConfig
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.model.config import PRESETS, LlamaConfig
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.parallel import sharding
from tokenlora_jax.parallel.sharding import (
  PARAMETER_AXES,
  check_heads,
  decoding_mesh,
  make_mesh,
  parameter_spec,
  tree_shardings,
)
from tokenlora_jax.training import step as training
from tokenlora_jax.training.checkpoint import Checkpoints

EIGHT = MeshConfig(expert=2, data=2, fsdp=2)
CONFIG = make_config(FOUR, rows=8, steps=20, dropout=0.1)


def sharded_base(mesh) -> Llama:
  def make(name, shape):
    spec = parameter_spec(name, shape, mesh)
    return jax.device_put(
      whole(name, shape), jax.sharding.NamedSharding(mesh, spec)
    )

  whole = by_projection(SHAPE, draw)

  return Llama(SHAPE, make, stacked=True)


def run(mesh, config=CONFIG, steps=20):
  batches = first_batches(config, steps)
  return run_steps(config, sharded_base(mesh), mesh, batches)


@pytest.fixture(scope="module")
def alone():
  """The run on one device."""
  return run(one_device())


# -----------------------------------------------------------------------------
# Meshes.


@pytest.mark.parametrize(
  "mesh",
  [
    EIGHT,
    MeshConfig(expert=4, tensor=2),
    MeshConfig(fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
  ],
  ids=lambda m: f"expert{m.expert}-data{m.data}-fsdp{m.fsdp}-tensor{m.tensor}",
)
def test_a_mesh_changes_no_result(mesh, alone, caplog):
  mesh = make_mesh(mesh, CONFIG.data.rows)
  assert mesh.size == 8
  with jax.log_compiles():
    state, losses, norms = run(mesh)
  compiled = [r for r in caplog.records if "compilation of jit(step)" in r.msg]
  assert len(compiled) == 1, "the state's layout must not change in a step"
  want, want_losses, want_norms = alone
  np.testing.assert_allclose(losses, want_losses, atol=1e-5)
  np.testing.assert_allclose(norms, want_norms, rtol=1e-4)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), state, want
  )
  layout = tree_shardings(state, mesh)
  for leaf, where in zip(
    jax.tree.leaves(state), jax.tree.leaves(layout), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


@pytest.mark.parametrize(
  "mesh", [MeshConfig(fsdp=2), MeshConfig(fsdp=1)], ids=["split", "whole"]
)
def test_rows_in_parts_are_rows_at_once(mesh, alone):
  devices = jax.devices()[: mesh.fsdp]
  mesh = make_mesh(mesh, CONFIG.data.rows // 4, devices)
  # Rows have targets of other numbers, so that a mean of means would show.
  targets = [b["loss_mask"].sum(axis=2) for b in first_batches(CONFIG, 1)]
  assert len(np.unique(targets)) > 2
  config = dataclasses.replace(CONFIG, accumulate=4)
  _, losses, norms = run(mesh, config)
  np.testing.assert_allclose(losses, alone[1], atol=1e-5)
  np.testing.assert_allclose(norms, alone[2], rtol=1e-4)


def test_a_state_is_restored_onto_another_mesh(alone, tmp_path):
  mesh = make_mesh(EIGHT, CONFIG.data.rows)
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(3, alone[0], {})
  like = random_state(CONFIG, sharded_base(mesh), mesh)
  state, _ = checkpoints.restore(like, mesh)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, state, alone[0])
  a = state.loras["q"].a
  assert a.sharding.spec == P("expert", None, None, "fsdp")
  assert a.addressable_shards[0].data.shape == (2, 2, 4, 16)


def test_a_device_gets_its_own_experts_and_rows():
  mesh = make_mesh(EIGHT, CONFIG.data.rows)
  [batch] = first_batches(CONFIG, 1)
  placed = training.put_batch(batch, mesh)
  assert set(placed) == {"tokens", "positions", "segment_ids", "loss_mask"}
  for name, x in placed.items():
    np.testing.assert_array_equal(x, batch[name])
    for shard in x.addressable_shards:
      assert shard.data.shape == (2, 2, batch["tokens"].shape[2])
      np.testing.assert_array_equal(shard.data, batch[name][shard.index])


def test_fsdp_takes_the_devices_that_are_left():
  assert make_mesh(MeshConfig(expert=2)).shape["fsdp"] == 4
  assert make_mesh(MeshConfig(fsdp=8)).shape["data"] == 1


@pytest.mark.parametrize(
  ("mesh", "rows", "message"),
  [
    (
      MeshConfig(data=3),
      0,
      "mesh: expert 1 x data 3 x fsdp 2 x tensor 1 takes 6 devices, but there"
      " are 8; set --mesh.data or --mesh.fsdp so that they agree",
    ),
    (
      MeshConfig(expert=16),
      0,
      "mesh: expert 16 x data 1 x fsdp 1 x tensor 1 takes 16 devices, but"
      " there are 8; set --mesh.data or --mesh.fsdp so that they agree",
    ),
    (
      MeshConfig(data=2, fsdp=4),
      12,
      "data.rows: 12 is not a multiple of mesh data 2 x fsdp 4, which split"
      " them",
    ),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, rows, message):
  with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
    make_mesh(mesh, rows)


# -----------------------------------------------------------------------------
# The table.


def names_of(stacked: bool) -> dict[str, tuple[int, ...]]:
  """All parameters a Llama can have, biases and an own head included."""
  biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
  config = LlamaConfig(
    vocab=48, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2,
    head_width=8, **biases,
  )  # fmt: skip
  shapes = {}

  def make(name, shape):
    shapes[name] = shape
    return np.zeros(shape, np.float32)

  Llama(config, make, stacked)
  return shapes


@pytest.mark.parametrize(
  ("stacked", "count"), [(True, 3 + 2 + 10), (False, 3 + 2 * (2 + 10))]
)
def test_each_parameter_of_a_base_matches_one_rule(stacked, count):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  shapes = names_of(stacked)
  assert len(shapes) == count
  lead = (None,) if stacked else ()
  for name, shape in shapes.items():
    rules = [r for r, _ in PARAMETER_AXES if re.fullmatch(r, name)]
    assert len(rules) == 1, name
    spec = parameter_spec(name, shape, mesh)
    assert len(spec) == len(shape)
    part = name.split(".", 2)[-1]
    # Independent of the table: what each kind of map splits.
    want = {
      "embedding": ("tensor", "fsdp"),
      "head": ("fsdp", "tensor"),
      "norm": (None,),
    }.get(name)
    if want is None:
      inward = part.split(".")[0] in ("o", "down")
      if part.endswith("norm"):
        want = (*lead, None)
      elif part.endswith("bias"):
        want = (*lead, None if inward else "tensor")
      else:
        want = (*lead, *(("tensor", "fsdp") if inward else ("fsdp", "tensor")))
    assert tuple(spec) == want, name


def test_each_leaf_of_the_state_matches_one_rule():
  mesh = make_mesh(EIGHT)
  config = make_config(FOUR)
  config = type(config)(
    data=config.data, lora=LoraConfig(rank=4, targets=PROJECTIONS)
  )
  state = training.init_state(config, sharded_base(mesh), mesh)
  for path, leaf in jax.tree.leaves_with_path(state):
    name = jax.tree_util.keystr(path)
    spec = leaf.sharding.spec
    if name == ".step":
      assert spec == P()
    else:
      assert spec[0] == "expert", name
      assert leaf.shape[0] == 4, name
    half = name[-2:]
    if half in (".a", ".b", "a']", "b']"):
      # The side that meets the model's width is split as the width is.
      inner = ("'o'" in name or "'down'" in name) == ("b" in half)
      want = ("expert", None, None, "fsdp" if inner else ("fsdp", "tensor"))
      assert tuple(spec) == want, name


def test_no_rule_and_two_rules_are_bugs(monkeypatch):
  mesh = one_device()
  with pytest.raises(ValueError, match=r"^router\.kernel: 0 sharding rules"):
    parameter_spec("router.kernel", (4, 4), mesh)
  rules = (*PARAMETER_AXES, (r"emb.*", (None, None)))
  monkeypatch.setattr(sharding, "PARAMETER_AXES", rules)
  with pytest.raises(ValueError, match=r"^embedding: 2 sharding rules"):
    parameter_spec("embedding", (4, 4), mesh)


def test_an_axis_that_does_not_divide_is_named():
  mesh = make_mesh(MeshConfig(tensor=8))
  width = PRESETS["smollm2-135m"].mlp_width
  assert parameter_spec("layers.0.up.bias", (width,), mesh) == P("tensor")
  with pytest.raises(
    InputError,
    match=r"^mesh\.tensor: 8 does not divide an axis of head, which is 260"
    " long$",
  ):
    parameter_spec("head", (64, 260), mesh)


@pytest.mark.parametrize("seed", range(40))
def test_decoding_splits_a_base_of_any_size(seed):
  """Of the numbers that divide the devices, the largest that divides it all."""
  draw = random.Random(seed)
  kv_heads = draw.choice([1, 2, 3, 4, 6, 8])
  config = LlamaConfig(
    vocab=draw.choice([draw.randint(1, 300), 32, 240]),
    width=draw.randint(1, 40),
    mlp_width=draw.choice([draw.randint(1, 300), 24, 480]),
    layers=1,
    heads=kv_heads * draw.randint(1, 3),
    kv_heads=kv_heads,
    head_width=2 * draw.randint(1, 9),
    tied=draw.random() < 0.5,
    qkv_bias=draw.random() < 0.5,
  )
  count = draw.randint(1, 8)
  devices = jax.devices()[:count]

  def splits(mesh):
    def make(name, shape):
      parameter_spec(name, shape, mesh)
      return jnp.zeros(shape)

    check_heads(config, mesh)
    Llama(config, make)

  mesh = decoding_mesh(config, devices)
  splits(mesh)
  for tensor in range(mesh.size + 1, count + 1):
    if count % tensor == 0:
      with pytest.raises(InputError):
        splits(make_mesh(MeshConfig(tensor=tensor), devices=devices[:tensor]))


def test_a_vocabulary_that_no_device_divides_is_not_split():
  odd = dataclasses.replace(PRESETS["llama2-7b"], vocab=32_001)
  assert decoding_mesh(odd, jax.devices()).size == 1
  assert decoding_mesh(odd, jax.devices()[:3]).size == 1


def test_decoding_cuts_no_kv_head_and_no_group():
  devices, shape = jax.devices(), PRESETS["llama2-7b"]
  assert decoding_mesh(shape, devices).shape["tensor"] == 8
  # down has 11,008 inputs, 172 groups.
  assert decoding_mesh(shape, devices, "nf4").shape["tensor"] == 4
  tiny = decoding_mesh(PRESETS["tiny"], devices, "nf4")
  load_base("random:tiny", mesh=tiny, quantize="nf4")
