"""Our model in lm-eval against lm-eval's own, `hf`, on the same weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.models.huggingface import HFLM
import numpy as np
import pytest
from saved_llama import (
  EXPERTS,
  LONGEST,
  TEMPLATE,
  save_adapters,
  save_bank_of,
  save_llama,
)

from tokenlora_jax.bank.bank import load_bank
from tokenlora_jax.commands.lm_eval import TokenLoraLM
from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.data.examples import Example
from tokenlora_jax.decoding import generate
from tokenlora_jax.evaluation import likelihood
from tokenlora_jax.evaluation.evaluator import Evaluator, Variant
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router, register_router

# Contexts of several lengths, some with spaces at the end, cut or empty; some
# answers differ from another's in their last token alone.
PAIRS = [
  ("The sky is", " blue"),
  ("The sky is", " A"),
  ("The sky is", " B"),
  ("The sky is", " C"),
  ("The sky is", " green and wide"),
  ("Two spaces  ", "follow"),
  ("", "Nothing stands before"),
  ("", "<bos>again"),
  ("<bos>once", " more"),
  ("long " * 10, "cut on the left"),
  ("x", "y" * LONGEST),
  ("Which?\n", "é"),
]
TEXTS = ["short", "", "a text that is as long as " * 4, "y" * 32, "<bos>b"]
PROMPTS = ["The sky is", "Once", "", "long " * 10, "Zebra crossing"]
# Texts made at once: as many in every test, so that few programs compile.
BATCH = 5
NEW = 12


@register_router("lm-eval-letters")
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Letters(Router):
  """Gates from the letters' sum."""

  needs = "text"
  experts = 2

  def observe(self, texts):
    return np.array([sum(map(ord, text)) % 97 for text in texts], np.float32)

  def gates(self, batch, observation, hidden):
    turns = jnp.array([0.3, 1.1])
    return jax.nn.softmax(3 * jnp.sin(observation[:, None] * turns))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
  return save_adapters(folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def bank(folder, adapters, tmp_path_factory):
  return save_bank_of(
    folder, adapters, tmp_path_factory.mktemp("runs") / "bank"
  )


def hf(folder, **args):
  args = {"batch_size": 3, "device": "cpu", "dtype": "float32"} | args
  return HFLM(folder, **args)


def ours(folder, **args):
  args = {"base": folder, "dtype": "float32", "batch_size": BATCH} | args
  return TokenLoraLM(**args)


@pytest.fixture(scope="module")
def theirs(folder):
  return hf(folder)


@pytest.fixture(scope="module")
def alone(folder):
  return ours(folder)


def asked(kind, *arguments):
  return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def likelihoods(model, pairs):
  scores = model.loglikelihood(asked("loglikelihood", *pairs), True)
  assert all(type(greedy) is bool for _, greedy in scores)
  return np.array([score for score, _ in scores]), [g for _, g in scores]


def rolling(model, texts):
  requests = asked("loglikelihood_rolling", *((text,) for text in texts))
  return model.loglikelihood_rolling(requests)


def made(model, prompts, **settings):
  settings = {"until": [], "max_gen_toks": NEW} | settings
  requests = asked("generate_until", *((p, settings) for p in prompts))
  return model.generate_until(requests, True)


def assert_same(left, right):
  """All that lm-eval asks of a model."""
  texts = made(left, PROMPTS)
  assert texts == made(right, PROMPTS)
  assert len(set(texts)) > 3
  # What is greedy is said to be.
  greedy = [
    (p, text[:n])
    for p, text in zip(PROMPTS, texts, strict=True)
    for n in (1, 7)
    if "\ufffd" not in text[:n]
  ]
  pairs = [*PAIRS, *greedy]
  scores, flags = likelihoods(left, pairs)
  expected, expected_flags = likelihoods(right, pairs)
  np.testing.assert_allclose(scores, expected, atol=1e-3)
  assert flags == expected_flags
  assert {True, False} == set(flags)
  np.testing.assert_allclose(
    rolling(left, TEXTS), rolling(right, TEXTS), atol=1e-3
  )


def test_the_base_alone_is_what_hf_says(alone, theirs):
  assert_same(alone, theirs)


def test_an_expert_alone_is_what_hf_says_with_peft(folder, adapters, bank):
  for name in EXPERTS:
    model = ours(folder, bank=bank, router="one-hot", expert=name)
    assert_same(model, hf(folder, peft=str(adapters[name])))


@pytest.mark.parametrize("add", [True, False])
def test_bos_is_added_as_hf_adds_it(folder, alone, add):
  model = ours(folder, add_bos_token=add)
  reference = hf(folder, add_bos_token=add)
  pairs = PAIRS[:2] + PAIRS[5:9]
  scores, _ = likelihoods(model, pairs)
  np.testing.assert_allclose(scores, likelihoods(reference, pairs)[0], 1e-4)
  assert np.allclose(scores, likelihoods(alone, pairs)[0], 1e-4) == add
  # hf looks for BOS in the first text of a batch alone.
  for prompt in ("Once", "<bos>x"):
    assert made(model, [prompt] * 5) == made(reference, [prompt] * 5)


def test_text_ends_where_hf_ends_it(alone, theirs):
  whole = made(alone, PROMPTS)
  text = whole[2]
  stop, later = text[4:6], text[6:8]
  assert "\ufffd" not in stop + later
  for until in (stop, [later, stop], ["no such text", "<eos>"]):
    found = made(alone, PROMPTS, until=until, do_sample=False)
    assert found == made(theirs, PROMPTS, until=until, do_sample=False)
    assert found[2] == (text[:4] if stop in until else text)
  assert made(alone, PROMPTS, until=[""]) == whole
  for words in ("max_new_tokens", "max_tokens"):
    settings = {"max_gen_toks": None, words: NEW - 1}
    found = made(alone, PROMPTS, **settings)
    assert found == made(theirs, PROMPTS, **settings) != whole


def test_a_special_token_ends_text_where_tasks_say_so(alone, monkeypatch):
  """As <|im_end|> does where the end token is another; text never shows it."""
  prompts = [alone.tok_encode("Once")] * BATCH
  out = generate(alone._base, prompts, config=DecodeConfig(NEW, 0))
  row = out.tokens[0].tolist()
  assert row.index(row[5]) == 5
  decode = alone.tokenizer.decode

  def without(ids, skip_special_tokens=False):
    kept = [i for i in np.atleast_1d(ids) if i != row[5]]
    return decode(kept if skip_special_tokens else ids, skip_special_tokens)

  monkeypatch.setattr(alone.tokenizer, "decode", without)
  expected = [decode(row[:5])] * BATCH
  assert made(alone, ["Once"] * BATCH) != expected
  until = [alone.tokenizer.convert_ids_to_tokens(row[5])]
  assert made(alone, ["Once"] * BATCH, until=until) == expected


def test_a_special_token_leaves_the_first_space(alone, monkeypatch):
  """SentencePiece drops the space of what is decoded alone."""
  prompts = [alone.tok_encode("Once")] * BATCH
  row = generate(alone._base, prompts, config=DecodeConfig(NEW, 0)).tokens[0]
  row = row.tolist()

  def decode(ids, skip_special_tokens=False):
    kept = [i for i in np.atleast_1d(ids) if i != row[5]]
    said = "".join(" x" if i == row[0] else chr(0x100 + i) for i in kept)
    return said.removeprefix(" ")

  monkeypatch.setattr(alone.tokenizer, "decode", decode)
  whole = decode([*prompts[0], *row[:5]])
  text = whole.removeprefix(decode(prompts[0]))
  assert text.startswith(" x")
  until = [alone.tokenizer.convert_ids_to_tokens(row[5])]
  assert made(alone, ["Once"] * BATCH, until=until) == [text] * BATCH


def test_sampled_text_follows_the_seed_and_differs_between_requests(folder):
  def sample(seed):
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 40}
    return made(ours(folder, seed=seed), ["Once"] * 2 * BATCH, **settings)

  texts = sample(0)
  assert len(set(texts)) == 2 * BATCH
  assert sample(0) == texts != sample(1)


def test_chats_are_written_as_hf_writes_them(
  folder, alone, theirs, caplog, monkeypatch
):
  turns = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
  ]
  for opened in (True, False):
    text = alone.apply_chat_template(turns, opened)
    assert text == theirs.apply_chat_template(turns, opened)
    # The template writes BOS, and no second one is added.
    assert alone.tok_encode(text) == theirs.tok_encode(text)
  assert alone.chat_template(True) == TEMPLATE
  system = [{"role": "system", "content": "Be brief"}]
  text = alone.apply_chat_template(system + turns)
  assert text == alone.apply_chat_template(turns)
  assert "no system message" in caplog.text
  monkeypatch.setattr(alone.tokenizer, "chat_template", None)
  with pytest.raises(InputError) as told:
    alone.apply_chat_template(turns)
  assert str(told.value) == f"{folder}: has no chat template"


ROUTERS = {
  "lm-eval-letters": {"router": "lm-eval-letters"},
  "centroid": {"router": "centroid", "encoder": "hidden"},
  "fixed": {"router": "fixed", "gates": [0.3, 1.2]},
}


@pytest.mark.parametrize(
  ("name", "refresh_every"),
  [
    ("lm-eval-letters", 0), ("lm-eval-letters", 2), ("centroid", 2),
    ("fixed", 2),
  ],
)  # fmt: skip
def test_mixed_scores_are_those_of_the_decoder(
  folder, bank, name, refresh_every
):
  settings = ROUTERS[name] | {"refresh_every": refresh_every}
  model = ours(folder, bank=bank, **settings)
  base = load_base(folder, "float32")
  loaded, tokenizer = load_bank(bank, base), load_tokenizer(folder)
  router = {
    "lm-eval-letters": Letters(),
    "centroid": make_router(
      "centroid", centroids=loaded.centroids["hidden"], encoder="hidden"
    ),
    "fixed": make_router("fixed", gates=[0.3, 1.2]),
  }[name]
  prompts = ["The sky is", "Once", "Zebra", "Two", "x"]
  assert len(prompts) == BATCH
  encoded = [tokenizer.encode(prompt) for prompt in prompts]
  out = generate(
    base, encoded, loaded.adapters, router,
    DecodeConfig(NEW, refresh_every, stop_at_eos=False), tokenizer,
  )  # fmt: skip
  assert made(model, prompts) == out.texts
  # Answers of several lengths, the last token greedy or not.
  requests = [
    (None, prompt, [*row[:n], row[n] ^ turn])
    for prompt, row, n in zip(
      encoded, out.tokens.tolist(), (11, 1, 4, 0, 7), strict=True
    )
    for turn in (0, 1)
  ]
  scores = model._loglikelihood_tokens(requests, True)
  assert [greedy for _, greedy in scores] == [True, False] * BATCH
  likely = [score for score, _ in scores[::2]]
  expected = [
    row[: len(request[2])].sum()
    for row, request in zip(out.log_probs, requests[::2], strict=True)
  ]
  np.testing.assert_allclose(likely, expected, atol=1e-3)
  if name == "centroid":
    return
  # Of answers that no one would decode as well.
  examples = [
    Example(np.array([*context, *answer], np.int32), None, len(context))
    for _, context, answer in requests
  ]
  evaluator = Evaluator(base, loaded.adapters, tokenizer)
  for batch in evaluator.score(Variant(router, refresh_every), examples):
    for row in batch:
      want = -row.losses.sum()
      assert scores[row.place][0] == pytest.approx(want, abs=1e-3)


def test_few_shapes_are_compiled_and_shared_contexts_read_once(
  alone, monkeypatch
):
  read = []
  forward = likelihood.forward

  def counted(base, tokens, *rest):
    read.append(tokens.shape)
    return forward(base, tokens, *rest)

  monkeypatch.setattr(likelihood, "forward", counted)
  pairs = [("a" * n, letter) for n in range(9, 27) for letter in "ABCD"]
  scores, _ = likelihoods(alone, pairs)
  # 18 contexts, five rows at once; the last batch is filled up.
  assert read == [(BATCH, 32)] * 4
  some = pairs[2::17]
  assert len(some) == BATCH
  np.testing.assert_allclose(likelihoods(alone, some)[0], scores[2::17], 1e-4)


def test_answers_are_remembered_by_lm_eval(alone, tmp_path):
  requests = {
    "loglikelihood": asked("loglikelihood", *PAIRS[:BATCH]),
    "loglikelihood_rolling": asked(
      "loglikelihood_rolling", *[(text,) for text in TEXTS]
    ),
    "generate_until": asked(
      "generate_until", *((p, {"max_gen_toks": NEW}) for p in PROMPTS)
    ),
  }
  kept = CachingLM(alone, str(tmp_path / "cache.db"))
  try:
    got = {name: getattr(alone, name)(requests[name]) for name in requests}
  finally:
    alone.set_cache_hook(CacheHook(None))
  # The model itself told the cache, row by row, all that it answered.
  assert len(kept.dbdict) == 3 * BATCH
  found = CachingLM(Gone(), str(tmp_path / "cache.db"))
  for name, expected in got.items():
    again = getattr(found, name)(requests[name])
    assert json.dumps(again) == json.dumps(expected)


class Gone:
  """A model that answers nothing, so that answers come from the cache."""

  loglikelihood = loglikelihood_rolling = generate_until = None

  def set_cache_hook(self, hook):
    pass
