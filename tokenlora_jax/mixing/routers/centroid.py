"""The paper's router: which expert's training texts is this text nearest to?

Belofsky, "Token-Level Adaptation of LoRA Adapters for Downstream Task
Generalization" (2023).

Axis letters: B batch, E experts, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import numbers
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.encoders.text import TextEncoder
from tokenlora_jax.mixing.routers.registry import register_router
from tokenlora_jax.mixing.routers.router import Router


def sharpened_softmax(
  similarities: jax.Array, sharpen: jax.Array | float
) -> jax.Array:
  """Softmax after the largest similarity is multiplied (Belofsky, 2023).

  gates = softmax(s'), s'_b = sharpen * s_b for b = argmax s, else s'_e = s_e

  Of equal similarities only the first is multiplied. A largest similarity below
  0 moves away from 0 like any other, so its gate becomes the smallest: that is
  the paper's rule, kept as it is. With E experts and similarities of at most 1,
  no gate exceeds e^sharpen / (e^sharpen + E - 1) unless the others are negative
  (0.948 for sharpen 4, E 4).

  Args:
    similarities: float32[..., E], cosines.
    sharpen: what the largest is multiplied by; 1 is a plain softmax.

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


def _unit(x: jax.Array) -> jax.Array:
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norm, 1e-12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CentroidRouter(Router):
  """gates = sharpened_softmax(cos(x, c_e)), x the running text's vector.

  Attributes:
    centroids: float32[E, D_enc].
    sharpen: float32[], what the largest cosine is multiplied by.
    encoder: gives x from the text; None: x is the base's mean hidden state.
  """

  centroids: jax.Array
  sharpen: jax.Array
  encoder: TextEncoder | None

  @property
  def needs(self) -> Literal["hidden", "text"]:
    return "hidden" if self.encoder is None else "text"

  @property
  def experts(self) -> int:
    return self.centroids.shape[0]

  def observe(self, texts):
    return () if self.encoder is None else self.encoder.prepare(texts)

  def gates(self, batch, observation, seen):
    del batch
    x = seen if self.encoder is None else self.encoder.module(*observation)
    if x.shape[-1] != self.centroids.shape[-1]:
      raise InputError(
        f"router.centroids: width {self.centroids.shape[-1]}, but the vectors "
        f"they are compared with have {x.shape[-1]}"
      )
    with jax.named_scope("centroid_router"):
      cosines = jnp.einsum(
        "bd,ed->be",
        _unit(x.astype(jnp.float32)),
        _unit(self.centroids),
        precision="highest",
      )
      return sharpened_softmax(cosines, self.sharpen)


@register_router("centroid")
def centroid(
  centroids: np.ndarray | jax.Array,
  encoder: TextEncoder | Literal["hidden"],
  sharpen: float = 4.0,
) -> CentroidRouter:
  """The paper's router (Belofsky, 2023).

  Args:
    centroids: float32[E, D_enc], from the same encoder; see `centroids`.
    encoder: what turns the running text into a vector, or `hidden` for the
      base's own mean last hidden state.
    sharpen: what the largest cosine is multiplied by; 4 in the paper.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> router = centroid(np.eye(2), encoder="hidden")
    >>> print(np.asarray(router.gates(1, (), jnp.array([[3.0, 0.0]]))).round(3))
    [[0.982 0.018]]
  """
  table = np.asarray(centroids, np.float32)
  if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
    raise InputError(
      f"router.centroids: an array of shape {list(table.shape)} is not allowed;"
      " want finite numbers [experts, width]"
    )
  if encoder != "hidden" and not isinstance(encoder, TextEncoder):
    raise InputError(
      f"router.encoder: {encoder!r} is not allowed; want 'hidden' or a "
      "TextEncoder"
    )
  text_encoder = None if encoder == "hidden" else encoder
  if text_encoder is not None and text_encoder.width != table.shape[1]:
    raise InputError(
      f"router.centroids: width {table.shape[1]}, but the encoder gives "
      f"{text_encoder.width}"
    )
  if not isinstance(sharpen, numbers.Real) or not 0 < sharpen < np.inf:
    raise InputError(
      f"router.sharpen: {sharpen!r} is not allowed; want more than 0"
    )
  return CentroidRouter(jnp.asarray(table), jnp.float32(sharpen), text_encoder)


class Embeds(Protocol):
  """What averaging needs of an encoder; a `TextEncoder` has it."""

  def embed(self, texts: Sequence[str]) -> np.ndarray: ...


def centroids(
  encoder: Embeds, texts_by_expert: Sequence[Sequence[str]]
) -> np.ndarray:
  """Averages each expert's training texts (Belofsky, 2023).

  c_e = mean over the expert's texts of embed(text), not made of length 1 again.

  Args:
    encoder: embeds N texts as float32[N, D_enc].
    texts_by_expert: the training texts, answers included, of E experts.

  Returns:
    float32[E, D_enc].

  Raises:
    InputError: an expert has no texts.
  """
  for index, texts in enumerate(texts_by_expert):
    if not texts:
      raise InputError(f"centroids: expert {index} has no texts to average")
  return np.stack(
    [encoder.embed(texts).mean(axis=0) for texts in texts_by_expert]
  )
