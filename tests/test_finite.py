"""Gates, logits and vectors that would be no numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import make_base, shaped
from tiny import Tokenizer

from tokenlora_jax.config import DecodeConfig, InputError, RouterConfig
from tokenlora_jax.data.examples import Example
from tokenlora_jax.decoding import generate
from tokenlora_jax.decoding.sampling import Sampler
from tokenlora_jax.encoders.hidden import HiddenEncoder
from tokenlora_jax.evaluation.evaluator import Evaluator, Variant
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.mixing.shaping import shape_gates
from tokenlora_jax.model.lora import random_adapters

NAMES = ("a", "b", "c")


@pytest.mark.parametrize(
  "prior",
  [
    make_router("base"),
    make_router("fixed", gates=[0.9, -0.1, 0.2]),
    make_router("fixed", gates=[0.0, 0.0, 0.0]),
    make_router("uniform", threshold=0.9),
  ],
)
def test_a_prior_is_made_of_shares(prior):
  """The logarithm of 0 / 0, or of a negative share, is no number."""
  with pytest.raises(InputError, match=r"router\.prior: .* want gates"):
    make_router("posterior", prior=prior).bind(NAMES)


def test_a_prior_may_leave_an_expert_out():
  prior = make_router("fixed", gates=[0.5, 0.5, 0.0])
  router = make_router("posterior", prior=prior, share=0.1).bind(NAMES)
  belief = router.learn(jnp.log(prior.gates(1, (), None)), jnp.zeros((1, 3)))
  assert np.isfinite(router.gates(1, (), belief)).all()


@pytest.mark.parametrize("shape", [{"top_k": 1}, {"temperature": 0.5}])
def test_powers_and_shares_are_not_of_negative_gates(shape):
  with pytest.raises(InputError, match="a gate of this router may be negative"):
    make_router("fixed", gates=[0.9, -0.1], **shape)


def test_predictions_are_not_mixed_with_negative_gates():
  base = make_base()
  adapters = random_adapters(base, experts=2, rank=2)
  router = make_router("fixed", gates=[0.9, -0.1])
  config = DecodeConfig(2, rule="probabilities")
  with pytest.raises(InputError, match="its gates may be negative"):
    generate(base, [[1, 2]], adapters, router, config)


LOGITS = np.array([[0.0, 80.0, -80.0, 79.0], [3e4, -3e4, 0.0, 1.0]], np.float32)


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-40, 1e-50])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 2}])
def test_the_coldest_sampling_is_greedy(temperature, more):
  for seed in range(4):
    found = Sampler(temperature, **more)(
      jnp.array(LOGITS), jax.random.key(seed)
    )
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_temperatures_are_finite(value):
  with pytest.raises(InputError, match=r"decode\.temperature: .* finite"):
    DecodeConfig(temperature=value)
  with pytest.raises(InputError, match=r"router\.temperature: .* finite"):
    RouterConfig(temperature=value)
  with pytest.raises(InputError, match=r"router\.temperature: .* finite"):
    make_router("uniform", temperature=value)


@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 1e-45, 1e-60])
def test_the_sharpest_gates_are_those_of_the_best(temperature):
  for gates in ([0.5, 0.3, 0.0], [0.2, 0.2, 0.1], [0.0, 0.0, 0.0]):
    router = make_router("fixed", gates=gates)
    found = shape_gates(router, temperature=temperature).gates(1, (), None)
    best = np.array(gates) == max(gates)
    want = best * sum(gates) / best.sum()
    np.testing.assert_allclose(found, [want], atol=1e-6)


def test_the_flattest_gates_are_alike():
  router = make_router("fixed", gates=[0.6, 0.3, 0.0], temperature=1e60)
  found = router.gates(1, (), None)
  np.testing.assert_allclose(found, [[0.45, 0.45, 0]], atol=1e-6)
  warm = make_router("fixed", gates=[0.6, 0.3, 0.0], temperature=3.0)
  want = shaped(np.array([0.6, 0.3, 0.0]), temperature=3.0)
  np.testing.assert_allclose(warm.gates(1, (), None), [want], atol=1e-6)


class Nothing(Tokenizer):
  """A tokenizer that puts no token in front."""

  bos_token_id = None
  eos_token_id = None

  def __call__(self, text, **settings):
    return {"input_ids": self.encode(text)}

  def encode(self, text, **settings):
    return list(text.encode())


def test_a_text_of_no_tokens_has_a_vector_of_zeros():
  vectors = HiddenEncoder(make_base(), Nothing(), 16).embed(["", "a"])
  assert not vectors[0].any()
  np.testing.assert_allclose(np.linalg.norm(vectors[1]), 1, atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Breaking(Router):
  """Gates that are no numbers after some characters."""

  most: jax.Array
  experts = 2
  needs = "text"

  def observe(self, texts):
    return np.array([len(text) for text in texts], np.float32)

  def gates(self, batch, observation, seen):
    fine = observation[:, None] < self.most
    return jnp.where(fine, jnp.full((batch, 2), 0.5), jnp.nan)


def test_texts_stop_where_gates_or_logits_are_no_numbers():
  base, tokenizer = make_base(), load_tokenizer("random:tiny")
  adapters = random_adapters(base, experts=2, rank=2)
  config = DecodeConfig(40, refresh_every=2, stop_at_eos=False)
  text = tokenizer.encode("abcdefgh")
  prompts = [text[:3], text]
  length = [len(tokenizer.decode(x, skip_special_tokens=True)) for x in prompts]
  assert length[0] < length[1]

  router = Breaking(jnp.float32(length[1]))
  told = "the gates of row 1 are not finite at token 0"
  with pytest.raises(FloatingPointError, match=told):
    generate(base, prompts, adapters, router, config, tokenizer)
  tokens = np.array([*text, 60, 61, 62, 63], np.int32)
  example = Example(tokens, np.ones(len(tokens), np.float32), len(text))
  router = Breaking(jnp.float32(length[1] + 2))
  told = "the gates of row 0 are not finite at token 2"
  with pytest.raises(FloatingPointError, match=told):
    list(
      Evaluator(base, adapters, tokenizer).score(Variant(router, 2), [example])
    )

  broken = jax.tree.map(lambda x: x, adapters.layers)
  broken[1]["v"] = dataclasses.replace(
    broken[1]["v"], b=broken[1]["v"].b.at[0].set(jnp.inf)
  )
  adapters = dataclasses.replace(adapters, layers=broken)
  told = "the logits of row 0 are not finite at token 0"
  with pytest.raises(FloatingPointError, match=told):
    generate(base, prompts, adapters, make_router("uniform"), config)
