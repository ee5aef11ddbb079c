"""Decoding refuses what does not fit together, in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.decoding import Decoder, generate
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, random_adapters


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Reader(Router):
  needs = "text"
  experts = 3

  def gates(self, batch, observation, hidden):
    raise AssertionError("nothing is to be asked")


@pytest.fixture(scope="module")
def base():
  return Llama(PRESETS["tiny"], lambda _, shape: jnp.ones(shape))


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=3, rank=4)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("random:tiny")


def config(**settings):
  return DecodeConfig(**{"max_new_tokens": 6, **settings})


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"prompts": ["text"], "tokenizer": None}, "prompt 0: text needs a token"),
    ({"prompts": "text"}, "prompts: want a list"),
    ({"prompts": []}, "prompts: there are none"),
    ({"prompts": [[1], []]}, "prompt 1: is empty"),
    ({"prompts": [[260]]}, r"prompt 0: has tokens outside 0\.\.259"),
    ({"prompts": [[-1]]}, r"prompt 0: has tokens outside 0\.\.259"),
    ({"router": None}, "router: adapters need one"),
    ({"adapters": None}, "router: there are no adapters"),
    ({"tokenizer": None}, "router: one that reads text needs a tokenizer"),
    (
      {"router": make_router("fixed", gates=[1, 1])},
      "made for 2 experts, but the bank has 3",
    ),
    (
      {"router": make_router("one-hot", expert="e4")},
      r"'e4' is not one of e0, e1, e2 \(did you mean",
    ),
    ({"config": config(rule="exakt")}, r"rule: 'exakt' .*did you mean 'exact'"),
    (
      {"config": config(max_new_tokens=1020)},
      r"decode\.max-new-tokens: 1020 after a prompt of 5 tokens .* 1024",
    ),
    (
      {
        "config": config(stop=("x",)), "tokenizer": None,
        "router": make_router("sum"),
      },
      r"decode\.stop: stop strings need a tokenizer",
    ),
  ],
)  # fmt: skip
def test_errors_are_one_line(base, adapters, tokenizer, change, told):
  inputs = {
    "prompts": [[1, 104, 50, 120, 88]], "adapters": adapters, "router": Reader(),
    "config": config(), "tokenizer": tokenizer,
  }  # fmt: skip
  with pytest.raises(InputError, match=told) as caught:
    generate(base, **(inputs | change))
  assert "\n" not in str(caught.value)


def test_adapters_of_another_base_are_refused(base, adapters):
  narrow = jax.tree.map(
    lambda x: x[..., :32] if x.ndim == 3 else x, adapters.layers
  )
  with pytest.raises(InputError, match=r"layer 0 q is made for .*\[32, 32\]"):
    generate(
      base, [[1]], Adapters(adapters.names, narrow), make_router("uniform")
    )
  longer = Adapters(adapters.names, (*adapters.layers, *adapters.layers))
  with pytest.raises(InputError, match=r"at least 4 layers, but .* has 2"):
    generate(base, [[1]], longer, make_router("uniform"))


def test_a_prompt_may_fill_all_positions_but_those_to_make(base):
  Decoder(base, [[1] * 1018], config=config())
  with pytest.raises(InputError, match="after a prompt of 1019 tokens"):
    Decoder(base, [[1] * 1019], config=config())
