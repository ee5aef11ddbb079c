"""LoRA adapters of all experts as one pytree with a leading expert axis.

To a linear map y = x W an adapter adds scaling (x A^T) B (Hu et al., 2021,
"LoRA", eq. 3; B is stored transposed, so that A and B of all experts are each
one matrix of E*R rows). Smaller ranks are padded with zero rows, which add
nothing and get no gradient.

Axis letters: E experts, L layers, R rank, B batch, T length, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import numbers
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from tokenlora_jax.config import InputError, LoraConfig, nearest
from tokenlora_jax.model.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """The adapters of one linear map.

  Attributes:
    a: [E, R, in], the map down to the rank; float32, or a decoder's dtype.
    b: [E, R, out], the map up from it; dtype of `a`.
    scaling: float32[E], alpha / R of each expert.

  Stacked layers add an axis L: after E in training (`Adapters.stack`), before E
  inside a scan over layers.

  Example:
    >>> lora = Lora(jnp.ones((2, 4, 8)), jnp.ones((2, 4, 16)), jnp.ones(2))
    >>> lora.a.shape, lora.b.shape  # 2 experts of rank 4, from 8 to 16
    ((2, 4, 8), (2, 4, 16))
  """

  a: Float[Array, "E R I"] | Float[Array, "E L R I"]
  b: Float[Array, "E R O"] | Float[Array, "E L R O"]
  scaling: Float[Array, " E"] | Float[Array, "E L"]


# The adapted maps of one layer, by projection name.
LayerLoras = Mapping[str, Lora]


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Named experts and their low-rank maps, layer by layer.

  Attributes:
    names: the E experts' names; never traced, so that two banks of one shape
      share one compiled program.
    layers: per layer a mapping from projection name to `Lora`. A projection
      that no expert adapts is absent.

  Example:
    >>> lora = Lora(jnp.ones((2, 4, 8)), jnp.ones((2, 4, 8)), jnp.ones(2))
    >>> Adapters(("math", "code"), ({"q": lora},)).index("code")
    1
  """

  names: tuple[str, ...]
  layers: tuple[dict[str, Lora], ...]

  def index(self, expert: str | int) -> int:
    """Returns the index of an expert, given its name or its index.

    Args:
      expert: the name or index.

    Raises:
      InputError: there is no such expert.

    Example:
      >>> Adapters(("a", "b"), ()).index("b")
      1
    """
    if isinstance(expert, numbers.Integral):
      if not 0 <= expert < len(self.names):
        raise InputError(
          f"expert {expert}: the bank has experts 0 to {len(self.names) - 1}"
        )
      return expert
    if expert not in self.names:
      raise InputError(
        f"expert {expert!r} is not one of {', '.join(self.names)}"
        f"{nearest(expert, self.names)}"
      )
    return self.names.index(expert)

  def select(self, expert: str | int) -> Adapters:
    """Returns the adapters of one expert, with an expert axis of 1.

    Args:
      expert: the name or index.

    Raises:
      InputError: there is no such expert.

    Example:
      >>> Adapters(("a", "b"), ()).select(1).names
      ('b',)
    """
    i = self.index(expert)
    return Adapters(
      (self.names[i],), jax.tree.map(lambda x: x[i : i + 1], self.layers)
    )

  def astype(self, dtype: jax.typing.DTypeLike) -> Adapters:
    """Returns the adapters with A and B in another dtype; scaling unchanged.

    Args:
      dtype: the new dtype of A and B.

    Example:
      >>> lora = Lora(jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), jnp.ones(1))
      >>> half = Adapters(("a",), ({"q": lora},)).astype("bfloat16").layers[0]
      >>> half["q"].a.dtype, half["q"].scaling.dtype
      (dtype(bfloat16), dtype('float32'))
    """

    def cast(lora):
      a, b = lora.a.astype(dtype), lora.b.astype(dtype)
      return Lora(a, b, lora.scaling)

    layers = [
      {name: cast(lora) for name, lora in layer.items()}
      for layer in self.layers
    ]
    return Adapters(self.names, tuple(layers))

  def check(self, config: LlamaConfig) -> None:
    """Checks that the adapters fit a base of this shape.

    Args:
      config: the base's shape.

    Raises:
      InputError: there are too many layers, or a map has other widths.

    Example:
      >>> from tokenlora_jax.model.config import PRESETS
      >>> lora = Lora(jnp.ones((1, 2, 64)), jnp.ones((1, 2, 64)), jnp.ones(1))
      >>> Adapters(("a",), ({"q": lora},)).check(PRESETS["tiny"])
      >>> try:
      ...   Adapters(("a",), ({"q": lora},) * 3).check(PRESETS["tiny"])
      ... except InputError as error:
      ...   print(error)
      adapters a: made for at least 3 layers, but the base has 2
    """
    if len(self.layers) > config.layers:
      raise InputError(
        f"adapters {', '.join(self.names)}: made for at least"
        f" {len(self.layers)} layers, but the base has {config.layers}"
      )
    for i, layer in enumerate(self.layers):
      for name, lora in layer.items():
        made = (lora.a.shape[-1], lora.b.shape[-1])
        wanted = config.projection_shapes[name]
        if made != wanted:
          raise InputError(
            f"adapters {', '.join(self.names)}: layer {i} {name} is made for"
            f" [in, out] = {list(made)}, but the base has {list(wanted)};"
            " was it trained on another base?"
          )

  def stack(self, depth: int) -> dict[str, Lora]:
    """Returns {projection: Lora} with leaves [E, L, ...], the training layout.

    Layers without the map get zeros, and smaller ranks are padded with zeros.

    Args:
      depth: L, the base's number of layers.

    Example:
      >>> lora = Lora(jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), jnp.ones(1))
      >>> stacked = Adapters(("a",), ({"q": lora},)).stack(depth=3)
      >>> stacked["q"].a.shape
      (1, 3, 2, 8)
      >>> len(Adapters.unstack(("a",), stacked).layers)
      3
    """
    maps: dict[str, list[Lora]] = {}
    for layer in self.layers:
      for name, lora in layer.items():
        maps.setdefault(name, []).append(lora)

    def one(name):
      rank = max(lora.a.shape[1] for lora in maps[name])
      absent = jax.tree.map(jnp.zeros_like, maps[name][0])
      layers = [layer.get(name, absent) for layer in self.layers]
      layers += [absent] * (depth - len(layers))

      def join(parts):
        widths = [((0, 0), (0, rank - p.shape[1]), (0, 0)) for p in parts]
        padded = map(jnp.pad, parts, widths)
        return jnp.stack(list(padded), axis=1)

      return Lora(
        join([lora.a for lora in layers]),
        join([lora.b for lora in layers]),
        jnp.stack([lora.scaling for lora in layers], axis=1),
      )

    return {name: one(name) for name in maps}

  @classmethod
  def unstack(
    cls, names: Sequence[str], stacked: Mapping[str, Lora]
  ) -> Adapters:
    """Inverts `stack`: the decoding layout, a `Lora` per layer and map.

    Args:
      names: the E experts' names.
      stacked: {projection: Lora} with leaves [E, L, ...].
    """
    depth = next(iter(stacked.values())).a.shape[1]
    layers = tuple(
      {
        name: jax.tree.map(lambda x, i=i: x[:, i], lora)
        for name, lora in stacked.items()
      }
      for i in range(depth)
    )
    return cls(tuple(names), layers)


def expert_keys(key: Key[Array, ""], names: Sequence[str]) -> Key[Array, " E"]:
  """Returns one PRNG key per expert, derived from its name alone.

  So an expert's initial weights and dropout do not depend on the other experts
  of the run.

  Args:
    key: a PRNG key.
    names: the E experts' names.

  Example:
    >>> both = expert_keys(jax.random.key(0), ["a", "b"])
    >>> bool(both[1] == expert_keys(jax.random.key(0), ["b"])[0])
    True
  """
  marks = jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)
  return jax.vmap(lambda mark: jax.random.fold_in(key, mark))(marks)


def init_stacked(
  key: Key[Array, ""],
  config: LlamaConfig,
  lora: LoraConfig,
  names: Sequence[str],
) -> dict[str, Lora]:
  """Returns initial adapters for training: A uniform, B zero.

  A is drawn as PEFT draws it, Kaiming-uniform with a = sqrt(5), which is
  U(-1/sqrt(in), 1/sqrt(in)).

  Args:
    key: a PRNG key.
    config: the base's shape.
    lora: rank, scaling and targets.
    names: the E experts' names.

  Returns:
    {projection: Lora} of float32[E, L, R, in] and [E, L, R, out] and [E, L].

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> shape, config = PRESETS["tiny"], LoraConfig(rank=4, targets=("q",))
    >>> init_stacked(jax.random.key(0), shape, config, ["a", "b"])["q"].a.shape
    (2, 2, 4, 64)
  """

  def one_expert(key):
    loras = {}
    for i, name in enumerate(lora.targets):
      fan_in, fan_out = config.projection_shapes[name]
      bound = 1 / math.sqrt(fan_in)
      loras[name] = Lora(
        a=jax.random.uniform(
          jax.random.fold_in(key, i),
          (config.layers, lora.rank, fan_in),
          minval=-bound,
          maxval=bound,
        ),
        b=jnp.zeros((config.layers, lora.rank, fan_out)),
        scaling=jnp.full((config.layers,), lora.scaling),
      )
    return loras

  return jax.vmap(one_expert)(expert_keys(key, names))


def random_adapters(
  base, experts: int = 4, rank: int = 64, seed: int = 0
) -> Adapters:
  """Returns adapters on q and v with B not zero, for benchmarks and tests.

  Args:
    base: a `Llama`.
    experts: E.
    rank: R of each.
    seed: seeds the random numbers.

  Returns:
    Adapters named e0, e1, ... with scaling 16 / R, in the decoding layout.

  Example:
    >>> from tokenlora_jax import load_base
    >>> random_adapters(load_base("random:tiny"), experts=2).names
    ('e0', 'e1')
  """
  rng = np.random.default_rng(seed)
  config: LlamaConfig = base.config

  def normal(*shape):
    scale = 1 / math.sqrt(shape[-1])
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

  def one(fan_in, fan_out):
    return Lora(
      normal(experts, rank, fan_in),
      normal(experts, rank, fan_out),
      jnp.full((experts,), 16.0 / rank),
    )

  shapes = config.projection_shapes
  layers = tuple(
    {name: one(*shapes[name]) for name in ("q", "v")}
    for _ in range(config.layers)
  )
  return Adapters(tuple(f"e{i}" for i in range(experts)), layers)
