"""The fused attention of accelerators, interpreted, against our own."""

import dataclasses
import functools

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tokenlora_jax.config import MeshConfig
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.fused_attention import (
  XLA,
  Kernel,
  _cudnn,
  _lengths,
  choose_kernel,
  compute_capability,
)
from tokenlora_jax.parallel.sharding import MANUAL_AXES, make_mesh


@dataclasses.dataclass
class Elsewhere:
  """A mesh on devices that are not here."""

  platform: str
  compute_capability: str = ""
  device_kind: str = ""
  tensor: int = 1

  @property
  def devices(self):
    return np.array([self])

  @property
  def shape(self):
    return {"tensor": self.tensor}


@pytest.mark.parametrize(
  ("platform", "length", "packed", "name"),
  [
    ("tpu", 1024, False, "splash"),
    ("tpu", 1024, True, "splash"),
    ("tpu", 192, False, "xla"),
    ("cuda", 1024, False, "cudnn"),
    ("cuda", 1024, True, "xla"),
    ("cpu", 1024, False, "xla"),
  ],
)
def test_the_platform_and_the_length_choose(platform, length, packed, name):
  mesh = Elsewhere(platform, "9.0")
  chosen = choose_kernel(mesh, length, shape(64), jnp.bfloat16, packed)
  assert chosen.name == name


def shape(width, **more):
  return dataclasses.replace(PRESETS["tiny"], head_width=width, **more)


def traced(kernel, dtype, width, length=64):
  """Shapes of what it makes of 4 heads, 2 of them keys', and gradients."""
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  row = jax.ShapeDtypeStruct((2, length), jnp.int32)
  q, k = (
    jax.ShapeDtypeStruct(size, dtype)
    for size in ((2, length, 4, width), (2, 2, length, width))
  )

  def step(q, k, v, segments):
    def loss(q, k, v):
      return kernel.attend(q, k, v, kernel.mask(segments)).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  step = jax.shard_map(
    step, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=MANUAL_AXES,
    check_vma=False,
  )  # fmt: skip
  return [x.shape for x in jax.eval_shape(jax.jit(step), q, k, k, row)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [6, 16, 20, 64, 80, 128, 136, 256])
@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.9", "9.0", "gfx942"])
def test_what_is_chosen_on_a_gpu_can_be_traced(
  dtype, width, capability, monkeypatch
):
  # cuDNN's own checks run when it is traced; they ask for the GPU that is here.
  of_gpu = compute_capability(Elsewhere("cuda", capability))

  def has(wanted):
    return of_gpu >= tuple(map(int, wanted.split(".")))

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", has)
  chosen = choose_kernel(
    Elsewhere("cuda", capability), 64, shape(width), dtype, False
  )
  got = traced(chosen, dtype, width)
  assert got == [(2, 64, 4, width), *[(2, 2, 64, width)] * 2]
  flash = Kernel("cudnn", _cudnn, _lengths)
  if capability in ("7.5", "gfx942") or (
    capability == "9.0" and width > 128 and width % 8 == 0
  ):
    assert chosen.name == "xla"
  elif chosen.name == "xla":
    # What was not chosen could not have been.
    with pytest.raises(NotImplementedError):
      traced(flash, dtype, width)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("Tesla T4", "xla"), ("NVIDIA L4", "cudnn"), ("NVIDIA A100-SXM4", "cudnn"),
    ("NVIDIA H100 80GB HBM3", "cudnn"), ("NVIDIA GTX", "xla"), ("", "xla"),
  ],
)  # fmt: skip
def test_a_gpu_that_says_no_capability_is_known_by_its_kind(kind, name):
  mesh = Elsewhere("cuda", device_kind=kind)
  chosen = choose_kernel(mesh, 64, shape(64), jnp.bfloat16, False)
  assert chosen.name == name


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_fused_kernel_is_not_chosen_beyond_the_window(platform):
  mesh, windowed = Elsewhere(platform, "9.0"), shape(64, sliding_window=256)
  names = [
    choose_kernel(mesh, length, windowed, jnp.bfloat16, False).name
    for length in (256, 384)
  ]
  assert names == ["splash" if platform == "tpu" else "cudnn", "xla"]


@pytest.mark.parametrize("tensor", [1, 2])
def test_splash_attention_is_attention(tensor, monkeypatch):
  kernel = choose_kernel(Elsewhere("tpu"), 256, shape(64), jnp.float32, True)
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  q, k, v = draw(2, 256, 4, 64), draw(2, 2, 256, 64), draw(2, 2, 256, 64)
  weights = draw(2, 256, 4, 64)
  # Packed: three texts in the one row, a text and padding in the other.
  places = np.arange(256)
  segments = np.stack([1 + (places > 40) + (places > 200), places < 150])
  segments = jnp.asarray(segments, jnp.int32)
  mesh = make_mesh(MeshConfig(tensor=tensor), devices=jax.devices()[:tensor])

  def loss(kernel):
    def run(q, k, v, segments):
      mixed = kernel.attend(q, k, v, kernel.mask(segments))
      real = (segments > 0)[..., None, None]
      return jnp.sum(mixed * weights * real), mixed * real

    return jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)

  fused = jax.shard_map(
    loss(kernel),
    mesh=mesh,
    in_specs=P(),
    out_specs=P(),
    axis_names=MANUAL_AXES,
    check_vma=False,
  )
  make = functools.partial(splash_attention.make_splash_mha, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha", make)
  got = jax.jit(fused)(q, k, v, segments)
  want = jax.jit(loss(XLA))(q, k, v, segments)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), got, want
  )


def test_a_row_of_padding_has_one_token_for_cudnn():
  segments = jnp.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
  lengths = _lengths(segments)
  assert lengths.tolist() == [3, 1, 4]
  assert lengths.dtype == jnp.int32
