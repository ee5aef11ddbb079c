"""Every room's annotations, shapes included, are checked while tests run."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from tokenlora_jax.bank.arrays import write_centroids
from tokenlora_jax.data.batches import pack
from tokenlora_jax.decoding import Decoder, graph
from tokenlora_jax.decoding.finite import check_finite
from tokenlora_jax.decoding.sampling import Sampler
from tokenlora_jax.evaluation.scoring.scorer import check_log_likelihoods
from tokenlora_jax.evaluation.statistics import ratios
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.mixing.routers import linear
from tokenlora_jax.mixing.rules import mix_probabilities
from tokenlora_jax.mixing.shaping import keep_top
from tokenlora_jax.training.routers.switch import balance_loss
from tokenlora_jax.training.step import target_mask


def ones(*shape, dtype=np.float32):
  return np.ones(shape, dtype)


@pytest.mark.parametrize(
  ("function", "arguments"),
  [
    # Gates of another expert more.
    (mix_probabilities, (ones(1, 2, 5), ones(1, 3, 1))),
    # Gates that are whole numbers.
    (keep_top, (ones(2, 3, dtype=int), 1)),
    # A vector for another width.
    (linear, (ones(1, 4, 8), jnp.ones((2, 9)))),
    # Logits of one text alone.
    (Sampler(), (jnp.ones(5), jax.random.key(0))),
    # Gates without an axis of tokens.
    (check_finite, (ones(2, 3), ones(2, 4), [3, 3])),
    # Lengths without their rows.
    (pack, ([6, 7], [0, 1], 10)),
    # A table that is no array.
    (write_centroids, ("", {"hidden": [[1.0]]}, ["a"])),
    # Tokens of another batch.
    (balance_loss, (ones(1, 2, 3), ones(1, 2, 3), ones(2, 2, dtype=bool))),
    # One number, without an axis of tokens.
    (target_mask, ({"segment_ids": ones(), "loss_mask": ones()},)),
    # Weights of fewer questions.
    (ratios, (ones(3, 2), ones(2, 2), [0])),
    (check_log_likelihoods, (ones(2, 2), 4)),
  ],
)
def test_a_wrong_shape_is_refused(function, arguments):
  with pytest.raises(TypeCheckError):
    function(*arguments)


def test_the_decode_state_has_the_shapes_it_says():
  """As it is built at the start, and as a step of the loop gives it on."""
  state = Decoder(load_base("random:tiny"), [[1, 2], [3]])._start()
  assert isinstance(state, graph.DecodeState)
  for name in ("token", "gates", "lengths", "done", "log_probs", "trace"):
    wrong = jnp.stack([getattr(state, name)] * 2)
    with pytest.raises(TypeCheckError, match=name):
      dataclasses.replace(state, **{name: wrong})
  with pytest.raises(TypeCheckError, match="tokens"):
    # Of three texts, where all else is of two.
    dataclasses.replace(state, tokens=jnp.zeros((3, 16), jnp.int32))


def test_every_module_is_checked_but_the_tasks():
  ours = {n: m for n, m in sys.modules.items() if n.startswith("tokenlora_jax")}
  assert len(ours) > 50
  unchecked = {
    name
    for name, module in ours.items()
    if not type(module.__spec__.loader).__module__.startswith("jaxtyping")
  }
  tasks = {n for n in ours if n.startswith("tokenlora_jax.data.tasks")}
  # The other two only import.
  assert unchecked == {"tokenlora_jax", "tokenlora_jax.data"} | tasks
