"""Training all experts of a run at once, on one pass over the frozen base.

The step is written for one expert and vmapped over the expert axis: the base is
not batched, so its matrix products run once over [E, B, T] activations, while
adapters, loss, clipping and optimizer state stay each expert's own. Only
adapters are differentiated; the base has neither gradient nor optimizer state
by construction.

Axis letters: E experts, B rows an expert, T length, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from rich.console import Console

from tokenlora_jax.checkpoint import Checkpoints
from tokenlora_jax.config import Config, OptimConfig
from tokenlora_jax.metrics import RunLog
from tokenlora_jax.mixing.rules import Exact
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import (
  Adapters,
  Lora,
  expert_keys,
  init_stacked,
)
from tokenlora_jax.model.loss import token_losses
from tokenlora_jax.sharding import BATCH_SPEC, tree_shardings

# {tokens, positions, segment_ids, loss_mask}, each [E, B, T].
Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training changes.

  Attributes:
    step: int32, optimizer steps done.
    loras: {projection: Lora}, float32[E, L, ...].
    opt: the optimizer's state, a leading E everywhere.
  """

  step: jax.Array
  loras: dict[str, Lora]
  opt: Any


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Returns AdamW with warm-up, schedule and clipping, for one expert.

  Example:
    >>> make_optimizer(OptimConfig()).init({"a": jnp.zeros(2)})[0]
    EmptyState()
  """
  rest = config.steps - config.warmup_steps
  after = (
    optax.cosine_decay_schedule(config.learning_rate, max(rest, 1))
    if config.schedule == "cosine"
    else optax.constant_schedule(config.learning_rate)
  )
  warmup = optax.linear_schedule(
    0.0, config.learning_rate, max(config.warmup_steps, 1)
  )
  schedule = optax.join_schedules([warmup, after], [config.warmup_steps])
  clip = (
    optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
  )
  adamw = optax.adamw(schedule, weight_decay=config.weight_decay)
  return optax.chain(clip, adamw)


def _weights(loras):
  """The part of adapters that is trained: no scaling."""
  return {name: {"a": lora.a, "b": lora.b} for name, lora in loras.items()}


def init_state(config: Config, base: Llama, mesh: Mesh) -> TrainState:
  """Returns the state before the first step, laid out on the mesh."""

  def init(key):
    loras = init_stacked(key, base.config, config.lora, config.data.tasks)
    opt = jax.vmap(make_optimizer(config.optim).init)(_weights(loras))
    return TrainState(jnp.int32(0), loras, opt)

  key = jax.random.key(config.seed)
  shardings = tree_shardings(jax.eval_shape(init, key), mesh)
  return jax.jit(init, out_shardings=shardings)(key)


def expert_losses(
  base: Llama,
  loras: Mapping[str, Lora],
  batch: Batch,
  key: jax.Array | None = None,
  dropout: float = 0.0,
  remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
  """Losses of one expert's rows under its own adapter.

  Args:
    base: with stacked layers.
    loras: leaves [L, ...], without an expert axis.
    batch: arrays [B, T].
    key: of the dropout; none is no dropout.
    dropout: share of the adapters' inputs that is zeroed.
    remat: what the backward pass recomputes.

  Returns:
    (float32[B, T], the loss in nats of predicting token t + 1 at t, 0 where
    there is no target; float32[B, T], 1 where there is one).
  """
  loras = jax.tree.map(lambda x: x[:, None], loras)
  tokens, segments = batch["tokens"], batch["segment_ids"]
  one = jnp.ones((tokens.shape[0], 1))
  rule = Exact()

  def adapt(lora, x, key):
    if key is not None and dropout:
      # A key a row: what is dropped must not depend on how long the batch is
      # padded, which other experts' rows decide.
      keep = jax.vmap(
        lambda key: jax.random.bernoulli(key, 1 - dropout, x.shape[1:])
      )(jax.random.split(key, x.shape[0]))
      x = jnp.where(keep, x / (1 - dropout), 0).astype(x.dtype)
    return rule(lora, x, one)

  hidden, _ = base(
    tokens,
    batch["positions"],
    causal_mask(segments),
    loras=loras,
    adapt=adapt,
    key=key,
    remat=remat,
  )
  targets = jnp.roll(tokens, -1, axis=1)
  same = segments == jnp.roll(segments, -1, axis=1)
  mask = jnp.roll(batch["loss_mask"], -1, axis=1) * same
  mask = mask.at[:, -1].set(0)
  return token_losses(base, hidden, targets) * mask, mask


def make_step(config: Config, mesh: Mesh):
  """Returns the jitted training step.

  Returns:
    step(state, base, batch) -> (state, metrics): `state` is donated, and
    metrics are float32[E] each: `loss`, nats a target token; `gradient_norm`,
    before clipping; `targets`, target tokens.
  """
  optimizer = make_optimizer(config.optim)

  def one_expert(loras, opt, batch, key, base):
    def loss_of(weights):
      adapted = {
        name: Lora(w["a"], w["b"], loras[name].scaling)
        for name, w in weights.items()
      }
      losses, mask = expert_losses(
        base, adapted, batch, key, config.lora.dropout, config.remat
      )
      targets = mask.sum()
      return losses.sum() / jnp.maximum(targets, 1), targets

    weights = _weights(loras)
    (loss, targets), gradients = jax.value_and_grad(loss_of, has_aux=True)(
      weights
    )
    with jax.named_scope("optimizer"):
      updates, opt = optimizer.update(gradients, opt, weights)
      weights = optax.apply_updates(weights, updates)
    loras = {
      name: Lora(w["a"], w["b"], loras[name].scaling)
      for name, w in weights.items()
    }
    norm = optax.global_norm(gradients)
    return loras, opt, dict(loss=loss, gradient_norm=norm, targets=targets)

  def step(state, base, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step + 1)
    loras, opt, metrics = jax.vmap(
      one_expert, in_axes=(0, 0, 0, 0, None), spmd_axis_name="expert"
    )(state.loras, state.opt, batch, expert_keys(key, config.data.tasks), base)
    state = TrainState(state.step + 1, loras, opt)
    # Laid out as it came, so that its memory is used again and nothing moves.
    layout = tree_shardings(state, mesh)
    return jax.lax.with_sharding_constraint(state, layout), metrics

  # Every process reads the metrics of all experts.
  everywhere = NamedSharding(mesh, P())
  return jax.jit(step, donate_argnums=0, out_shardings=(None, everywhere))


@jax.jit
def held_out_sums(loras, base, batch):
  """Sums of each expert's losses on its own rows: (float32[E], float32[E])."""

  def one(loras, batch):
    losses, mask = expert_losses(base, loras, batch)
    return losses.sum(), mask.sum()

  return jax.vmap(one, spmd_axis_name="expert")(loras, batch)


def put_batch(batch, mesh: Mesh) -> Batch:
  """Puts a batch on the mesh.

  Args:
    batch: numpy arrays [E, B, T]. Every process has the whole batch, since it
      may hold any of its experts and rows; a device gets its own part.
    mesh: the mesh.
  """
  sharding = NamedSharding(mesh, BATCH_SPEC)

  def put(array):
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  names = ("tokens", "positions", "segment_ids", "loss_mask")
  return {name: put(batch[name]) for name in names}


def trained_adapters(config: Config, state: TrainState) -> Adapters:
  """Returns the bank that the state holds, in the decoding layout, on host."""
  return Adapters.unstack(config.data.tasks, _on_host(state.loras))


def _on_host(tree):
  """Returns a tree as numpy arrays, whole in every process."""
  return multihost_utils.process_allgather(tree, tiled=True)


def held_out_losses(
  config: Config, state: TrainState, base: Llama, batches: Sequence[Mapping]
) -> dict[str, float]:
  """Returns each expert's loss on its own held-out rows, nats a target token.

  Args:
    config: names the experts.
    state: its adapters are used.
    base: with stacked layers.
    batches: on the mesh; rows of padding have no targets.
  """
  losses = targets = 0.0
  for batch in batches:
    more = _on_host(held_out_sums(state.loras, base, batch))
    losses, targets = losses + more[0], targets + more[1]
  return dict(zip(config.data.tasks, (losses / targets).tolist(), strict=True))


def train(
  config: Config,
  base: Llama,
  mesh: Mesh,
  batches: Iterable[Mapping],
  held_out: Sequence[Mapping],
  workdir: Path,
  console: Console,
) -> TrainState:
  """Trains the adapters, going on from the newest checkpoint if there is one.

  Args:
    config: of the run.
    base: with stacked layers, on the mesh.
    mesh: the devices.
    batches: a Grain data set; element i is the batch of step i.
    held_out: batches on the mesh, for the held-out losses.
    workdir: gets checkpoints and logs.
    console: where progress is shown.

  Returns:
    The state after `config.optim.steps` steps.

  Raises:
    FloatingPointError: a loss or gradient is not finite; names step, expert and
      rows. The checkpoints before it stay as they are.
    KeyboardInterrupt: with Ctrl-C; says where the same command goes on.
  """
  checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
  data = iter(batches)
  state = init_state(config, base, mesh)
  restored = checkpoints.restore(state, mesh)
  if restored is not None:
    # The newest checkpoint holds the state and where in the data it stood.
    state, data_state = restored
    data.set_state(data_state)
  first = int(state.step)
  step_function = make_step(config, mesh)
  log = None
  if jax.process_index() == 0:
    if restored is not None:
      console.print(f"going on from step {first} of {config.optim.steps}")
    log = RunLog(
      workdir,
      config.data.tasks,
      config.optim.steps,
      first,
      base.config.matmul_parameters,
      console,
    )
  try:
    for step in range(first + 1, config.optim.steps + 1):
      batch = next(data)
      state, metrics = step_function(state, base, put_batch(batch, mesh))
      metrics = jax.device_get(metrics)
      _check_finite(step, config.data.tasks, metrics, batch)
      if log:
        log.step(step, metrics, batch)
      last = step == config.optim.steps
      if last or step % config.save_every == 0:
        checkpoints.save(step, state, data.get_state())
      if last or (config.eval_every and step % config.eval_every == 0):
        losses = held_out_losses(config, state, base, held_out)
        if log:
          log.held_out(step, losses)
  except KeyboardInterrupt:
    newest = checkpoints.newest() or 0
    raise KeyboardInterrupt(
      f"stopped; the same command goes on from step {newest}"
    ) from None
  finally:
    if log:
      log.close()
    checkpoints.close()
  return state


def _check_finite(step, experts, metrics, batch):
  # An infinite gradient leaves weights that are not numbers, and must be seen
  # before they are saved.
  for name in ("loss", "gradient_norm"):
    for i, value in enumerate(metrics[name]):
      if not np.isfinite(value):
        raise FloatingPointError(
          f"step {step}: the {name.replace('_', ' ')} of {experts[i]} is"
          f" {value} on rows {batch['rows'][i].tolist()}"
        )
