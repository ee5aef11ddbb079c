"""Shared parts of routers that compare a text's vector with those of experts.

Axis letters: B batch, E experts, C centroids an expert, D_enc width of an
embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokenlora_jax.config import InputError
from tokenlora_jax.encoders.text import TextEncoder
from tokenlora_jax.mixing.router import Router

# A text encoder, or "hidden" for the base's own mean hidden state.
Encoder = TextEncoder | str


def unit(x: Float[Array | np.ndarray, "*B D_enc"]) -> Float[Array, "*B D_enc"]:
  """Normalises vectors to length 1; vectors of length 0 stay.

  Args:
    x: [.., D_enc].

  Example:
    >>> unit(jnp.array([3.0, 4.0])).round(3).tolist()
    [0.6, 0.8]
  """
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norm, 1e-12)


@dataclasses.dataclass(frozen=True)
class EmbeddingRouter(Router):
  """A router that compares x, the running text's vector, with a table.

  Attributes:
    table: float32[E, D_enc] or [E, C, D_enc], the experts' vectors.
    encoder: embeds the text as x; if None, x is the base's mean hidden state.
  """

  table: Float[Array, "E D_enc"] | Float[Array, "E C D_enc"]
  encoder: TextEncoder | None

  @property
  def needs(self) -> Literal["hidden", "text"]:
    return "hidden" if self.encoder is None else "text"

  @property
  def experts(self) -> int:
    return self.table.shape[0]

  def observe(self, texts):
    return () if self.encoder is None else self.encoder.prepare(texts)

  def vector(self, observation, seen) -> Float[Array, "B D_enc"]:
    """Computes x, float32[B, D_enc], normalised to length 1, in the graph.

    Args:
      observation: the result of `observe`.
      seen: the base's mean hidden states, [B, D], if there is no encoder.

    Raises:
      InputError: x has another width than the table.
    """
    x = seen if self.encoder is None else self.encoder.module(*observation)
    width = self.table.shape[-1]
    if x.shape[-1] != width:
      raise InputError(
        f"router: made for vectors of width {width}, but those of this base"
        f" have {x.shape[-1]}"
      )
    return unit(x.astype(jnp.float32))

  def cosines(self, observation, seen) -> Float[Array, "B E"]:
    """Computes the largest cosine over each expert's vectors: float32[B, E].

    Args:
      observation: see `vector`.
      seen: see `vector`.
    """
    x = self.vector(observation, seen)
    table = self.table.reshape(self.experts, -1, x.shape[-1])
    cosines = jnp.einsum("bd,ecd->bec", x, unit(table), precision="highest")
    return cosines.max(axis=-1)


def check_table(
  name: str, table: object, several: bool = False
) -> Float[np.ndarray, "E D_enc"] | Float[np.ndarray, "E C D_enc"]:
  """Returns a router's table as float32, or raises `InputError`.

  Args:
    name: the setting's name, for errors.
    table: [E, D_enc].
    several: whether [E, C, D_enc] is allowed too.

  Raises:
    InputError: the table has another shape, or a number that is not finite.

  Example:
    >>> check_table("centroids", [[1, 0], [0, 1]]).dtype
    dtype('float32')
  """
  array = np.asarray(table, np.float32)
  dims = (2, 3) if several else (2,)
  if array.ndim not in dims or array.size == 0 or not np.isfinite(array).all():
    raise InputError(
      f"router.{name}: an array of shape {list(array.shape)} is not allowed;"
      " want finite numbers [experts, width]"
      + (" or [experts, clusters, width]" if several else "")
    )
  return array


def check_encoder(
  encoder: Encoder, name: str, table: Float[np.ndarray, "*N D_enc"]
) -> TextEncoder | None:
  """Returns an encoder for `EmbeddingRouter`: None stands for "hidden".

  Args:
    encoder: the given encoder.
    name: the table's setting, for errors.
    table: [.., D_enc].

  Raises:
    InputError: it is no encoder, or its vectors have another width.

  Example:
    >>> check_encoder("hidden", "centroids", np.eye(2)) is None
    True
  """
  if isinstance(encoder, str) and encoder == "hidden":
    return None
  if not isinstance(encoder, TextEncoder):
    raise InputError(
      f"router.encoder: {encoder!r} is not allowed; want 'hidden' or a "
      "TextEncoder"
    )
  if encoder.width != table.shape[-1]:
    raise InputError(
      f"router.{name}: width {table.shape[-1]}, but the encoder gives "
      f"{encoder.width}"
    )
  return encoder


def check_embeddings(
  what: str, embeddings_by_expert: Sequence[Float[np.ndarray, "_ D_enc"]]
) -> list[Float[np.ndarray, "_ D_enc"]]:
  """Returns the vectors of each expert's texts in float64, for a fit.

  Args:
    what: the fitted arrays, for errors.
    embeddings_by_expert: E arrays [N_e, D_enc].

  Returns:
    E arrays float64[N_e, D_enc].

  Raises:
    InputError: an expert has no texts.

  Example:
    >>> check_embeddings("centroids", [np.eye(2, dtype=np.float32)])[0].dtype
    dtype('float64')
  """
  for index, embeddings in enumerate(embeddings_by_expert):
    if len(embeddings) == 0:
      raise InputError(f"{what}: expert {index} has no texts")
  return [np.asarray(e, np.float64) for e in embeddings_by_expert]
