"""Rows as tokens."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data.examples import held_out, tokenize
from tokenlora_jax.data.rows import Row, load_rows
from tokenlora_jax.data.tokens import check_vocab, encode_prompt

BOS, EOS = 0, 1


def wrap(tokenizer, template="<s> $A"):
  tokenizer.add_special_tokens(["<s>", "</s>"])
  tokenizer.post_processor = TemplateProcessing(
    single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
  )


def byte_tokenizer(template="<s> $A", merges=()):
  """One token a byte, but for `merges`."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  pieces = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
  tokenizer = Tokenizer(
    models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges))
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  return wrap(tokenizer, template)


def sentencepiece_tokenizer():
  """Llama 2's way with spaces: one more is put before every text."""
  pieces = ["<s>", "</s>", "▁", *map(chr, range(33, 127)), "\n"]
  tokenizer = Tokenizer(
    models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  return wrap(tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
  return byte_tokenizer()


# -----------------------------------------------------------------------------
# Tokens.

ROW = Row("Q?\n\nAnswer:", " é 4", "file:7")  # 11 and 5 bytes


def test_tokens_are_prompt_answer_and_end(tokenizer):
  example = tokenize(ROW, tokenizer, DataConfig())
  assert example.tokens.dtype == np.int32
  assert example.tokens[0] == BOS
  assert example.tokens[-1] == EOS
  assert tokenizer.decode(example.tokens[1:-1]) == ROW.prompt + ROW.answer
  assert example.prompt_length == 1 + 11
  assert list(example.tokens[:12]) == encode_prompt(ROW.prompt, tokenizer)
  assert example.loss_mask.dtype == np.float32
  assert example.loss_mask.tolist() == [0] * 12 + [1] * (5 + 1)


def test_a_rows_control_tokens_are_letters(tokenizer):
  row = Row("<s>Q</s>", " </s><s>old</s>", "file:7")
  tokens = tokenize(row, tokenizer, DataConfig()).tokens.tolist()
  assert tokenizer.decode(tokens[1:-1]) == row.text
  assert tokens.count(EOS) == tokens.count(BOS) == 1
  # A person's prompt may hold them.
  assert encode_prompt("a</s>b", tokenizer).count(EOS) == 1


def test_a_prompt_with_bos_gets_no_second_one(tokenizer):
  assert encode_prompt("<s>Q", tokenizer) == encode_prompt("Q", tokenizer)
  assert encode_prompt("<s><s>Q", tokenizer).count(BOS) == 2


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path):
  (tmp_path / "gsm8k").mkdir()
  rows = [
    {"question": "a \ud83d", "answer": "1\n#### 1"},
    {"question": "b", "answer": "2\n#### 2"},
  ]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "gsm8k" / "train.jsonl").write_text(lines)
  config = DataConfig(source="local", dir=str(tmp_path))
  told = r"train.jsonl:1: .*character 3 .*'\\ud83d', a stray byte or half"
  with pytest.raises(InputError, match=told):
    load_rows(config, "gsm8k", "train")
  skip = dataclasses.replace(config, bad_rows="skip")
  assert len(load_rows(skip, "gsm8k", "train")) == 1
  with pytest.raises(InputError, match="half a surrogate pair"):
    encode_prompt("\ud83d", byte_tokenizer())


def test_loss_on_all_targets_all_but_the_first_token(tokenizer):
  example = tokenize(ROW, tokenizer, DataConfig(loss_on="all"))
  assert example.loss_mask.tolist() == [0] + [1] * 17
  assert example.prompt_length == 12


def test_a_tokenizers_own_end_tokens_do_not_end_the_prompt():
  tokenizer = byte_tokenizer("<s> $A </s>")
  assert tokenizer.encode("a")[-1] == EOS
  plain = byte_tokenizer()
  assert encode_prompt("a", tokenizer) == plain.encode("a")
  assert (
    tokenize(ROW, tokenizer, DataConfig()).tokens.tolist()
    == tokenize(ROW, plain, DataConfig()).tokens.tolist()
  )


def test_an_answer_is_encoded_as_it_follows_the_prompt():
  tokenizer = sentencepiece_tokenizer()
  row = Row("Q\nAnswer:", " 42", "file:1")
  example = tokenize(row, tokenizer, DataConfig())
  pieces = tokenizer.convert_ids_to_tokens(example.tokens.tolist())
  assert pieces == ["<s>", "▁", *"Q\nAnswer:", "▁", "4", "2", "</s>"]


def test_a_token_across_the_boundary_leaves_the_prompt_alone():
  tokenizer = byte_tokenizer(merges=[(":", "Ġ")])
  assert len(tokenizer.encode(": ")) == 2  # BOS and the merged token
  example = tokenize(Row("Answer:", " 4", "file:1"), tokenizer, DataConfig())
  pieces = tokenizer.convert_ids_to_tokens(example.tokens.tolist())
  assert pieces == ["<s>", *"Answer:", "Ġ", "4", "</s>"]
  assert example.prompt_length == 8


def test_long_rows_are_skipped_cut_or_fatal(tokenizer):
  exact = DataConfig(length=18, too_long="fatal")
  assert len(tokenize(ROW, tokenizer, exact).tokens) == 18
  assert tokenize(ROW, tokenizer, DataConfig(length=17)) is None
  whole = tokenize(ROW, tokenizer, exact)
  cut = tokenize(ROW, tokenizer, DataConfig(length=14, too_long="truncate"))
  assert cut.tokens.tolist() == whole.tokens[:14].tolist()
  assert cut.loss_mask.tolist() == [0] * 12 + [1] * 2
  with pytest.raises(InputError, match=r"^file:7: 18 tokens .*data\.length 17"):
    tokenize(ROW, tokenizer, DataConfig(length=17, too_long="fatal"))


def test_a_row_cut_before_its_answer_is_left_out_unless_all_counts(tokenizer):
  config = DataConfig(length=12, too_long="truncate")
  assert tokenize(ROW, tokenizer, config) is None
  config = DataConfig(length=10, too_long="truncate", loss_on="all")
  example = tokenize(ROW, tokenizer, config)
  assert example.loss_mask.tolist() == [0] + [1] * 9
  assert example.prompt_length == 10


def test_a_tokenizer_needs_an_end_token():
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=byte_tokenizer().backend_tokenizer
  )
  with pytest.raises(InputError, match="tokenizer: it has no end token"):
    tokenize(ROW, tokenizer, DataConfig())


def test_held_out_rows_that_do_not_fit_are_counted(tokenizer, caplog):
  long = Row("Q" * 30, " A", "file:8")
  with caplog.at_level(logging.WARNING):
    examples = held_out([ROW, long, ROW], tokenizer, DataConfig(length=20))
  assert {i: len(e.tokens) for i, e in examples.items()} == {0: 18, 2: 18}
  assert "left out 1 of 3 rows" in caplog.text
  with pytest.raises(InputError, match=r"data\.length: 20 tokens .*file:8"):
    held_out([long], tokenizer, DataConfig(length=20))


def test_held_out_takes_the_first_rows_that_fit(caplog):
  tokenizer = byte_tokenizer()
  rows = [Row("p" * n, " a", f"row {n}") for n in (2, 90, 3, 4, 5)]
  config = DataConfig(eval_rows=3, length=16)
  examples = held_out(rows, tokenizer, config)
  found = {i: e.prompt_length for i, e in examples.items()}
  assert found == {0: 3, 2: 4, 3: 5}
  assert "left out 1 of 4 rows" in caplog.text


def test_tokens_beyond_the_bases_vocabulary_are_told():
  """A lookup beyond the last row would silently read another."""
  tokenizer = byte_tokenizer()
  check_vocab([3, 9], tokenizer, 10)
  with pytest.raises(
    InputError, match=r"a token has id 10 .* 10 tokens, 0 to 9"
  ):
    check_vocab([3, 10], tokenizer, 10, "a token")
  tokenizer.base_vocab = EOS
  with pytest.raises(InputError, match=f"its end token has id {EOS} "):
    tokenize(ROW, tokenizer, DataConfig())
  tokenizer.base_vocab = 1 + max(tokenize_ids(tokenizer))
  assert tokenize(ROW, tokenizer, DataConfig()) is not None
  tokenizer.base_vocab -= 1
  with pytest.raises(InputError, match="has id"):
    tokenize(ROW, tokenizer, DataConfig())


def tokenize_ids(tokenizer):
  del tokenizer.base_vocab
  return tokenize(ROW, tokenizer, DataConfig()).tokens.tolist()
