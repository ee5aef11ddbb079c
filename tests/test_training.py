"""The training step: what it changes, and what must not change it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from tiny import (
  FOUR,
  SHAPE,
  TWO,
  assert_identical,
  first_batches,
  leaves,
  make_base,
  make_batches,
  make_config,
  make_step,
  one_device,
  random_state,
  run_steps,
)

from tokenlora_jax.config import InputError, OptimConfig
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Lora
from tokenlora_jax.training import loop
from tokenlora_jax.training import step as training
from tokenlora_jax.training.loop import held_out_losses, trained_adapters
from tokenlora_jax.training.step import expert_losses, make_optimizer, put_batch


@pytest.fixture(scope="module")
def mesh():
  return one_device()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_is_the_schedules(schedule, warmup):
  config = OptimConfig(10, 0.5, warmup, schedule, clip=0)
  optimizer = make_optimizer(config)
  opt = optimizer.init(jnp.zeros(()))
  rates = []
  for _ in range(10):
    # Adam's first-order step under a constant gradient is 1.
    update, opt = optimizer.update(jnp.ones(()), opt, jnp.zeros(()))
    rates.append(-float(update))
  for i, rate in enumerate(rates):
    part = (i - warmup) / (10 - warmup)
    want = 0.5 * i / warmup if i < warmup else 0.5
    if schedule == "cosine" and i >= warmup:
      want = 0.25 * (1 + np.cos(np.pi * part))
    assert rate == pytest.approx(want, rel=1e-4, abs=1e-6)


# -----------------------------------------------------------------------------
# The state and the base.


def test_only_adapters_have_optimizer_state(mesh):
  config = make_config(FOUR)
  state = training.init_state(config, make_base(), mesh)
  weights = {
    f"{name}.{half}": getattr(lora, half).shape
    for name, lora in state.loras.items()
    for half in "ab"
  }
  assert weights == {
    "q.a": (4, 2, 4, 32),
    "q.b": (4, 2, 4, 32),
    "v.a": (4, 2, 4, 32),
    "v.b": (4, 2, 4, 16),
  }
  sizes = {name: x.shape for name, x in leaves(state.opt).items()}
  counts = [name for name, shape in sizes.items() if shape == (4,)]
  assert len(counts) == 2
  assert all(name.endswith(".count") for name in counts)
  # The rest are the two moments of each adapter's weights, and nothing else.
  moments = [shape for shape in sizes.values() if shape != (4,)]
  assert sorted(moments) == sorted(2 * list(weights.values()))
  assert state.step == 0


def test_a_step_leaves_the_base_alone_and_counts(mesh):
  config = make_config()
  before = jax.tree.map(np.array, make_base())
  start = leaves(random_state(config, make_base(), mesh))
  batches = first_batches(config, 3)
  state, losses, _ = run_steps(config, make_base(), mesh, batches)
  assert_identical(make_base(), before)
  assert state.step == 3
  for name, leaf in leaves(state).items():
    if name.endswith(".count"):
      assert leaf.tolist() == [3, 3]
    elif name.endswith(".scaling"):
      assert (leaf == 2.0).all()
    else:
      assert (leaf != start[name]).any(), name
  assert losses.shape == (3, 2)


def test_trained_adapters_are_the_states(mesh):
  config = make_config()
  state = random_state(config, make_base(), mesh)
  adapters = trained_adapters(config, state)
  assert adapters.names == TWO
  for i, layer in enumerate(adapters.layers):
    assert_identical(layer, jax.tree.map(lambda x, i=i: x[:, i], state.loras))


# -----------------------------------------------------------------------------
# Experts do not meet.


def test_four_experts_in_one_run_equal_four_runs_of_one(mesh):
  # Rows of the last expert are long, so that all are padded to 128; alone, the
  # others are padded to 64. Dropout is on.
  def losses_of(tasks):
    config = make_config(
      tasks, rows=2, dropout=0.3, targets=("q",), remat="none"
    )
    config = dataclasses.replace(
      config, data=dataclasses.replace(config.data, length=128)
    )
    batches = first_batches(config, 2)
    if "squad" in tasks:
      long = first_batches(config, 2, longest=80)
      for batch, other in zip(batches, long, strict=True):
        shape = other["tokens"].shape
        for name, x in batch.items():
          if name not in ("rows", "sizes"):
            grown = np.zeros(shape, x.dtype)
            grown[..., : x.shape[2]] = x
            grown[-1] = other[name][-1]
            batch[name] = grown
    state = training.init_state(config, make_base(), mesh)
    state, losses, _ = run_steps(config, make_base(), mesh, batches, state)
    return batches[0]["tokens"].shape, losses, state.loras

  shape, together, loras = losses_of(FOUR)
  assert shape == (4, 2, 128)
  for i, task in enumerate(FOUR):
    shape, alone, own = losses_of((task,))
    assert shape == (1, 2, 128 if task == "squad" else 64)
    np.testing.assert_allclose(together[:, i], alone[:, 0], atol=1e-5)
    for name, lora in own.items():
      np.testing.assert_allclose(loras[name].b[i], lora.b[0], atol=1e-5)


def test_an_experts_step_does_not_see_the_others_rows(mesh):
  config = make_config()
  [batch] = first_batches(config, 1)
  other = {name: x.copy() for name, x in batch.items()}
  other["tokens"][1] = (other["tokens"][1] + 7) % SHAPE.vocab
  other["loss_mask"][1] = 1
  # Warm-up begins at 0, so the second step is the first to move weights.
  one, losses, norms = run_steps(config, make_base(), mesh, [batch, batch])
  two, other_losses, other_norms = run_steps(
    config, make_base(), mesh, [other, other]
  )
  expert = [jax.tree.map(lambda x, i=i: x[i], one.loras) for i in (0, 1)]
  expert_two = [jax.tree.map(lambda x, i=i: x[i], two.loras) for i in (0, 1)]
  assert_identical(expert[0], expert_two[0])
  assert (losses[:, 0] == other_losses[:, 0]).all()
  assert (norms[:, 0] == other_norms[:, 0]).all()
  assert (losses[:, 1] != other_losses[:, 1]).all()
  assert (expert[1]["q"].b != expert_two[1]["q"].b).any()


def test_each_experts_gradient_is_clipped_by_its_own_norm(mesh):
  # Without momentum's normalisation a clipped gradient could not be seen in
  # the weights, so look at the first moment: 0.1 times the clipped gradient.
  config = make_config()
  batches = first_batches(config, 1)
  batches[0]["loss_mask"][1] = 0
  batches[0]["loss_mask"][1, 0, 2] = 1  # One target: a large gradient.
  state, _, norms = run_steps(config, make_base(), mesh, batches)
  mu = next(
    s.mu for s in jax.tree.leaves(state.opt, is_leaf=is_adam) if is_adam(s)
  )
  clipped = [
    10 * float(optax.global_norm(jax.tree.map(lambda x, i=i: x[i], mu)))
    for i in (0, 1)
  ]
  assert norms.max() > 1.0
  assert norms[0, 0] != norms[0, 1]
  np.testing.assert_allclose(clipped, np.minimum(norms[0], 1.0), rtol=1e-5)


def is_adam(x) -> bool:
  return isinstance(x, optax.ScaleByAdamState)


# -----------------------------------------------------------------------------
# The loss.


@pytest.fixture(scope="module")
def one(mesh):
  """One expert's weights and rows, and a jitted `expert_losses`."""
  config = make_config()
  state = random_state(config, make_base(), mesh)
  [batch] = first_batches(config, 1)
  loras = jax.tree.map(lambda x: x[0], state.loras)
  names = batch.keys() - {"rows", "sizes"}
  rows = {name: batch[name][0] for name in names}
  function = jax.jit(expert_losses, static_argnames=("dropout", "remat"))
  return types.SimpleNamespace(loras=loras, rows=rows, losses=function)


def row_keys(one, key):
  return jax.random.split(key, len(one.rows["tokens"]))


def test_losses_are_those_of_the_answers_tokens(one):
  losses, mask = one.losses(make_base(), one.loras, one.rows)
  row = {name: x[0] for name, x in one.rows.items()}
  length = int(row["segment_ids"].sum())
  # The row alone, without padding, every token a target.
  alone = {name: x[None, :length] for name, x in row.items()}
  alone["loss_mask"] = np.ones((1, length), np.float32)
  all_losses, all_mask = one.losses(make_base(), one.loras, alone)
  assert all_mask[0].tolist() == [1] * (length - 1) + [0]
  answer = np.flatnonzero(row["loss_mask"])
  assert answer[-1] == length - 1, "the end token is a target"
  want = np.zeros(row["tokens"].shape)
  want[answer - 1] = all_losses[0, answer - 1]
  np.testing.assert_allclose(losses[0], want, atol=1e-5)
  assert np.flatnonzero(mask[0]).tolist() == (answer - 1).tolist()
  assert (losses[0, answer - 1] > 0).all()


def test_padding_changes_nothing(one):
  losses, mask = one.losses(make_base(), one.loras, one.rows)
  garbage = dict(one.rows)
  padding = one.rows["segment_ids"] == 0
  assert padding.any()
  garbage["tokens"] = np.where(padding, 17, one.rows["tokens"])
  again, mask_again = one.losses(make_base(), one.loras, garbage)
  np.testing.assert_array_equal(losses, again)
  np.testing.assert_array_equal(mask, mask_again)


def test_the_first_token_of_a_packed_segment_is_no_target(one):
  rows = {name: x[:1].copy() for name, x in one.rows.items()}
  size = rows["tokens"].shape[1]
  rows["segment_ids"][0] = np.arange(size) // (size // 2) + 1
  rows["loss_mask"][:] = 1
  _, mask = one.losses(make_base(), one.loras, rows)
  assert np.flatnonzero(mask[0] == 0).tolist() == [size // 2 - 1, size - 1]


def test_the_loss_is_the_mean_over_an_experts_target_tokens(mesh, one):
  config = make_config()
  [batch] = first_batches(config, 1)
  state = random_state(config, make_base(), mesh)
  want, counts, means = [], [], []
  for i in range(2):
    losses, mask = one.losses(
      make_base(),
      jax.tree.map(lambda x, i=i: x[i], state.loras),
      {name: x[i] for name, x in batch.items() if name != "rows"},
    )
    counts.append(mask.sum())
    want.append(losses.sum() / mask.sum())
    means.append((losses.sum(1) / mask.sum(1)).mean())
  assert np.abs(np.subtract(want, means)).min() > 1e-3, "rows differ in length"
  step = make_step(config, mesh)
  _, metrics = step(state, make_base(), put_batch(batch, mesh))
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
  assert metrics["targets"].tolist() == counts


def test_an_expert_without_targets_stands_still(mesh):
  config = make_config()
  [batch] = first_batches(config, 1)
  batch["loss_mask"][1] = 0
  start = random_state(config, make_base(), mesh)
  before = jax.device_get(start.loras)
  state, losses, norms = run_steps(
    config, make_base(), mesh, [batch] * 3, start
  )
  assert losses[:, 1].tolist() == norms[:, 1].tolist() == [0, 0, 0]
  for name, lora in state.loras.items():
    np.testing.assert_array_equal(lora.b[1], before[name].b[1])
    assert (lora.b[0] != before[name].b[0]).any()


def test_held_out_losses_are_means_over_all_batches(mesh, one):
  config = make_config()
  batches = first_batches(config, 2)
  batches[1]["loss_mask"][0] = 0  # An expert whose rows are used up.
  state = random_state(config, make_base(), mesh)
  got = held_out_losses(
    config, state, make_base(), [put_batch(b, mesh) for b in batches]
  )
  for i, task in enumerate(TWO):
    losses = targets = 0
    for batch in batches:
      loss, mask = one.losses(
        make_base(),
        jax.tree.map(lambda x, i=i: x[i], state.loras),
        {name: x[i] for name, x in batch.items() if name != "rows"},
      )
      losses, targets = losses + loss.sum(), targets + mask.sum()
    assert got[task] == pytest.approx(float(losses / targets), rel=1e-5)


def test_an_expert_without_held_out_targets_is_named(mesh):
  config = make_config()
  (batch,) = first_batches(config, 1)
  batch["loss_mask"][1] = 0
  state = random_state(config, make_base(), mesh)
  with pytest.raises(InputError, match=rf"held-out rows of {TWO[1]} have no"):
    held_out_losses(config, state, make_base(), [put_batch(batch, mesh)])


def test_a_held_out_loss_that_is_no_number_stops_the_run(
  mesh, tmp_path, monkeypatch
):
  config = make_config(steps=2, eval_every=1, save_every=1, keep=2)
  losses = {TWO[0]: 1.0, TWO[1]: float("nan")}
  monkeypatch.setattr(loop, "held_out_losses", lambda *_: losses)
  batches = make_batches(config)
  console = Console(quiet=True)
  told = rf"step 1: the held-out loss of {TWO[1]} is nan"
  with pytest.raises(FloatingPointError, match=told):
    loop.train(config, make_base(), mesh, batches, [], tmp_path, console)
  # Nothing that may be broken is saved.
  assert list((tmp_path / "checkpoints").iterdir()) == []


# -----------------------------------------------------------------------------
# What must not change the result, and what must.


def test_remat_changes_no_loss_and_no_gradient(one):
  def total(weights, remat):
    loras = {
      name: Lora(*weights[name], lora.scaling)
      for name, lora in one.loras.items()
    }
    return one.losses(
      make_base(), loras, one.rows, row_keys(one, jax.random.key(0)), 0.2, remat
    )[0].sum()

  weights = {name: (lora.a, lora.b) for name, lora in one.loras.items()}
  want = jax.jit(jax.value_and_grad(total), static_argnums=1)(weights, "none")
  for remat in ("elementwise", "full"):
    got = jax.jit(jax.value_and_grad(total), static_argnums=1)(weights, remat)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_base_trains_float32_adapters(mesh):
  config = make_config()
  batches = first_batches(config, 4)
  state, losses, _ = run_steps(config, make_base("bfloat16"), mesh, batches)
  _, wide, _ = run_steps(config, make_base(), mesh, batches)
  assert {x.dtype for x in jax.tree.leaves(state.loras)} == {
    jnp.dtype("float32")
  }
  np.testing.assert_allclose(losses, wide, atol=0.05)
  assert (losses != wide).all()


def test_dropout_depends_on_seed_step_and_expert_alone(one):
  def losses(key, dropout=0.3):
    keys = None if key is None else row_keys(one, key)
    return one.losses(make_base(), one.loras, one.rows, keys, dropout)[0]

  key = jax.random.key(3)
  first = losses(key)
  np.testing.assert_array_equal(first, losses(key))
  targets = np.asarray(first) > 0
  for other in (losses(jax.random.key(4)), losses(key, 0.0)):
    assert (first != other)[targets].all()
  np.testing.assert_array_equal(losses(key, 0.0), losses(None, 0.0))


def test_dropout_zeroes_its_share_and_scales_the_rest(one, monkeypatch):
  seen = {}

  def read(self, tokens, positions, mask, *, adapt, keys, loras, **_):
    width = loras["q"].a.shape[-1]
    # An adapter that hands its inputs on.
    lora = Lora(jnp.eye(width)[None], jnp.eye(width)[None], jnp.ones(1))
    x = jnp.ones((*tokens.shape, width))
    seen["x"] = np.asarray(adapt(lora, x, keys))
    return x, None

  monkeypatch.setattr(Llama, "__call__", read)
  monkeypatch.setattr(training, "token_losses", lambda *a: jnp.zeros(()))

  def inputs(rows):
    keys = row_keys(one, jax.random.key(0))
    expert_losses(make_base(), one.loras, rows, keys, 0.25)
    return seen["x"]

  x = inputs(one.rows)
  assert sorted(np.unique(x).tolist()) == pytest.approx([0, 4 / 3])
  assert (x == 0).mean() == pytest.approx(0.25, abs=0.03)
  assert (x[0] != x[1]).any()
  # Padding that other experts' rows ask for must not change what is dropped.
  short = {name: rows[:, :10] for name, rows in one.rows.items()}
  np.testing.assert_array_equal(inputs(short), x[:, :10])


def test_the_steps_dropout_is_the_seeds_and_the_steps(mesh):
  fixed = make_config(("squad",), targets=("q",), remat="none")
  [batch] = first_batches(fixed, 1)

  def first_losses(seed, steps_done):
    config = dataclasses.replace(
      fixed, seed=seed, lora=dataclasses.replace(fixed.lora, dropout=0.3)
    )
    state = random_state(fixed, make_base(), mesh)
    state = dataclasses.replace(state, step=jnp.int32(steps_done))
    step = make_step(config, mesh)
    return step(state, make_base(), put_batch(batch, mesh))[1]["loss"]

  first = first_losses(0, 0)
  np.testing.assert_array_equal(first, first_losses(0, 0))
  assert (first != first_losses(0, 1)).all()
  assert (first != first_losses(1, 0)).all()
