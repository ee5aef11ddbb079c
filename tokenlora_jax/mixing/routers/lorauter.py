"""LoRAuter: weighs experts by the prompt's similarity to their tasks.

Dhasade et al., "Effective LoRA Adapter Routing using Task Representations"
(2026, arXiv 2601.21795).

Axis letters: B batch, E experts, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.mixing.routers.clusters import fit_centroids
from tokenlora_jax.mixing.routers.embedding import (
  EmbeddingRouter,
  Encoder,
  check_encoder,
  check_table,
)
from tokenlora_jax.mixing.routers.registry import register_router

# Replaces similarities of 0 and less: nearly 0, but if all are such, the gates
# are equal.
_LEAST = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LorauterRouter(EmbeddingRouter):
  """gates_e = s_e / sum of s, s_e = max(cos(x, t_e), 1e-6).

  x is the prompt's vector and t_e the vector of the expert's task.
  """

  at_prompt_only = True

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("lorauter_router"):
      s = jnp.maximum(self.cosines(observation, seen), _LEAST)
      return s / s.sum(axis=-1, keepdims=True)


@register_router("lorauter", top_k=3)
def lorauter(tasks: ArrayLike, encoder: Encoder) -> LorauterRouter:
  """Makes LoRAuter's router (Dhasade et al., 2026): the 3 nearest tasks.

  The paper finds the tasks nearest to the query, then the best adapter for each
  task. Here an expert's task is the one it was trained on. We know the paper
  from its abstract and summaries. The cosine is ours, and so is the bound below
  which a similarity counts as nearly 0.

  Args:
    tasks: float32[E, D_enc]; see `fit_lorauter`.
    encoder: a text encoder for the prompt, or `hidden` for the base's own
      mean last hidden state.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> router = lorauter(np.eye(2), encoder="hidden")
    >>> print(np.asarray(router.gates(1, (), jnp.array([[3.0, 1.0]]))).round(3))
    [[0.75 0.25]]
  """
  table = check_table("tasks", tasks)
  return LorauterRouter(
    jnp.asarray(table), check_encoder(encoder, "tasks", table)
  )


def fit_lorauter(
  embeddings_by_expert: Sequence[Float[np.ndarray, "_ D_enc"]],
) -> dict[str, Float[np.ndarray, "E D_enc"]]:
  """Fits the task vectors of `lorauter`: the mean over each task's texts.

  Args:
    embeddings_by_expert: E arrays float32[N_e, D_enc], of some texts of each
      expert's task that it was not trained on.

  Returns:
    {"tasks": float32[E, D_enc]}.

  Raises:
    InputError: an expert has no texts.

  Example:
    >>> fit_lorauter([np.eye(2), np.ones((1, 2))])["tasks"].tolist()
    [[0.5, 0.5], [1.0, 1.0]]
  """
  return {"tasks": fit_centroids(embeddings_by_expert)[:, 0]}
