"""Shapes of Llama models, and named presets."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tokenlora_jax.config import check


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies for texts beyond the trained length.

  Attributes:
    kind: `none`, `linear` (all frequencies divided by `factor`) or `llama3`
      (only low frequencies, with a ramp between the two wavelengths).
    factor: the divisor.
    low_frequency_factor: `llama3`: wavelengths above original_length / this are
      scaled by the whole factor.
    high_frequency_factor: `llama3`: wavelengths below original_length / this
      stay unscaled.
    original_length: `llama3`: the length trained on, tokens.
  """

  kind: Literal["none", "linear", "llama3"] = "none"
  factor: float = 1.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The shape of one Llama.

  Attributes:
    vocab: V, size of the vocabulary.
    width: D, model width.
    mlp_width: F, width of the gated MLP.
    layers: L, number of layers.
    heads: N, query heads.
    kv_heads: K, key and value heads; divides N.
    head_width: H, width of a head; need not be D / N.
    norm_eps: added to the mean square in RMSNorm.
    rope_theta: base of the rotary frequencies.
    rope_scaling: scaling of those frequencies.
    tied: whether the output projection is the embedding.
    qkv_bias: bias on q, k and v (Llama `attention_bias`, Qwen2).
    o_bias: bias on o.
    mlp_bias: bias on gate, up and down.
    max_length: the longest sequence trained on, tokens.
    sliding_window: the most tokens that a token attends to, itself included
      (Mistral); None is all before it.

  Example:
    >>> PRESETS["tiny"].layers, PRESETS["tiny"].projection_shapes["k"]
    (2, (64, 32))
  """

  vocab: int
  width: int
  mlp_width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  tied: bool = False
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  max_length: int = 4096
  sliding_window: int | None = None

  def __post_init__(self):
    for field in ("vocab", "width", "mlp_width", "layers", "heads", "kv_heads"):
      value = getattr(self, field)
      check(value >= 1, f"base config {field}", value, "at least 1")
    check(
      self.heads % self.kv_heads == 0,
      "base config kv_heads",
      self.kv_heads,
      f"a divisor of the {self.heads} query heads",
    )
    check(
      self.head_width >= 2 and self.head_width % 2 == 0,
      "base config head_width",
      self.head_width,
      "an even number of at least 2",
    )
    check(
      self.sliding_window is None or self.sliding_window >= 1,
      "base config sliding_window",
      self.sliding_window,
      "at least 1, or none",
    )

  @property
  def projection_shapes(self) -> dict[str, tuple[int, int]]:
    """The [in, out] shape of each of the seven linear maps of a layer."""
    queries = self.heads * self.head_width
    keys = self.kv_heads * self.head_width
    return {
      "q": (self.width, queries),
      "k": (self.width, keys),
      "v": (self.width, keys),
      "o": (queries, self.width),
      "gate": (self.width, self.mlp_width),
      "up": (self.width, self.mlp_width),
      "down": (self.mlp_width, self.width),
    }

  @property
  def matmul_parameters(self) -> int:
    """Parameters in matrix products: the layers and the output projection."""
    layer = sum(i * o for i, o in self.projection_shapes.values())
    return self.layers * layer + self.vocab * self.width


# The shapes of `random:NAME`, which builds seeded random weights.
PRESETS = {
  "tiny": LlamaConfig(
    vocab=260, width=64, mlp_width=128, layers=2, heads=4, kv_heads=2,
    head_width=16, tied=True, max_length=1024,
  ),
  "smollm2-135m": LlamaConfig(
    vocab=49152, width=576, mlp_width=1536, layers=30, heads=9, kv_heads=3,
    head_width=64, rope_theta=100_000.0, tied=True, max_length=8192,
  ),
  "tinyllama-1.1b": LlamaConfig(
    vocab=32000, width=2048, mlp_width=5632, layers=22, heads=32, kv_heads=4,
    head_width=64, max_length=2048,
  ),
  "llama2-7b": LlamaConfig(
    vocab=32000, width=4096, mlp_width=11008, layers=32, heads=32, kv_heads=32,
    head_width=128,
  ),
  "llama2-13b": LlamaConfig(
    vocab=32000, width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40,
    head_width=128,
  ),
  "llama2-70b": LlamaConfig(
    vocab=32000, width=8192, mlp_width=28672, layers=80, heads=64, kv_heads=8,
    head_width=128,
  ),
}  # fmt: skip

# The same shapes by hub id, so that planning needs no download.
HUB_PRESETS = {
  "meta-llama/Llama-2-7b-hf": "llama2-7b",
  "meta-llama/Llama-2-13b-hf": "llama2-13b",
  "meta-llama/Llama-2-70b-hf": "llama2-70b",
  "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b",
  "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
}
