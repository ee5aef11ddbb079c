"""The paper's router: weighs experts by the similarity of their texts.

Belofsky, "Token-Level Adaptation of LoRA Adapters for Downstream Task
Generalization" (2023).

Axis letters: B batch, E experts, C centroids an expert, D_enc width of an
embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import numbers
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.routers.embedding import (
  EmbeddingRouter,
  Encoder,
  check_encoder,
  check_table,
)
from tokenlora_jax.mixing.routers.registry import register_router


def sharpened_softmax(
  similarities: Float[Array, "*B E"], sharpen: Float[Array, ""] | float
) -> Float[Array, "*B E"]:
  """Softmax after the largest similarity is multiplied (Belofsky, 2023).

  gates = softmax(s'), s'_b = sharpen * s_b for b = argmax s, else s'_e = s_e

  Of equal similarities only the first is multiplied. If the largest similarity
  is negative, multiplying makes it smaller, so its gate may fall behind others;
  that is the paper's rule, kept as it is. With E experts and similarities of at
  most 1, no gate exceeds e^sharpen / (e^sharpen + E - 1) unless the others are
  negative (0.948 for sharpen 4, E 4).

  Args:
    similarities: float32[..., E], cosines.
    sharpen: factor of the largest one; 1 is a plain softmax.

  Returns:
    float32[..., E], summing to 1.

  Example:
    >>> gates = sharpened_softmax(
    ...   jnp.array(
    ...     [
    ...       [0.60, 0.30, 0.20, 0.25],
    ...       [0.50, 0.49, 0.20, 0.20],
    ...       [-0.02, -0.10, -0.05, -0.08],
    ...     ]
    ...   ),
    ...   sharpen=4.0,
    ... )
    >>> print(np.asarray(gates).round(6))
    [[0.740881 0.090726 0.082092 0.086301]
     [0.644534 0.142384 0.106541 0.106541]
     [0.249336 0.244399 0.256929 0.249336]]
  """
  experts = jnp.arange(similarities.shape[-1])
  best = jnp.argmax(similarities, axis=-1, keepdims=True) == experts
  return jax.nn.softmax(
    jnp.where(best, similarities * sharpen, similarities), axis=-1
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CentroidRouter(EmbeddingRouter):
  """gates = sharpened_softmax(s), s_e = max over c of cos(x, c_ec).

  x is the running text's vector and c_ec the C centroids of expert e.

  Attributes:
    sharpen: float32[], factor of the largest s.
  """

  sharpen: Float[Array, ""]

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("centroid_router"):
      cosines = self.cosines(observation, seen)
      return sharpened_softmax(cosines, self.sharpen)


@register_router("centroid")
def centroid(
  centroids: ArrayLike, encoder: Encoder, sharpen: float = 4.0
) -> CentroidRouter:
  """Makes the paper's router (Belofsky, 2023).

  The paper has one centroid per expert. With several, the nearest counts.

  Args:
    centroids: float32[E, D_enc], from the same encoder (see `centroids`), or
      [E, C, D_enc] for several an expert (see `fit_centroids`).
    encoder: a text encoder for the running text, or `hidden` for the base's
      own mean last hidden state.
    sharpen: factor of the largest cosine; 4 in the paper.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> router = centroid(np.eye(2), encoder="hidden")
    >>> print(np.asarray(router.gates(1, (), jnp.array([[3.0, 0.0]]))).round(3))
    [[0.982 0.018]]
  """
  table = check_table("centroids", centroids, several=True)
  text_encoder = check_encoder(encoder, "centroids", table)
  if not isinstance(sharpen, numbers.Real) or not 0 < sharpen < np.inf:
    raise InputError(
      f"router.sharpen: {sharpen!r} is not allowed; want more than 0"
    )
  return CentroidRouter(jnp.asarray(table), text_encoder, jnp.float32(sharpen))


@runtime_checkable
class Embeds(Protocol):
  """A text encoder, such as `TextEncoder` and `HiddenEncoder`."""

  def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "N D_enc"]:
    """Embeds N texts: float32[N, D_enc]."""
    ...


def centroids(
  encoder: Embeds, texts_by_expert: Sequence[Sequence[str]]
) -> Float[np.ndarray, "E D_enc"]:
  """Averages each expert's training texts (Belofsky, 2023).

  c_e = mean over the expert's texts of embed(text), not normalised again.

  Args:
    encoder: embeds N texts as float32[N, D_enc].
    texts_by_expert: the training texts, answers included, of E experts.

  Returns:
    float32[E, D_enc].

  Raises:
    InputError: an expert has no texts.

  Example:
    >>> class Lengths:
    ...   def embed(self, texts):
    ...     return np.array([[len(text), 1] for text in texts], np.float32)
    >>> centroids(Lengths(), [["a", "abc"], ["ab"]]).tolist()
    [[2.0, 1.0], [2.0, 1.0]]
  """
  for index, texts in enumerate(texts_by_expert):
    if not texts:
      raise InputError(f"centroids: expert {index} has no texts to average")
  return np.stack(
    [encoder.embed(texts).mean(axis=0) for texts in texts_by_expert]
  )
