"""A linear classifier of the running text, with one class per expert.

Multinomial logistic regression (Cox, "Some procedures connected with the logistic
qualitative response curve", 1966) on the vectors of an encoder.

Axis letters: B batch, E experts, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.routers.embedding import (
  EmbeddingRouter,
  Encoder,
  check_embeddings,
  check_encoder,
  check_table,
)
from tokenlora_jax.mixing.routers.registry import register_router

# The least spread of a feature, in case all vectors share one value.
_LEAST = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierRouter(EmbeddingRouter):
  """gates = softmax(W x + b); `table` is W, x the running text's vector.

  Attributes:
    bias: float32[E], b.
  """

  bias: Float[Array, " E"]

  def gates(self, batch, observation, seen):
    del batch
    with jax.named_scope("classifier_router"):
      x = self.vector(observation, seen)
      logits = jnp.einsum("bd,ed->be", x, self.table, precision="highest")
      return jax.nn.softmax(logits + self.bias, axis=-1)


@register_router("classifier")
def classifier(
  weights: ArrayLike,
  bias: ArrayLike,
  encoder: Encoder,
) -> ClassifierRouter:
  """Makes a linear classifier of the running text: softmax(W x + b).

  A gate is the probability that the text belongs to an expert's task. Gates are
  nearly one-hot for a clear text, and a mixture for an ambiguous one.

  Args:
    weights: W, float32[E, D_enc]; see `fit_classifier`.
    bias: b, float32[E].
    encoder: a text encoder for the running text, or `hidden` for the base's
      own mean last hidden state.

  Raises:
    InputError: a setting is not allowed, or widths differ.

  Example:
    >>> router = classifier(2 * np.eye(2), [0.0, 0.0], encoder="hidden")
    >>> print(np.asarray(router.gates(1, (), jnp.array([[5.0, 0.0]]))).round(3))
    [[0.881 0.119]]
  """
  table, added = check_table("weights", weights), np.asarray(bias, np.float32)
  if added.shape != table.shape[:1] or not np.isfinite(added).all():
    raise InputError(
      f"router.bias: an array of shape {list(added.shape)} is not allowed; want"
      f" finite numbers [experts], here [{len(table)}]"
    )
  return ClassifierRouter(
    jnp.asarray(table),
    check_encoder(encoder, "weights", table),
    jnp.asarray(added),
  )


def fit_classifier(
  embeddings_by_expert: Sequence[Float[np.ndarray, "_ D_enc"]],
) -> dict[str, Float[np.ndarray, "..."]]:
  """Fits W and b of `classifier` by multinomial logistic regression.

  W, b = argmin  sum_i -log softmax(W z_i + b)_e(i) + |W|^2 / 2

  z_i is vector i, each feature shifted and scaled to mean 0 and variance 1;
  e(i) is its expert. The penalty is a standard normal prior on the weights. The
  returned W and b apply to vectors that are not shifted and scaled.

  Args:
    embeddings_by_expert: E arrays float32[N_e, D_enc], of texts of each
      expert's task.

  Returns:
    {"weights": float32[E, D_enc], "bias": float32[E]}.

  Raises:
    InputError: an expert has no texts.

  Example:
    >>> print(fit_classifier([np.eye(2)[:1], np.eye(2)[1:]])["weights"].round(2))
    [[ 0.74 -0.74]
     [-0.74  0.74]]
  """
  # Imported here: they load slowly, and only fitting needs them.
  import scipy.optimize
  import scipy.special

  vectors = check_embeddings("classifier", embeddings_by_expert)
  sizes = [len(own) for own in vectors]
  owners = np.eye(len(sizes)).repeat(sizes, axis=0)
  x = np.concatenate(vectors)
  mean, spread = x.mean(axis=0), np.maximum(x.std(axis=0), _LEAST)
  # The last weight belongs to a feature that is always 1: the bias.
  z = np.column_stack([(x - mean) / spread, np.ones(len(x))])
  shape = len(sizes), z.shape[1]
  penalty = np.ones(z.shape[1])
  penalty[-1] = 0

  def objective(flat):
    weights = flat.reshape(shape)
    logits = z @ weights.T
    log_gates = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
    loss = -(owners * log_gates).sum() + 0.5 * (penalty * weights**2).sum()
    gradient = (np.exp(log_gates) - owners).T @ z + penalty * weights
    return loss, gradient.ravel()

  found = scipy.optimize.minimize(
    objective, np.zeros(math.prod(shape)), jac=True, method="L-BFGS-B",
    options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-6},
  )  # fmt: skip
  fitted = found.x.reshape(shape)
  weights = fitted[:, :-1] / spread
  bias = fitted[:, -1] - weights @ mean
  return {
    "weights": weights.astype(np.float32),
    "bias": bias.astype(np.float32),
  }
