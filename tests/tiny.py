"""Random numbers, a tiny base, its rows and a short run, for the tests."""

import copy
import dataclasses
import functools
import io
import string
from unittest import mock
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from tokenlora_jax.config import (
  Config,
  DataConfig,
  LoraConfig,
  MeshConfig,
  OptimConfig,
)
from tokenlora_jax.data.batches import batches, held_out_batches
from tokenlora_jax.data.rows import Row
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.llama import Llama, join_heads
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training import loop
from tokenlora_jax.training import step as training

# Every axis that a mesh may split divides by 8, or by 2 for tensor.
SHAPE = LlamaConfig(
  vocab=48, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_width=8
)
FOUR = ("gsm8k", "arc_challenge", "codealpaca", "squad")
TWO = ("gsm8k", "squad")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
  """A parameter that depends on its name and shape alone."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape, np.float32)
  x = 1 + 0.1 * x if "norm" in name else x / np.sqrt(shape[-2])
  return jnp.asarray(x)


def by_projection(config: LlamaConfig, make):
  """A factory of a Llama's parameters from one that has q, k and v apart."""

  def joined(name, shape):
    if ".qkv." not in name:
      return make(name, shape)
    lead = shape[:1] if ".*." in name else ()
    axes = slice(name.endswith(".bias"), None)
    shapes = {p: (*lead, *config.projection_shapes[p][axes]) for p in "qkv"}
    parts = [make(name.replace("qkv", p), shapes[p]) for p in "qkv"]
    return join_heads(config, parts)

  return joined


@functools.cache
def make_base(dtype: str = "float32") -> Llama:
  def make(name, shape):
    return draw(name, shape).astype(dtype)

  return Llama(SHAPE, by_projection(SHAPE, make), stacked=True)


class Tokenizer:
  """A token a letter; 0 starts and 1 ends a text."""

  bos_token_id = 0
  eos_token_id = 1
  all_special_ids = (0, 1)
  chat_template = None

  def __len__(self):
    return 48

  def encode(self, text, add_special_tokens=True, **kwargs):
    letters = [2 + string.ascii_letters.index(c) % 46 for c in text]
    return [0, *letters] if add_special_tokens else letters

  def decode(self, token_ids, skip_special_tokens=False):
    raise AssertionError("nothing here is turned into text")

  def get_vocab(self):
    return {c: 2 + i % 46 for i, c in enumerate(string.ascii_letters)}

  def apply_chat_template(self, conversation, **kwargs):
    raise AssertionError("there is no template")


def make_rows(task: str, count: int = 20, longest: int = 12) -> list[Row]:
  """Rows that depend on the task's name alone; their texts have no meaning."""
  rng = np.random.default_rng(zlib.crc32(task.encode()))

  def text(least):
    size = rng.integers(least, longest)
    return "".join(rng.choice(list(string.ascii_letters), size))

  return [Row(text(4), text(1), f"{task}:{i}") for i in range(count)]


def make_config(
  tasks=TWO, rows=4, dropout=0.0, steps=12, targets=("q", "v"), **settings
) -> Config:
  optim = {"learning_rate": 1e-2, "warmup_steps": 2} | settings.pop("optim", {})
  return Config(
    lora=LoraConfig(4, 8.0, dropout=dropout, targets=targets),
    data=DataConfig(tasks=tasks, rows=rows, length=24),
    optim=OptimConfig(steps=steps, **optim),
    **settings,
  )


def one_device() -> jax.sharding.Mesh:
  return make_mesh(MeshConfig(), devices=jax.devices()[:1])


def make_batches(config: Config, **rows):
  """The run's endless batches; `rows` as in `make_rows`."""
  rows = {task: make_rows(task, **rows) for task in config.data.tasks}
  return batches(rows, Tokenizer(), config.data)


@functools.cache
def _first_batches(config: Config, steps: int, **rows) -> list:
  data = iter(make_batches(config, **rows))
  return [next(data) for _ in range(steps)]


def first_batches(config: Config, steps: int, **rows) -> list:
  """The first batches of the run, on the host, made once and the caller's own."""
  return copy.deepcopy(_first_batches(config, steps, **rows))


def random_state(config: Config, base: Llama, mesh) -> training.TrainState:
  """The first state, but with B not zero, so that A has a gradient too."""
  state = training.init_state(config, base, mesh)
  rng = np.random.default_rng(1)

  def fill(lora):
    b = 0.1 * rng.standard_normal(lora.b.shape, np.float32)
    return dataclasses.replace(lora, b=jax.device_put(b, lora.b.sharding))

  loras = {name: fill(lora) for name, lora in state.loras.items()}
  return dataclasses.replace(state, loras=loras)


_make_step = functools.cache(training.make_step)


def make_step(config: Config, mesh):
  """`training.make_step`, once for all tests whose steps are the same."""
  data = DataConfig(tasks=config.data.tasks, rows=config.data.rows)
  same = ("lora", "optim", "seed", "remat", "accumulate")
  settings = {name: getattr(config, name) for name in same}
  return _make_step(Config(data=data, **settings), mesh)


def run_steps(config, base, mesh, batches, state=None):
  """Runs a step a batch: (last state, losses float32[steps, E], norms)."""
  state = random_state(config, base, mesh) if state is None else state
  step = make_step(config, mesh)
  losses, norms = [], []
  for batch in batches:
    state, metrics = step(state, base, training.put_batch(batch, mesh))
    losses.append(metrics["loss"])
    norms.append(metrics["gradient_norm"])
  return state, np.array(losses), np.array(norms)


def train(config: Config, workdir, batches=None, mesh=None, console=None):
  """`loop.train` on the tiny base, quietly."""
  mesh = mesh or one_device()
  rows = {task: make_rows(task, count=6) for task in config.data.tasks}
  held_out = held_out_batches(rows, Tokenizer(), config.data)
  workdir.mkdir(exist_ok=True)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with mock.patch.object(loop, "make_step", make_step):
    return loop.train(
      config,
      jax.device_put(make_base(), everywhere),
      mesh,
      make_batches(config) if batches is None else batches,
      [training.put_batch(batch, mesh) for batch in held_out],
      workdir,
      console or Console(file=io.StringIO()),
    )


def leaves(tree):
  """The leaves by name, on the host."""
  return {
    jax.tree_util.keystr(path): np.array(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def assert_identical(left, right):
  left, right = leaves(left), leaves(right)
  assert left.keys() == right.keys()
  for name, leaf in left.items():
    assert leaf.dtype == right[name].dtype, name
    np.testing.assert_array_equal(leaf, right[name], name)
