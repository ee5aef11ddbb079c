"""Loading: onto a mesh, each device its own part, and with little memory."""

import dataclasses
import json
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.loading import BOUND, write_checkpoint
from tokenlora_jax import formats
from tokenlora_jax.bank.bank import Bank, save_bank
from tokenlora_jax.commands import wiring
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.config import BaseConfig, InputError, MeshConfig
from tokenlora_jax.formats.hf import HfReader
from tokenlora_jax.formats.load import base_shape, identify_base, load_base
from tokenlora_jax.formats.locate import locate, open_base
from tokenlora_jax.formats.reader import parameter_shapes
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.model.config import PRESETS, LlamaConfig
from tokenlora_jax.model.lora import random_adapters
from tokenlora_jax.model.quantize import QUANTIZERS
from tokenlora_jax.parallel.sharding import make_mesh, tree_shardings

# Four blocks of inputs everywhere, and heads that a mesh can split.
SHAPE = LlamaConfig(
  vocab=64, width=256, mlp_width=256, layers=2, heads=8, kv_heads=2,
  head_width=32,
)  # fmt: skip
MESH = MeshConfig(fsdp=4, tensor=2)
# One of its three tensors of 33 MB must not be there twice.
LARGER = LlamaConfig(
  vocab=16384, width=512, mlp_width=1408, layers=4, heads=8, kv_heads=8,
  head_width=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint")
  write_checkpoint(folder, SHAPE, "float32", shard_bytes=1_000_000)
  assert len([*folder.glob("*.safetensors")]) > 3
  return folder


def by_hand(reader, name, stacked):
  """A parameter from whole tensors, joined as the kernel of `QKV` is."""
  if stacked and name.startswith("layers.*"):
    names = [name.replace("*", str(i)) for i in range(SHAPE.layers)]
    return np.stack([by_hand(reader, n, False) for n in names])
  if ".qkv." not in name:
    return reader.read(name)
  q, k, v = (reader.read(name.replace("qkv", p)) for p in "qkv")
  whole = np.zeros((SHAPE.width, 2, 6, 32), q.dtype)
  for head in range(2):
    for i in range(4):
      at = 32 * (4 * head + i)
      whole[:, head, i] = q[:, at : at + 32]
    whole[:, head, 4] = k[:, 32 * head : 32 * head + 32]
    whole[:, head, 5] = v[:, 32 * head : 32 * head + 32]
  return whole.reshape(SHAPE.width, -1)


def parameters(base):
  """The arrays by our names: layers.0.qkv.kernel, layers.*.o.kernel."""
  found = {}
  for path, leaf in jax.tree.leaves_with_path(base):
    parts = [str(getattr(k, "name", getattr(k, "idx", k))) for k in path]
    name = ".".join(part for part in parts if part != "value")
    if base.stacked:
      name = name.replace("layers.", "layers.*.")
    found[name] = leaf
  return found


@pytest.mark.parametrize("stacked", [False, True])
def test_every_parameter_is_the_files(folder, stacked):
  base = load_base(str(folder), "float32", stacked=stacked)
  reader = open_base(folder)
  found = parameters(base)
  assert len(found) == 3 + (7 if stacked else 2 * 7)
  for name, leaf in found.items():
    np.testing.assert_array_equal(leaf, by_hand(reader, name, stacked), name)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_mesh_holds_the_same_bits(folder, kind, stacked):
  mesh = make_mesh(MESH)
  want = load_base(str(folder), "float32", stacked=stacked, quantize=kind)
  got = load_base(str(folder), "float32", mesh, stacked, kind)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  shardings = jax.tree.leaves(tree_shardings(got, mesh))
  split = 0
  for leaf, sharding in zip(jax.tree.leaves(got), shardings, strict=True):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    split += leaf.addressable_shards[0].data.size * 8 == leaf.size
  # All but norms, and scales an output, which lie on one axis of the mesh.
  layers = 1 if stacked else SHAPE.layers
  assert split == 2 + layers * {"none": 5, "int8": 5, "nf4": 10}[kind]
  layer = got.layers if stacked else got.layers[0]
  first = jax.tree.leaves(layer.qkv.kernel.get_value())[0]
  lead = (None,) if stacked else ()
  block = (None,) if kind == "nf4" else ()
  want_spec = (*lead, "fsdp", *block, "tensor")
  assert tuple(first.sharding.spec) == want_spec
  tokens = np.arange(12).reshape(2, 6)
  # The bits are the same, but parts of products are summed in another order.
  logits = forward(want, tokens)
  size = float(abs(logits).max())
  np.testing.assert_allclose(forward(got, tokens), logits, atol=1e-4 * size)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
  "mesh", [MESH, MeshConfig(expert=4, tensor=2)], ids=["alone", "alike"]
)
def test_each_number_is_read_once(folder, mesh, stacked, monkeypatch):
  """Devices read their own parts, and those that are alike one for all."""
  times = {}
  original = HfReader._read

  def read(self, key, index):
    shape = self._stored[key].shape
    times.setdefault(key, np.zeros(shape, int))[index] += 1
    return original(self, key, index)

  monkeypatch.setattr(HfReader, "_read", read)
  for name in ("fingerprint", "fingerprint_1"):
    monkeypatch.setattr(HfReader, name, lambda self: "")
  load_base(str(folder), mesh=make_mesh(mesh), stacked=stacked)
  assert len(times) == len(parameter_shapes(SHAPE))
  assert all((count == 1).all() for count in times.values())


def test_random_weights_are_one_model_in_both_layouts_and_on_a_mesh():
  layered, stacked = (
    load_base("random:tiny", "float32", stacked=x) for x in (False, True)
  )
  for i in range(2):
    want = jax.tree.map(lambda x, i=i: x[i], stacked.layers)
    jax.tree.map(np.testing.assert_array_equal, layered.layers[i], want)
  mesh = make_mesh(MESH)
  jax.tree.map(
    np.testing.assert_array_equal,
    load_base("random:tiny", "float32", mesh, stacked=True),
    stacked,
  )
  # Each of the joined maps has its own fan-in, which is the width.
  kernel = np.asarray(stacked.layers.qkv.kernel[...])
  assert np.std(kernel, axis=(0, 1)) == pytest.approx(1 / 8, rel=0.3)


def test_blocks_that_a_mesh_cannot_split_are_told():
  assert PRESETS["tiny"].projection_shapes["o"][0] == 64
  with pytest.raises(
    InputError,
    match=r"^mesh\.tensor: 2 does not divide an axis of"
    r" layers\.\*\.o\.kernel\.codes, which is 1 long$",
  ):
    load_base(
      "random:tiny", "float32", make_mesh(MeshConfig(data=4, tensor=2)),
      stacked=True, quantize="nf4",
    )  # fmt: skip


# -----------------------------------------------------------------------------
# Memory.

MEASURE = """
import gc, json, sys
from benchmarks.loading import load
from tokenlora_jax import load_base
from tokenlora_jax.formats.load import _trim
from tokenlora_jax.formats.reader import BaseReader

folder, settings, hoard = json.loads(sys.argv[1])
# Compiling takes tens of MB at any size, and only where the cache lacks a
# program. So a first load compiles, and its arrays are freed.
load_base(folder, **settings)
gc.collect()
_trim()
if hoard:
  kept, fill = [], BaseReader.fill
  def keep(self, out, name, index):
    fill(self, out, name, index)
    # One tensor too many is found.
    if name == "embedding":
      kept.append(out.copy())
  BaseReader.fill = keep
print(json.dumps(load(folder, settings, 1)))
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
  folder = tmp_path_factory.mktemp("larger")
  largest = write_checkpoint(folder, LARGER, "float32", shard_bytes=50_000_000)
  assert largest == 16384 * 512 * 4
  return folder, largest


@pytest.mark.parametrize(
  ("settings", "hoard"),
  [
    ({}, False),
    ({"stacked": True}, False),
    ({}, True),
  ],
  ids=["list", "stacked", "a loader that keeps a tensor"],
)
def test_little_memory_beside_the_base(larger, settings, hoard):
  folder, largest = larger
  what = json.dumps([str(folder), {"dtype": "float32"} | settings, hoard])
  out = subprocess.run(
    [sys.executable, "-c", MEASURE, what],
    cwd=Path(__file__).parents[1],
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  found = json.loads(out)
  above = found["peak"] - found["floor"] - found["base"]
  # Without programs and compiler, half of what the documentation promises.
  assert (above <= BOUND / 2 * largest) != hoard, found


def test_a_command_finds_its_base_once(monkeypatch, tmp_path):
  """Tokenizer, shape, fingerprint and weights are of one look at the path."""
  write_checkpoint(tmp_path, PRESETS["tiny"], "float32", 2**30)
  load_tokenizer("random:tiny").save_pretrained(tmp_path)
  looks = []

  def look(path, *args):
    looks.append(path)
    return locate(path, *args)

  for module in (formats.locate, formats.tokenizers):
    monkeypatch.setattr(module, "locate", look)
  args = Arguments(base=BaseConfig(path=str(tmp_path), dtype="float32"))
  adapters = random_adapters(load_base(str(tmp_path), "float32"), 2, 2)
  identity = identify_base(str(tmp_path))
  bank = Bank(adapters, str(tmp_path), identity.fingerprint, {})
  save_bank(tmp_path / "bank", bank)
  looks.clear()
  args = dataclasses.replace(args, bank=str(tmp_path / "bank"))
  base, tokenizer, _ = wiring.load(args)
  assert looks == [str(tmp_path)]
  # The thin functions over it give the same, with a look each.
  assert base.config == base_shape(str(tmp_path)) == PRESETS["tiny"]
  assert base.fingerprint == identity.fingerprint
  theirs = load_tokenizer(tmp_path)
  assert tokenizer.get_vocab() == theirs.get_vocab()
  assert len(looks) == 3


def test_banks_on_disk_know_random_bases_by_their_names():
  base = load_base("random:tiny", "float32")
  assert base.fingerprint == identify_base("random:tiny").fingerprint
  assert base.fingerprint == "random:tiny"
