"""What made tokens say, against decoding every prefix anew."""

import io
import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tokenlora_jax.config import InputError
from tokenlora_jax.decoding.text import TextStream
from tokenlora_jax.files import read_lines
from tokenlora_jax.formats.tokenizers import load_tokenizer


def sentencepiece_like():
  """Llama 2's way: words begin with a space, and any byte may be a token."""
  pieces = ["<s>", "</s>", "▁", "▁the", "▁a", "x", "\n", "é"]
  pieces += [f"<0x{byte:02X}>" for byte in range(256)]
  tokenizer = Tokenizer(
    models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(" ", left=1),
    ]
  )  # fmt: skip
  tokenizer.add_special_tokens(["<s>", "</s>"])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
  )


KINDS = {
  "bytes": lambda: load_tokenizer("random:tiny"),
  "sentencepiece": sentencepiece_like,
}


def spell(kind, text):
  """The tokens of a text, characters beyond ASCII a byte at a time."""
  if kind == "bytes":
    return [4 + byte for byte in text.encode()]
  own = {" ": 2, "x": 5, "\n": 6, "</s>": 1}
  tokens = []
  for letter in text:
    tokens += (
      [own[letter]] if letter in own else [8 + byte for byte in letter.encode()]
    )
  return tokens


def slowly(tokenizer, prompt, tokens):
  """Pieces by decoding every prefix anew."""
  before = tokenizer.decode(prompt, skip_special_tokens=True)
  pieces, shown = [], before
  for n in range(1, len(tokens) + 1):
    said = tokenizer.decode([*prompt, *tokens[:n]], skip_special_tokens=True)
    said = said.rstrip("\ufffd")
    # A run of byte tokens says nothing until its last character is whole.
    said = said if said.startswith(shown) else shown
    pieces.append(said[len(shown) :])
    shown = said
  return pieces


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_those_of_every_prefix(kind):
  tokenizer = KINDS[kind]()
  rng = random.Random(1)
  letters = " x\né漢\U0001f469\u200d "
  for _ in range(100):
    prompt = [1, *spell(kind, "x" + "".join(rng.choices(letters, k=3)))]
    tokens = spell(kind, "".join(rng.choices(letters, k=12)))
    tokens.insert(rng.choice([0, len(tokens)]), 1)
    stream = TextStream(tokenizer, prompt)
    stream.push(tokens)
    assert stream.pieces == slowly(tokenizer, prompt, tokens)
    assert stream.text == "".join(stream.pieces)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    assert tokenizer.decode(prompt, skip_special_tokens=True) + stream.text == (
      whole
    )


def test_the_first_space_after_a_prompt_is_kept():
  tokenizer = sentencepiece_like()
  for prompt in ([0, 5], [0, 5, *[1] * 20]):
    stream = TextStream(tokenizer, prompt)
    stream.push([2, 2, 2, 5, 1, 3])
    assert stream.text == "   x the"
  # At the very start there is none.
  stream = TextStream(tokenizer, [0])
  stream.push([3])
  assert stream.text == "the"


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_cut_pieces_and_text(kind):
  tokenizer = KINDS[kind]()
  stream = TextStream(tokenizer, spell(kind, "x"), ("\n é", "never"))
  tokens = spell(kind, "x \n éxx")
  for token in tokens:  # A chunk a token: a stop string may span chunks.
    stream.push([token])
  assert stream.stopped and stream.text == "x "
  assert "".join(stream.pieces) == "x "
  assert len(stream.pieces) == len(tokens) - 2


def test_an_unfinished_character_shows_in_the_text_alone():
  stream = TextStream(load_tokenizer("random:tiny"), [1])
  stream.push([4 + 120, *spell("bytes", "é")[:1]])
  assert stream.text == "x\ufffd" and stream.pieces == ["x", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_ends_the_text_and_says_nothing(kind):
  tokenizer = KINDS[kind]()
  x, newline = spell(kind, "x\n")
  stream = TextStream(tokenizer, spell(kind, "x"), ends=[newline, -1])
  stream.push([x])
  assert not stream.ended
  stream.push([newline, x])
  assert stream.ended and not stream.stopped
  assert stream.text == "x" and stream.pieces == ["x", ""]


def test_the_work_is_linear():
  inner = load_tokenizer("random:tiny")
  seen = []

  class Counting:
    def decode(self, tokens, skip_special_tokens):
      seen.append(len(tokens))
      return inner.decode(tokens, skip_special_tokens=skip_special_tokens)

  stream = TextStream(Counting(), spell("bytes", "x" * 200))
  tokens = spell("bytes", "aé漢" * 100)
  for token in tokens:
    stream.push([token])
  assert stream.text == "aé漢" * 100
  assert len(seen) <= 2 * len(tokens) + 2 and max(seen) <= 12


def test_lines_end_at_newlines_alone(tmp_path):
  text = "\ufeffa\u2028b\r\n\n c\x0cd\x85e\n".encode()
  file = tmp_path / "p.txt"
  file.write_bytes(text)
  lines = ["a\u2028b", " c\x0cd\x85e"]
  assert read_lines(file, "F", "prompt") == lines
  stdin = io.TextIOWrapper(io.BytesIO(text), "latin-1")
  assert read_lines(stdin, "F", "prompt") == lines
  file.write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(InputError, match="F cannot be read: byte 3 is no UTF-8"):
    read_lines(file, "F", "prompt")


def pieces_of(tokenizer, tokens, *stop):
  stream = TextStream(tokenizer, stop=stop)
  stream.push(tokens)
  return stream.pieces


@pytest.mark.parametrize(
  "text", ["plain", "né €, 😀!", "ends in €", "", "[bold]x[/bold]"]
)
def test_pieces_join_to_the_text_and_never_change(text):
  tokenizer = load_tokenizer("random:tiny")
  tokens = tokenizer.encode(text, add_special_tokens=False)
  assert len(tokens) == len(text.encode())
  pieces = pieces_of(tokenizer, tokens)
  assert len(pieces) == len(tokens)
  assert "".join(pieces) == text
  for n in range(len(tokens)):
    assert pieces_of(tokenizer, tokens[:n]) == pieces[:n]


def test_pieces_of_what_is_no_text():
  """Half a character, bytes that are none, the end token, a stop string."""
  tokenizer = load_tokenizer("random:tiny")
  euro = tokenizer.encode("€", add_special_tokens=False)
  assert pieces_of(tokenizer, euro[:2]) == ["", ""]
  broken = [*euro[:2], *tokenizer.encode("ab", add_special_tokens=False)]
  text = tokenizer.decode(broken)
  pieces = pieces_of(tokenizer, broken)
  assert "".join(pieces) == text
  assert pieces[:2] == ["", ""]
  ended = [*tokenizer.encode("ab", add_special_tokens=False), 2]
  assert pieces_of(tokenizer, ended) == ["a", "b", ""]
  stopped = tokenizer.encode("abSTOP", add_special_tokens=False)
  assert pieces_of(tokenizer, stopped, "STOP") == ["a", "b", *[""] * 4]
