"""The fused attention of accelerators, interpreted, against our own."""

import dataclasses
import functools

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tokenlora_jax.config import MeshConfig
from tokenlora_jax.model.fused_attention import XLA, choose_kernel
from tokenlora_jax.parallel.sharding import MANUAL_AXES, make_mesh


@dataclasses.dataclass
class Elsewhere:
  """A mesh on devices that are not here."""

  platform: str
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
def test_the_platform_and_the_shape_choose(platform, length, packed, name):
  assert choose_kernel(Elsewhere(platform), length, 64, packed).name == name


@pytest.mark.parametrize("tensor", [1, 2])
def test_splash_attention_is_attention(tensor, monkeypatch):
  kernel = choose_kernel(Elsewhere("tpu"), 256, 64, True)
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
