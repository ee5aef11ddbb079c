"""Training all experts of a run at once, on one pass over the frozen base.

The step is written for one expert and vmapped over the expert axis: the base is
not batched, so its matrix products run once over [E, B, T] activations, while
adapters, loss, clipping and optimizer state stay each expert's own. Only
adapters are differentiated; the base has neither gradient nor optimizer state
by construction.

Axis letters: E experts, B rows an expert, T length, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from tokenlora_jax.config import Config, OptimConfig
from tokenlora_jax.mixing.rules import Exact
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Lora, expert_keys, init_stacked
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
    batch: numpy arrays [E, B, T], of the experts and rows that this process
      holds, as `sharding.process_block` says.
    mesh: the mesh.

  Returns:
    Arrays of all experts and rows.
  """
  sharding = NamedSharding(mesh, BATCH_SPEC)
  names = ("tokens", "positions", "segment_ids", "loss_mask")
  return {
    name: jax.make_array_from_process_local_data(sharding, batch[name])
    for name in names
  }
