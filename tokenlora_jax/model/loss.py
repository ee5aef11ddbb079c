"""Next-token losses through the frozen output projection, in chunks.

Axis letters: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

# Positions per chunk: logits are float32[B, CHUNK, V], never [B, T, V].
CHUNK = 64


@jax.custom_vjp
def token_losses(
  base, hidden: Float[Array, "B T D"], targets: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T"]:
  """Cross-entropy of each target token, in nats.

  loss_t = logsumexp(z_t) - z_t[target_t], z_t = hidden_t W, in float32.

  The output projection W is frozen, so the forward pass can already compute the
  gradient with respect to the hidden state, (softmax(z_t) - onehot(target_t))
  W^T. It saves that [B, T, D]; the backward pass needs no logits and no matrix
  product.

  Args:
    base: a `Llama`; no gradient flows into it.
    hidden: [B, T, D], after the final norm.
    targets: int32[B, T].

  Returns:
    float32[B, T].

  Example:
    >>> from tokenlora_jax import load_base
    >>> base = load_base("random:tiny")
    >>> token_losses(
    ...   base, jnp.zeros((1, 2, 64)), jnp.array([[1, 2]])
    ... ).round(3).tolist()
    [[5.561, 5.561]]
  """
  return _in_chunks(_chunk_losses, base, hidden, targets)


def _chunk_losses(base, hidden, targets):
  logits = base.logits(hidden)
  at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - at_target


def _chunk_losses_and_gradients(base, hidden, targets):
  def total(hidden):
    losses = _chunk_losses(base, hidden, targets)
    return losses.sum(), losses

  gradients, losses = jax.grad(total, has_aux=True)(hidden)
  return losses, gradients


def _in_chunks(function, base, hidden, targets):
  batch, length, width = hidden.shape
  chunk = min(CHUNK, length)
  short = -length % chunk
  hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, short)))
  xs = (
    hidden.reshape(batch, -1, chunk, width).swapaxes(0, 1),
    targets.reshape(batch, -1, chunk).swapaxes(0, 1),
  )
  _, out = jax.lax.scan(lambda _, x: (None, function(base, *x)), None, xs)

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(batch, -1, *x.shape[3:])[:, :length]

  return jax.tree.map(join, out)


def _forward(base, hidden, targets):
  with jax.named_scope("loss"):
    return _in_chunks(_chunk_losses_and_gradients, base, hidden, targets)


def _backward(gradients, cotangent):
  scaled = gradients.astype(jnp.float32) * cotangent[..., None]
  return None, scaled.astype(gradients.dtype), None


token_losses.defvjp(_forward, _backward)
