"""MiniLM, the sentence encoder of the paper's router, as a Flax NNX module.

A BERT encoder (Devlin et al., 2019) whose last hidden states are averaged and
normalised (Reimers and Gurevych, 2019). all-MiniLM-L6-v2 (Wang et al., 2020)
has the default shape of `MiniLMConfig`.

Axis letters: B batch, W word pieces (Q of queries, K of keys), D width, F MLP
width, N heads, H head width, P positions.
"""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from tokenlora_jax.model.llama import Linear, MakeParameter


@dataclasses.dataclass(frozen=True)
class MiniLMConfig:
  """The shape of one encoder.

  Attributes:
    vocab: size of the vocabulary of word pieces.
    width: D, model width and width of the embedding.
    mlp_width: F.
    layers: number of layers.
    heads: N, a divisor of D.
    max_length: P, the number of positions.
    types: rows of the token-type table; only the first is used.
    norm_eps: added to the variance in LayerNorm.
  """

  vocab: int = 30522
  width: int = 384
  mlp_width: int = 1536
  layers: int = 6
  heads: int = 12
  max_length: int = 512
  types: int = 2
  norm_eps: float = 1e-12


class LayerNorm(nnx.Module):
  """Layer normalisation (Ba et al., 2016).

  y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias
  """

  def __init__(self, name: str, make: MakeParameter, config: MiniLMConfig):
    self.scale = nnx.Param(make(f"{name}.scale", (config.width,)))
    self.bias = nnx.Param(make(f"{name}.bias", (config.width,)))
    self.eps = config.norm_eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(variance + self.eps)
    return normed * self.scale[...] + self.bias[...]


class Layer(nnx.Module):
  """A post-norm layer: self-attention and an MLP, each norm(x + f(x))."""

  def __init__(self, name: str, make: MakeParameter, config: MiniLMConfig):
    width, mlp_width = config.width, config.mlp_width

    def linear(part: str, *shape: int) -> Linear:
      return Linear(f"{name}.{part}", make, shape, has_bias=True)

    self.query = linear("query", width, width)
    self.key = linear("key", width, width)
    self.value = linear("value", width, width)
    self.output = linear("output", width, width)
    self.attention_norm = LayerNorm(f"{name}.attention_norm", make, config)
    self.up = linear("up", width, mlp_width)
    self.down = linear("down", mlp_width, width)
    self.mlp_norm = LayerNorm(f"{name}.mlp_norm", make, config)
    self.heads = config.heads

  def attend(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    heads = (*x.shape[:-1], self.heads, -1)
    q, k, v = (
      linear(x).reshape(heads) for linear in (self.query, self.key, self.value)
    )
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(q.shape[-1])
    # Finite, so that a row of padding alone does not become NaN.
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(mask[:, None, None, :], scores, lowest)
    mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)
    return self.output(mixed.reshape(x.shape))

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = self.attention_norm(x + self.attend(x, mask))
    mlp = self.down(jax.nn.gelu(self.up(x), approximate=False))
    return self.mlp_norm(x + mlp)


class MiniLM(nnx.Module):
  """Embeds word pieces as one vector of length 1 per text, in float32.

  Args:
    config: the shape.
    make: returns each parameter: random, loaded, or only its description.

  Example:
    >>> config = MiniLMConfig(vocab=9, width=4, mlp_width=8, layers=1, heads=2)
    >>> encoder = MiniLM(config, lambda name, shape: jnp.ones(shape))
    >>> pieces, mask = jnp.ones((1, 3), int), jnp.ones((1, 3), bool)
    >>> encoder(pieces, mask).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
  """

  def __init__(self, config: MiniLMConfig, make: MakeParameter):
    def table(name: str, rows: int) -> nnx.Param:
      return nnx.Param(make(f"{name}.table", (rows, config.width)))

    self.config = config
    self.pieces = table("pieces", config.vocab)
    self.positions = table("positions", config.max_length)
    self.types = table("types", config.types)
    self.norm = LayerNorm("norm", make, config)
    self.layers = nnx.List(
      [Layer(f"layers.{i}", make, config) for i in range(config.layers)]
    )

  def __call__(self, pieces: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeds a batch of texts.

    u = mean of the last hidden states over the mask; the result is u / |u|.

    Args:
      pieces: int32[B, W], W at most P.
      mask: bool[B, W], False at padding.

    Returns:
      float32[B, D].
    """
    # By default TPUs and GPUs round the inputs of float32 products.
    with (
      jax.named_scope("minilm"),
      jax.default_matmul_precision("highest"),
    ):
      x = self.pieces[pieces] + self.positions[: pieces.shape[1]]
      x = self.norm(x + self.types[0])
      for layer in self.layers:
        x = layer(x, mask)
      count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
      mean = jnp.sum(x * mask[..., None], axis=1) / count
      norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
      return mean / jnp.maximum(norm, 1e-12)
