"""Plans, of small runs on devices that are here and on a TPU that is not."""

import dataclasses
import importlib.util
import json
import math

import jax
import pytest

import infer
from tokenlora_jax.config import (
  BaseConfig,
  Config,
  DataConfig,
  DecodeConfig,
  InputError,
  LoraConfig,
  MeshConfig,
)
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.parallel.chips import CHIPS
from tokenlora_jax.plan.decoding import plan_decoding
from tokenlora_jax.plan.topology import Topology, get_topology
from tokenlora_jax.plan.training import describe_base, plan_training
import train

SHAPE = LlamaConfig(
  vocab=512, width=256, mlp_width=512, layers=3, heads=4, kv_heads=4,
  head_width=64,
)  # fmt: skip
HERE = Topology("here", CHIPS["v5e"], jax.devices())


def make_config(**settings):
  return Config(
    base=BaseConfig(dtype="float32"),
    lora=LoraConfig(rank=2),
    data=DataConfig(rows=8, length=64),
    **settings,
  )


def base_bytes():
  base = describe_base(BaseConfig(dtype="float32"), SHAPE, stacked=True)
  return sum(4 * math.prod(x.shape) for x in jax.tree.leaves(base))


@pytest.fixture(scope="module", params=["none", "full"])
def sharded(request):
  config = make_config(mesh=MeshConfig(expert=2), remat=request.param)
  [(plan, _)] = plan_training(config, SHAPE, HERE)
  return plan


@pytest.fixture(scope="module")
def alone():
  topology = Topology("here", CHIPS["v5e"], jax.devices()[:1])
  [(plan, program)] = plan_training(make_config(remat="none"), SHAPE, topology)
  return plan, program


def test_weights_are_received_twice_and_nothing_else_is_large(sharded):
  assert sharded.mesh == {"expert": 2, "data": 1, "fsdp": 4, "tensor": 1}
  received = {}
  for one in sharded.collectives:
    received[one["of"]] = received.get(one["of"], 0) + one["bytes"]
  assert set(received) == {"weights", "gradients", "metrics"}
  # Forward and backward, the 3 of 4 parts that a chip does not hold.
  adapters = sharded.adapters_bytes * 4
  ideal = 2 * (base_bytes() + adapters) * 3 / 4
  assert 0.8 * ideal <= received["weights"] <= 1.05 * ideal
  assert received["gradients"] <= adapters
  assert received["metrics"] <= 1000


def test_experts_send_each_other_metrics_alone(sharded):
  crossing = [c for c in sharded.collectives if "expert" in c["across"]]
  assert {c["of"] for c in crossing} <= {"metrics"}


def test_a_chip_holds_its_part(sharded):
  norms = 4 * SHAPE.width * (2 * SHAPE.layers + 1)
  want = (base_bytes() - norms) / 4 + norms
  assert sharded.weights_bytes == want
  assert sharded.optimizer_bytes >= 2 * sharded.adapters_bytes * 0.99
  # The new state takes the old one's memory: only the batch and metrics more.
  batch = 4 * 4 * 8 * 64 * 4 // 8
  assert sharded.other_bytes <= batch + 4096
  parts = ("weights", "adapters", "optimizer", "other", "temporaries")
  sizes = [getattr(sharded, f"{part}_bytes") for part in parts]
  assert sharded.peak_bytes == sum(sizes)
  assert sharded.fits and not sharded.advice


def test_no_product_is_made_for_the_frozen_weights(alone):
  plan, _ = alone
  # Attention has two products forward and five backward, of T x T x H a head.
  attention = 7 * 2 * 64 * SHAPE.heads * SHAPE.head_width * SHAPE.layers
  floor = 4 * SHAPE.matmul_parameters + attention
  assert 0.98 * floor <= plan.flops_per_token <= 1.05 * floor


def test_nothing_of_a_weights_shape_is_given_back(alone):
  _, program = alone
  kernels = {(3, 256, 512), (3, 512, 256), (3, 256, 4, 3, 64), (512, 256)}
  [root] = [i for i in program.computations[program.entry] if i.root]
  assert not kernels & {shape.dims for shape in root.shapes}


def test_full_remat_costs_a_forward_pass_and_saves_memory(alone):
  topology = Topology("here", CHIPS["v5e"], jax.devices()[:1])
  [(full, _)] = plan_training(make_config(remat="full"), SHAPE, topology)
  assert full.temporaries_bytes < alone[0].temporaries_bytes
  assert 1.3 < full.flops_per_token / alone[0].flops_per_token < 1.6


def test_what_does_not_fit_says_what_to_change():
  chip = dataclasses.replace(CHIPS["v5e"], memory=10**6)
  topology = Topology("here", chip, jax.devices()[:1])
  config = make_config(remat="none")
  [(plan, _)] = plan_training(config, SHAPE, topology)
  assert not plan.fits
  assert plan.advice.startswith("set --remat full")


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_decoding_reads_every_weight_once(quantize):
  topology = Topology("here", CHIPS["v5e"], jax.devices()[:1])
  config = dataclasses.replace(
    make_config(), base=BaseConfig(dtype="float32", quantize=quantize)
  )
  prefill, decode = (p for p, _ in plan_decoding(config, SHAPE, topology))
  assert (prefill.tokens, decode.tokens) == (64, 1)
  assert decode.weights_bytes == prefill.weights_bytes
  if quantize == "none":
    assert decode.weights_bytes == base_bytes()
  # The embedding is not read whole.
  read = decode.weights_bytes - 4 * SHAPE.vocab * SHAPE.width
  assert decode.memory_traffic_bytes >= read
  two_n = 2 * SHAPE.matmul_parameters
  assert two_n <= decode.flops_per_token <= 1.2 * two_n


@pytest.mark.parametrize("rule", ["exact", "probabilities"])
def test_a_step_on_a_tpu_copies_no_kernel_and_no_cache(rule):
  # Of a size at which the compiler would, were it let.
  shape = LlamaConfig(
    vocab=512, width=4096, mlp_width=512, layers=2, heads=32, kv_heads=32,
    head_width=128,
  )  # fmt: skip
  config = Config(
    base=BaseConfig(dtype="bfloat16"),
    lora=LoraConfig(rank=8),
    data=DataConfig(length=448),
    decode=DecodeConfig(max_new_tokens=64, rule=rule),
  )
  topology = get_topology("v5e:1x1")
  [(plan, _)] = plan_decoding(config, shape, topology, ["decode"])
  rows = 4 if rule == "probabilities" else 1
  cache = rows * 2 * shape.layers * 512 * 4096 * 2
  read = plan.weights_bytes - 2 * 512 * 4096 + plan.adapters_bytes + cache
  assert read <= plan.memory_traffic_bytes <= 1.05 * read


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5f:2x4", "--plan: 'v5f' is not one of .* \\(did you mean 'v5"),
    ("v5e", "--plan v5e: is not a size of v5e; want for example v5e:2x4"),
    (
      "h100:2x4",
      "--plan h100:2x4: is not a size of h100; want for example h100:8",
    ),
  ],
)
def test_a_topology_that_cannot_be_is_named(name, message):
  with pytest.raises(InputError, match=message):
    get_topology(name)


@pytest.mark.parametrize(
  ("name", "package"), [("v5e:2x4", "libtpu"), ("h100:8", "CUDA plug-in")]
)
def test_a_missing_plug_in_says_what_to_install(name, package, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(InputError, match=f"{package}: pip install"):
    get_topology(name)


def test_train_plans_a_tpu_that_is_not_here(tmp_path, capsys):
  file = tmp_path / "plan.json"
  command = [
    "--config", "configs/tiny.py", "--plan", "v5e:2x2", "--plan-json",
    str(file), "--data.length", "128", "--data.rows", "4",
  ]  # fmt: skip
  train.main(command)
  plan = json.loads(file.read_text())
  assert plan["topology"] == "v5e:2x2"
  assert plan["chips"] == 4
  assert plan["fits"]
  assert plan["capacity_bytes"] == int(15.75 * 2**30)
  assert plan["bound_by"] in ("compute", "memory", "network")
  assert plan["least_step_seconds"] > 0
  assert {c["of"] for c in plan["collectives"]} == {
    "weights", "gradients", "metrics"
  }  # fmt: skip
  assert "fits" in capsys.readouterr().out
  with pytest.raises(InputError, match="exists; choose a new file"):
    train.main(command)


def test_infer_plans_prefill_and_decode(tmp_path):
  file = tmp_path / "plan.json"
  infer.main([
    "--config", "configs/tiny.py", "--plan", "v5e:1x1", "--plan-json",
    str(file), "--decode.max-new-tokens", "8",
  ])  # fmt: skip
  plans = json.loads(file.read_text())
  assert set(plans) == {"prefill", "decode"}
