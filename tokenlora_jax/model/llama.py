"""The Llama family (Touvron et al., 2023) as a Flax NNX module.

NNX is only the container: a `Llama` is a pytree of parameters for plain jax
transforms, and a forward pass mutates nothing. Adapters are an argument of the
forward pass, not a part of the module.

Layers have one of two layouts. `stacked`, for training: each parameter has a
leading layer axis and the layers run in one `lax.scan`, which compiles fast. A
list, for decoding: each layer has its own arrays, which is faster, since a scan
copies the slices that it takes.

Axis letters: B batch, T query length, S key/value length, D width, F MLP width,
N query heads, K kv heads, G = N/K, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from tokenlora_jax.config import PROJECTIONS
from tokenlora_jax.model.attention import (
  ATTENTION,
  attention,
  joint_attention,
  windowed_mask,
)
from tokenlora_jax.model.cache import KV, Cache
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.lora import Lora
from tokenlora_jax.model.quantize import dot
from tokenlora_jax.model.rope import rope_frequencies, rotate

# (name, shape) -> the parameter: random, loaded, or only its description.
# Stacked layers are named "layers.*. ..." and have a leading L. A kernel may
# be quantised (`model/quantize.py`).
MakeParameter = Callable[[str, tuple[int, ...]], Float[Array, "..."]]

# (lora, x [B, T, in], keys [B]) -> [B, T, out], which is added to the linear
# map's output.
Adapt = Callable[[Lora, jax.Array, jax.Array | None], jax.Array]


@runtime_checkable
class Remix(Protocol):
  """Adapters on values, applied after attention instead of before it."""

  def down(
    self, lora: Lora, x: Float[Array, "B T I"]
  ) -> Float[Array, "B T E R"]:
    """Returns the rank activations, [B, T, E, R], of x [B, T, in]."""

  def up(
    self, lora: Lora, low: Float[Array, "B T N ER"], kv_heads: int
  ) -> Float[Array, "B T N H"]:
    """Returns [B, T, N, H] to add, from attention's sums [B, T, N, E*R]."""


# (q [B, T, N, H], k and v [B, K, T, H], mask) -> [B, T, N, H]; the mask is in
# the form that the implementation takes.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]

# (weights, loras) of a layer as sharded -> the same as whole arrays.
Gather = Callable[[Any], Any]


def _save_all_but_weights(primitive, *_, **__):
  return primitive.name != "all_gather"


# The arrays that a layer saves for the backward pass, never gathered weights.
# `elementwise` saves the outputs of projections and attention, and recomputes
# norms and activations from them.
REMAT_POLICIES = {
  "none": _save_all_but_weights,
  "elementwise": jax.checkpoint_policies.save_only_these_names(
    ATTENTION, *PROJECTIONS
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Linear(nnx.Module):
  """A linear map y = x W + b; W is [in, out], full or quantised."""

  def __init__(self, name, make: MakeParameter, shape, has_bias: bool):
    self.kernel = nnx.Param(make(f"{name}.kernel", shape))
    # A bias has the kernel's shape without the input axis (the last but one).
    bias_shape = (*shape[:-2], shape[-1])
    self.bias = (
      nnx.Param(make(f"{name}.bias", bias_shape)) if has_bias else None
    )

  def __call__(self, x):
    y = dot(x, self.kernel.get_value())
    return y if self.bias is None else y + self.bias[...]


class QKV(Linear):
  """Queries, keys and values of one input, as one product.

  The kernel is [D, K * (G + 2) * H]: for each kv head its G query heads, its
  key and its value. So a device that holds a shard of whole kv heads has all
  that their attention needs.
  """

  def __init__(self, name, config: LlamaConfig, make: MakeParameter, stack):
    self.config = config
    size = (config.heads + 2 * config.kv_heads) * config.head_width
    shape = *stack, config.width, size
    super().__init__(f"{name}.qkv", make, shape, config.qkv_bias)

  def __call__(self, x):
    """Returns q [B, T, N*H], k [B, T, K*H] and v [B, T, K*H]."""
    config = self.config
    heads = config.kv_heads, -1, config.head_width
    y = super().__call__(x)
    if x.shape[1] == 1:
      # Otherwise XLA for TPUs transposes the kernel to get the layout that the
      # heads of a few rows need.
      y = jax.lax.optimization_barrier(y)
    y = y.reshape(*x.shape[:2], *heads)
    parts = y[..., :-2, :], y[..., -2, :], y[..., -1, :]
    return [part.reshape(*x.shape[:2], -1) for part in parts]


def join_heads(config: LlamaConfig, parts: Sequence[jax.Array]) -> jax.Array:
  """Joins the kernels or biases of q, k and v into the layout of `QKV`.

  Args:
    config: the shape of the Llama.
    parts: the kernels [..., D, N*H], [..., D, K*H] and [..., D, K*H], or the
      biases without D.

  Returns:
    [..., K * (G + 2) * H].

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> q, k = jnp.ones((64, 64)), jnp.ones((64, 32))
    >>> join_heads(PRESETS["tiny"], [q, k, k]).shape
    (64, 128)
  """
  heads = config.kv_heads, -1, config.head_width
  by_head = [part.reshape(*part.shape[:-1], *heads) for part in parts]
  joined = jnp.concatenate(by_head, axis=-2)
  return joined.reshape(*joined.shape[:-3], -1)


def rms_norm(
  x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
  """Root-mean-square norm (Zhang and Sennrich, 2019, eq. 4), in float32.

  y = x / sqrt(mean(x^2) + eps) * scale

  Args:
    x: [..., D], any float type.
    scale: [D].
    eps: added to the mean square.

  Returns:
    [..., D] in x's dtype.

  Example:
    >>> rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), 0.0).round(4).tolist()
    [0.8485, 1.1314]
  """
  wide = x.astype(jnp.float32)
  mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean_square + eps)
  return (normed.astype(x.dtype) * scale).astype(x.dtype)


def _fold(keys, number):
  """Folds a number into each PRNG key of a batch."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class Layer(nnx.Module):
  """A transformer layer: attention and a gated MLP, each after a norm."""

  def __init__(self, name: str, config: LlamaConfig, make, stack=()):
    self.config = config
    self.attention_norm = nnx.Param(
      make(f"{name}.attention_norm", (*stack, config.width))
    )
    self.mlp_norm = nnx.Param(make(f"{name}.mlp_norm", (*stack, config.width)))
    self.qkv = QKV(name, config, make, stack)

    def linear(p, has_bias):
      shape = *stack, *config.projection_shapes[p]
      return Linear(f"{name}.{p}", make, shape, has_bias)

    self.o = linear("o", config.o_bias)
    self.gate = linear("gate", config.mlp_bias)
    self.up = linear("up", config.mlp_bias)
    self.down = linear("down", config.mlp_bias)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rotation: tuple[Float[Array, "#B T 1 half"], Float[Array, "#B T 1 half"]],
    mask: jax.Array,
    cached: KV | None = None,
    loras: Mapping[str, Any] | None = None,
    keys: Key[Array, " B"] | None = None,
    adapt: Adapt | None = None,
    attend: Attend = attention,
    remix: Remix | None = None,
  ) -> tuple[Float[Array, "B T D"], KV]:
    """Returns (x [B, T, D], the tokens' keys and values)."""
    config = self.config
    heads = (*x.shape[:2], -1, config.head_width)
    late = remix is not None and loras and "v" in loras

    def adapted(name, h, y):
      if loras and name in loras and not (late and name == "v"):
        own = None if keys is None else _fold(keys, PROJECTIONS.index(name))
        y = y + adapt(loras[name], h, own)
      return checkpoint_name(y, name)

    with jax.named_scope("attention"):
      h = rms_norm(x, self.attention_norm[...], config.norm_eps)
      q, k, v = (
        adapted(name, h, y).reshape(heads)
        for name, y in zip("qkv", self.qkv(h), strict=True)
      )
      q, k = rotate(q, *rotation), rotate(k, *rotation)
      z = None
      if late:
        low = remix.down(loras["v"], h).astype(x.dtype)
        z = low.reshape(*x.shape[:2], 1, -1).swapaxes(1, 2)
      kv = KV(k.swapaxes(1, 2), v.swapaxes(1, 2), z)
      if cached is None and z is None:
        mixed = attend(q, kv.k, kv.v, mask)
      else:
        slots = mask.shape[-1] - x.shape[1]
        parts = [(kv.k, kv.values, mask[..., slots:])]
        if cached is not None:
          parts.insert(0, (cached.k, cached.values, mask[..., :slots]))
        mixed, *more = joint_attention(q, parts)
        if late:
          mixed = mixed + remix.up(loras["v"], *more, config.kv_heads)
      mixed = mixed.reshape(*x.shape[:2], -1)
      x = x + adapted("o", mixed, self.o(mixed))
    with jax.named_scope("mlp"):
      h = rms_norm(x, self.mlp_norm[...], config.norm_eps)
      gate = adapted("gate", h, self.gate(h))
      hidden = jax.nn.silu(gate) * adapted("up", h, self.up(h))
      x = x + adapted("down", hidden, self.down(hidden))
    return x, kv


class Llama(nnx.Module):
  """A decoder-only transformer; a factory supplies its parameters.

  Args:
    config: the shape.
    make: returns each parameter, from its name and shape.
    stacked: whether layers are stacked (training) or a list (decoding).
    fingerprint: a hash of the weights, by which a bank knows the base that it
      was trained on.
    fingerprint_1: the fingerprint in banks of earlier versions; "" if it is
      the same.

  Example:
    >>> from tokenlora_jax.model.config import PRESETS
    >>> base = Llama(PRESETS["tiny"], lambda name, shape: jnp.ones(shape))
    >>> base.layers[0].qkv.kernel.shape
    (64, 128)
  """

  def __init__(
    self,
    config: LlamaConfig,
    make: MakeParameter,
    stacked: bool = False,
    fingerprint: str = "",
    fingerprint_1: str = "",
  ):
    self.config = config
    self.stacked = stacked
    self.fingerprint = fingerprint
    self.fingerprint_1 = fingerprint_1
    self.embedding = nnx.Param(make("embedding", (config.vocab, config.width)))
    if stacked:
      self.layers = Layer("layers.*", config, make, (config.layers,))
    else:
      self.layers = nnx.List(
        [Layer(f"layers.{i}", config, make) for i in range(config.layers)]
      )
    self.norm = nnx.Param(make("norm", (config.width,)))
    self.head = (
      None
      if config.tied
      else nnx.Param(make("head", (config.width, config.vocab)))
    )

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of the weights and of the products with them."""
    return self.embedding[...].dtype

  def __call__(
    self,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"],
    mask: jax.Array,
    cache: Cache | None = None,
    loras: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    adapt: Adapt | None = None,
    keys: Key[Array, " B"] | None = None,
    remat: str = "none",
    attend: Attend = attention,
    gather: Gather | None = None,
    remix: Remix | None = None,
  ) -> tuple[Float[Array, "B T D"], Cache | tuple[KV, ...] | None]:
    """Runs the layers and the final norm.

    Args:
      tokens: int32[B, T].
      positions: int32[B, T], for the rotary embedding.
      mask: the attention mask: bool[B, T, T], or what `attend` takes in its
        place; with a cache bool[B, T, S + T], over slots and tokens. The base's
        sliding window narrows it further.
      cache: the KV cache of the tokens before, if any (list layout only).
      loras: adapters, one mapping per layer; for stacked layers one mapping
        whose leaves have a leading L.
      adapt: computes what the adapters add to a linear map (a mixing rule).
      keys: [B], PRNG keys of the adapters' dropout, one per row.
      remat: a name of `REMAT_POLICIES`: what the backward pass recomputes.
      attend: the attention implementation without a cache.
      gather: called on each layer and its adapters just before they are used,
        forward and backward, so that a sharded layer is whole only while it
        runs.
      remix: keeps the adapters' part of the values apart, in the cache too, and
        applies it after attention.

    Returns:
      (hidden [B, T, D] after the final norm; the cache with the tokens added.
      Without a cache one `KV` per layer in its place; None for stacked layers).
    """
    config = self.config
    frequencies = rope_frequencies(
      config.head_width, config.rope_theta, config.rope_scaling
    )
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    rotation = jnp.cos(angles), jnp.sin(angles)
    x = self.embedding[...][tokens]
    if mask.ndim == 3:
      first = 0 if cache is None else cache.slot
      mask = windowed_mask(mask, config.sliding_window, first)
    # Fused kernels take no such mask, and are not chosen beyond the window.

    def run(layer, i, loras, x, rotation, mask, keys, **cached):
      if gather is not None:
        layer, loras = gather((layer, loras))
      if keys is not None:
        keys = _fold(keys, i)
      more = dict(loras=loras, keys=keys, adapt=adapt, attend=attend)
      return layer(x, rotation, mask, remix=remix, **more, **cached)

    if remat != "none" or gather is not None:
      run = jax.checkpoint(run, policy=REMAT_POLICIES[remat])
    if self.stacked:
      if cache is not None:
        raise ValueError("decoding wants the list layout: load_base(path)")

      def body(x, per_layer):
        return run(*per_layer, x, rotation, mask, keys)[0], None

      layers = self.layers, jnp.arange(config.layers), loras
      x, _ = jax.lax.scan(body, x, layers)
      kvs = None
    else:
      kvs = []
      for i, layer in enumerate(self.layers):
        own = loras[i] if loras and i < len(loras) else None
        cached = {} if cache is None else {"cached": cache.layers[i]}
        x, kv = run(layer, i, own, x, rotation, mask, keys, **cached)
        kvs.append(kv)
      kvs = tuple(kvs)
    hidden = rms_norm(x, self.norm[...], config.norm_eps)
    return hidden, kvs if cache is None else cache.append(kvs, after=hidden)

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns logits float32[..., V] of hidden states [..., D].

    Args:
      hidden: [..., D], from a forward pass.
    """
    with jax.named_scope("head"):
      if self.head is None:
        return jnp.einsum(
          "...d,vd->...v",
          hidden,
          self.embedding[...],
          preferred_element_type=jnp.float32,
        )
      return jnp.einsum(
        "...d,dv->...v",
        hidden,
        self.head[...],
        preferred_element_type=jnp.float32,
      )
