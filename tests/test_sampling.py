"""The sampler against numpy, one number at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlora_jax.decoding import Sampler

LOGITS = [2.0, 1.5, 1.0, 1.0, 0.0, -1.0, -3.0]
DRAWS = 20_000


def shares_in_numpy(logits, temperature, top_k, top_p):
  """What each token's share of the draws should be."""
  z = np.array(logits, np.float64) / temperature
  order = sorted(range(len(z)), key=lambda i: -z[i])
  if top_k:
    # Tokens as likely as the last to stay are not told apart from it.
    order = [i for i in order if z[i] >= z[order[:top_k][-1]]]
  p = {i: np.exp(z[i]) / sum(np.exp(z[j]) for j in order) for i in order}
  kept, reached = [], 0.0
  for i in order:
    if reached >= top_p and z[i] < z[kept[-1]]:
      break
    kept.append(i)
    reached += p[i]
  shares = np.zeros(len(z))
  for i in kept:
    shares[i] = p[i] / sum(p[j] for j in kept)
  return shares


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p", "kept"),
  [
    (1.0, 0, 1.0, 7),
    (0.5, 0, 1.0, 7),
    (3.0, 0, 1.0, 7),
    (1.0, 2, 1.0, 2),
    (1.0, 3, 1.0, 4),  # two tokens tie for the third place
    (1.0, 7, 1.0, 7),
    (1.0, 99, 1.0, 7),
    (1.0, 0, 0.39, 1),  # the likeliest token alone has .395
    (1.0, 0, 0.40, 2),
    (2.0, 0, 0.5, 4),  # of a flatter softmax more are needed
    (1.0, 2, 0.6, 1),  # of two tokens the first has .62
    (1.0, 2, 0.7, 2),
  ],
)
def test_draws_have_the_shares_of_numpy(temperature, top_k, top_p, kept):
  shares = shares_in_numpy(LOGITS, temperature, top_k, top_p)
  assert (shares > 0).sum() == kept
  sampler = Sampler(temperature, top_k, top_p)
  logits = jnp.tile(jnp.array(LOGITS), (DRAWS, 1))
  drawn = np.asarray(jax.jit(sampler)(logits, jax.random.key(0)))
  assert drawn.dtype == np.int32
  counts = np.bincount(drawn, minlength=len(LOGITS))
  assert (counts[shares == 0] == 0).all()
  # Within five standard deviations.
  deviation = np.sqrt(shares * (1 - shares) / DRAWS)
  assert (np.abs(counts / DRAWS - shares) <= 5 * deviation + 1e-9).all()


def test_rows_are_restricted_each_for_itself():
  rows = jnp.array([[0.0, 5.0, 0.0], [5.0, 0.0, 5.1]])
  for seed in range(20):
    first, second = Sampler(1.0, 1, 1.0)(rows, jax.random.key(seed)).tolist()
    assert (first, second) == (1, 2)


def test_greedy_takes_the_largest_whatever_the_key():
  rows = jax.random.normal(jax.random.key(1), (5, 50))
  for seed in range(3):
    picked = Sampler(0.0, 3, 0.5)(rows, jax.random.key(seed))
    assert picked.tolist() == np.argmax(rows, -1).tolist()
    assert picked.dtype == jnp.int32


def test_a_key_decides():
  rows = jnp.zeros((64, 100))
  sampler = Sampler(1.0)
  once, again, other = (sampler(rows, jax.random.key(s)) for s in (0, 0, 1))
  assert once.tolist() == again.tolist() != other.tolist()
  assert len(set(once.tolist())) > 30  # rows do not share their draws
