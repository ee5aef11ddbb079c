"""What arms say, against texts made one by one and likelihoods by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from tokenlora_jax.config import DataConfig, DecodeConfig, InputError
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.decoding import generate
from tokenlora_jax.evaluation.evaluator import Evaluator, Variant
from tokenlora_jax.evaluation.experiment.answers import Judge
from tokenlora_jax.evaluation.experiment.questions import Question, questions
from tokenlora_jax.evaluation.scoring import get_scorers
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.lora import random_adapters

DECODE = DecodeConfig(max_new_tokens=6, refresh_every=1)
GATES = [0.75, 0.25]


@pytest.fixture(scope="module")
def base():
  return load_base("random:tiny", "float32")


@pytest.fixture(scope="module")
def adapters(base):
  return random_adapters(base, experts=2, rank=4)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("random:tiny")


@pytest.fixture(scope="module")
def judge(base, adapters, tokenizer):
  evaluator = Evaluator(base, adapters, tokenizer)
  return Judge(base, adapters, tokenizer, evaluator, DECODE)


def ask(task, tokenizer, count):
  config = DataConfig(length=256, eval_rows=count)
  return questions(load_rows(config, task, "test"), tokenizer, config)


def test_texts_are_those_of_each_prompt_alone(base, adapters, tokenizer, judge):
  asked = ask("gsm8k", tokenizer, 2)
  router = make_router("fixed", gates=GATES)
  said = judge.judge("gsm8k", Variant(router), asked)
  once = dataclasses.replace(DECODE, refresh_every=0)
  (scorer,) = get_scorers("gsm8k").values()
  assert len(said) == 2
  for one, question in zip(said, asked, strict=True):
    size = question.example.prompt_length
    prompt = question.example.tokens[:size].tolist()
    alone = generate(base, [prompt], adapters, router, once, tokenizer)
    assert one["text"] == alone.texts[0]
    assert one["made"] == alone.lengths[0]
    assert one["scores"] == scorer.score(one["text"], question.fields)
    assert one["made_seconds"] > 0
  # The base has no gates.
  (bare,) = judge.judge("gsm8k", Variant(None), asked[:1])
  prompt = asked[0].example.tokens[: asked[0].example.prompt_length].tolist()
  alone = generate(base, [prompt], config=once, tokenizer=tokenizer)
  assert bare["text"] == alone.texts[0] != said[0]["text"]


def test_choices_are_scored_by_their_likelihoods(
  base, adapters, tokenizer, judge, monkeypatch
):
  asked = ask("arc_challenge", tokenizer, 2)
  seen = []
  for scorer in get_scorers("arc_challenge").values():
    if hasattr(scorer, "requests"):
      monkeypatch.setattr(
        type(scorer), "score", keeping(type(scorer).score, seen)
      )
  router = make_router("fixed", gates=GATES)
  said = judge.judge("arc_challenge", Variant(router), asked)
  for one in said:
    assert set(one["scores"]) == {
      "acc", "acc_norm", "letter_acc", "written_letter_acc",
    }  # fmt: skip
  assert len(seen) == 4
  for scorer, values, row in seen:
    for request, value in zip(scorer.requests(row), values, strict=True):
      before = tokenizer.encode(request.context)
      tokens = tokenizer.encode(request.context + request.continuation)
      padded = np.zeros((1, 256), np.int32)
      padded[0, : len(tokens)] = tokens
      logits = forward(base, padded, adapters, [GATES])[0]
      told = np.asarray(jax.nn.log_softmax(logits))
      by_hand = sum(
        told[t - 1, tokens[t]] for t in range(len(before), len(tokens))
      )
      assert value == pytest.approx(by_hand, abs=1e-3)


def keeping(score, seen):
  def keep(self, values, row):
    seen.append((self, values, row))
    return score(self, values, row)

  return keep


def test_what_cannot_be_scored_is_one_line(tokenizer, judge):
  asked = ask("gsm8k", tokenizer, 1)
  judge.check("gsm8k", asked)
  longer = dataclasses.replace(DECODE, max_new_tokens=5000)
  judge = Judge(judge._base, None, tokenizer, None, longer)
  with pytest.raises(InputError, match=r"decode\.max-new-tokens: 5000 after"):
    judge.check("gsm8k", asked)
  with pytest.raises(InputError, match="is not one of"):
    judge.check("gsm9k", asked)


def test_a_bad_row_is_named(tokenizer, judge):
  (good,) = ask("arc_challenge", tokenizer, 1)
  bad = Question(good.name, good.example, {**good.fields, "answerKey": "Z"})
  with pytest.raises(InputError, match=f"arc_challenge {good.name}: .*'Z'"):
    judge.judge("arc_challenge", Variant(None), [bad])
