"""All tokens that end a text, against cutting an endless one by hand."""

import pytest
from tiny import Tokenizer

from tokenlora_jax.config import DecodeConfig, InputError
from tokenlora_jax.decoding import generate, graph
from tokenlora_jax.formats.load import load_base

PROMPTS = [[1, 104, 50, 120, 88], [1, 99], [1, 70, 71, 72, 73, 74, 75, 76, 77]]
NEW = 6


class Alphabet(Tokenizer):
  """Token n is a letter; which ones end a text is free to choose."""

  def __init__(self, eos_token_id=None, end_tokens=(), special=()):
    self.eos_token_id = eos_token_id
    self.end_tokens = end_tokens
    self.special = special

  def get_vocab(self):
    return {f"<{token}>": token for token in self.special}

  def decode(self, token_ids, skip_special_tokens=False):
    assert skip_special_tokens
    return text_of(token for token in token_ids if token not in self.special)


def text_of(tokens):
  return "".join(chr(0x100 + token) for token in tokens)


def make(base, tokenizer=None, refresh_every=0, **settings):
  config = DecodeConfig(
    max_new_tokens=NEW, refresh_every=refresh_every, **settings
  )
  return generate(base, PROMPTS, config=config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def base():
  return load_base("random:tiny", "float32")


@pytest.fixture(scope="module")
def free(base):
  """What greedy decoding makes where nothing ends it."""
  return make(base).tokens.tolist()


def cut_by_hand(row, ends):
  """How many tokens of a row count, the first of `ends` included."""
  for n, token in enumerate(row, 1):
    if token in ends:
      return n
  return len(row)


def test_every_end_token_ends_a_row(base, free):
  ends = [free[0][2], free[1][4], free[2][1]]
  words = tuple(f"<{end}>" for end in ends)
  for tokenizer, settings in (
    (Alphabet(ends[0], ends), {}),
    (Alphabet(None, ends), {}),
    # Their ids need not be those of special tokens, nor few.
    (Alphabet(ends[0], (*ends, *range(1000, 1012))), {}),
    # A special token among the stop strings is that token.
    (Alphabet(ends[0], special=ends[1:]), {"stop": words[1:]}),
    (Alphabet(999, special=ends), {"stop": words, "stop_at_eos": False}),
  ):
    out = make(base, tokenizer, **settings)
    for i, row in enumerate(free):
      count = cut_by_hand(row, ends)
      assert out.lengths[i] == count < NEW
      assert out.tokens[i, :count].tolist() == row[:count]
      assert out.texts[i] == text_of(row[: count - 1])
      assert out.pieces[i] == [*out.texts[i], ""]
      # One of them fills what is left.
      assert len(set(out.tokens[i, count:].tolist())) <= 1
      assert (out.log_probs[i, count:] == 0).all()


def test_another_list_of_ends_compiles_nothing(base, free):
  make(base, Alphabet(free[0][2]))
  before = graph.decode._cache_size()
  make(base, Alphabet(free[0][1], (free[1][1], free[2][1])))
  assert graph.decode._cache_size() == before


def test_a_stop_string_that_is_no_special_token_stays_text(base, free):
  row = free[0]
  tokenizer = Alphabet(None)
  tokenizer.get_vocab = lambda: {text_of(row[2:3]): row[2]}
  out = make(base, tokenizer, stop=(text_of(row[2:3]),))
  assert out.texts[0] == text_of(row[: row.index(row[2])])


def test_an_end_token_that_the_base_has_not_is_told(base):
  with pytest.raises(
    InputError, match=r"its end token has id 261 .*260 tokens"
  ):
    make(base, Beyond(261))


class Beyond(Alphabet):
  def decode(self, token_ids, skip_special_tokens=False):
    return text_of(token_ids)
