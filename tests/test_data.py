"""Rows as tokens, and the batches of all experts."""

import json
import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data import (
  Row,
  batches,
  held_out,
  held_out_batches,
  tokenize,
)
from tokenlora_jax.text import encode_prompt

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
  assert [len(example.tokens) for example in examples] == [18, 18]
  assert "left out 1 of 3 rows" in caplog.text
  with pytest.raises(InputError, match=r"data\.length: 20 tokens .*file:8"):
    held_out([long], tokenizer, DataConfig(length=20))


# -----------------------------------------------------------------------------
# Batches.

PAIR = ("gsm8k", "squad")


def rows_of(lengths):
  """Rows whose answers have the given numbers of bytes, all different."""
  return [
    Row(f"{i:03}:", " " + "a" * (n - 1), f"f:{i}")
    for i, n in enumerate(lengths)
  ]


ROWS = {"gsm8k": rows_of([3, 4, 5, 6, 7]), "squad": rows_of([2] * 3)}


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def test_a_batch_holds_its_rows(tokenizer):
  config = DataConfig(tasks=PAIR, rows=4, seed=5)
  batch = next(iter(batches(ROWS, tokenizer, config)))
  assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
    "tokens": ((2, 4, 64), np.int32),
    "positions": ((2, 4, 64), np.int32),
    "segment_ids": ((2, 4, 64), np.int32),
    "loss_mask": ((2, 4, 64), np.float32),
    "rows": ((2, 4), np.int32),
  }
  for e, task in enumerate(PAIR):
    for b in range(4):
      row = ROWS[task][batch["rows"][e, b]]
      answer = len(row.answer)
      size = 1 + 4 + answer + 1
      tokens = batch["tokens"][e, b]
      assert tokenizer.decode(tokens[1 : size - 1]) == row.prompt + row.answer
      assert (tokens[0], tokens[size - 1]) == (BOS, EOS)
      assert not tokens[size:].any()
      assert batch["segment_ids"][e, b].tolist() == [1] * size + [0] * (
        64 - size
      )
      assert batch["positions"][e, b].tolist() == list(range(64))
      mask = [0] * 5 + [1] * (answer + 1) + [0] * (64 - size)
      assert batch["loss_mask"][e, b].tolist() == mask


def test_experts_follow_the_order_of_the_settings(tokenizer):
  def first(tasks):
    config = DataConfig(tasks=tasks, rows=2)
    return next(iter(batches(ROWS, tokenizer, config)))["tokens"]

  np.testing.assert_array_equal(first(PAIR), first(PAIR[::-1])[::-1])


def test_the_length_is_the_least_multiple_of_64(tokenizer):
  def length(answer, most):
    rows = {"squad": rows_of([answer, 2])}
    config = DataConfig(tasks=("squad",), rows=2, length=most)
    return next(iter(batches(rows, tokenizer, config)))["tokens"].shape[-1]

  assert length(58, 256) == 64  # 1 + 4 + 58 + 1 tokens
  assert length(59, 256) == 128
  assert length(59, 100) == 100  # never more than data.length


def test_every_pass_sees_each_row_once_in_a_new_order(tokenizer):
  rows = {"gsm8k": rows_of([4] * 12)}
  config = DataConfig(tasks=("gsm8k",), rows=4)
  steps = take(iter(batches(rows, tokenizer, config)), 9)
  passes = np.concatenate([s["rows"][0] for s in steps]).reshape(3, 12)
  for one in passes:
    assert sorted(one) == list(range(12))
  assert len({tuple(one) for one in passes}) == 3


def test_a_task_shorter_than_a_batch_starts_over(tokenizer):
  config = DataConfig(tasks=("squad",), rows=8)
  (batch,) = take(iter(batches(ROWS, tokenizer, config)), 1)
  assert (
    sorted(batch["rows"][0, :3]) == sorted(batch["rows"][0, 3:6]) == [0, 1, 2]
  )


def test_order_depends_on_the_seed_but_not_on_other_tasks(tokenizer):
  rows = {task: rows_of([4] * 40) for task in PAIR}

  def order(tasks, seed):
    config = DataConfig(tasks=tasks, rows=4, seed=seed)
    steps = take(iter(batches(rows, tokenizer, config)), 5)
    return [s["rows"][tasks.index("squad")].tolist() for s in steps]

  assert order(PAIR, 0) == order(PAIR, 0) == order(("squad",), 0)
  assert order(PAIR, 0) != order(PAIR, 1)


def test_row_numbers_count_the_rows_left_out(tokenizer):
  rows = {"gsm8k": rows_of([90, 4, 90, 4])}
  config = DataConfig(tasks=("gsm8k",), rows=2, length=32)
  (batch,) = take(iter(batches(rows, tokenizer, config)), 1)
  assert sorted(batch["rows"][0]) == [1, 3]


def test_a_restored_iterator_goes_on_where_it_was(tokenizer):
  config = DataConfig(tasks=PAIR, rows=2)
  iterator = iter(batches(ROWS, tokenizer, config))
  take(iterator, 4)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 5)
  resumed = iter(batches(ROWS, tokenizer, config))
  take(resumed, 1)
  resumed.set_state(state)
  for ours, theirs in zip(take(resumed, 5), expected, strict=True):
    for name in theirs:
      np.testing.assert_array_equal(ours[name], theirs[name])


def test_held_out_takes_the_first_rows_that_fit(caplog):
  tokenizer = byte_tokenizer()
  rows = [Row("p" * n, " a", f"row {n}") for n in (2, 90, 3, 4, 5)]
  config = DataConfig(eval_rows=3, length=16)
  examples = held_out(rows, tokenizer, config)
  assert [e.prompt_length for e in examples] == [3, 4, 5]
  assert "left out 1 of 4 rows" in caplog.text


def test_held_out_batches_hold_each_row_once():
  tokenizer = byte_tokenizer()
  config = DataConfig(tasks=("gsm8k", "squad"), rows=2, length=128)
  rows = {
    "gsm8k": [Row("p" * n, " a", "") for n in (90, 5, 4)],
    "squad": [Row("q", " b", "")],
  }
  first, second = held_out_batches(rows, tokenizer, config)
  assert first["tokens"].shape == (2, 2, 64)
  assert second["tokens"].shape == (2, 2, 128)
  assert first["rows"][0].tolist() == [2, 1]
  assert second["rows"][0, 0] == 0
  # Where a task has fewer rows, there is nothing to predict.
  for empty in (first["loss_mask"][1, 1:], second["loss_mask"][1]):
    assert not empty.any()
  targets = first["loss_mask"].sum() + second["loss_mask"].sum()
  assert targets == 4 * len([*b" a", "end"])
