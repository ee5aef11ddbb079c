"""The training step: all experts at once, in one pass over the frozen base.

The step is written for one expert and vmapped over the expert axis. The base is
not batched, so its matrix products run once over [E, B, T] activations; each
expert has its own adapters, loss, clipping and optimizer state. Only adapters
are differentiated, so the base has neither gradient nor optimizer state.

Losses and gradients run under `shard_map`: a device holds its experts, its rows
and its shard of every weight. It gathers the rest of a layer's weights when it
reaches that layer, forward and backward; at the end the gradients are summed
over an expert's devices. Nothing else is sent.

Axis letters: E experts, B rows an expert, T length, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Num
import numpy as np
import optax

from tokenlora_jax.config import Config, OptimConfig
from tokenlora_jax.mixing.mixture import Mixture
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.config import LlamaConfig
from tokenlora_jax.model.fused_attention import XLA, Kernel, choose_kernel
from tokenlora_jax.model.llama import Gather, Llama
from tokenlora_jax.model.lora import Lora, expert_keys, init_stacked
from tokenlora_jax.model.loss import token_losses
from tokenlora_jax.parallel.sharding import (
  BATCH_SPEC,
  MANUAL_AXES,
  described,
  manual_specs,
  tree_shardings,
  whole,
  whole_ends,
)

# The arrays of a batch that the step reads, each [E, B, T].
BATCH_TYPES = {
  "tokens": jnp.int32,
  "positions": jnp.int32,
  "segment_ids": jnp.int32,
  "loss_mask": jnp.float32,
}
Batch = Mapping[str, Num[Array | np.ndarray, "*E B T"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that each training step updates.

  Attributes:
    step: int32, optimizer steps done.
    loras: {projection: Lora}, float32[E, L, ...].
    opt: the optimizer's state, a leading E everywhere.
  """

  step: Int[Array, ""]
  loras: dict[str, Lora]
  opt: optax.OptState


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Returns AdamW with warm-up, schedule and clipping, for one expert.

  Args:
    config: learning rate, schedule, steps, weight decay and clipping.

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
  """Returns the trained arrays of adapters: a and b, not the scaling."""
  return {name: {"a": lora.a, "b": lora.b} for name, lora in loras.items()}


def _with_weights(loras, weights):
  """Returns adapters with these weights and the same scaling."""
  return {
    name: Lora(w["a"], w["b"], loras[name].scaling)
    for name, w in weights.items()
  }


def init_state(config: Config, base: Llama, mesh: Mesh) -> TrainState:
  """Returns the state before the first step, laid out on the mesh.

  Args:
    config: of the run; its seed and experts' names decide the numbers.
    base: gives the adapters' shapes.
    mesh: the devices.
  """
  init = functools.partial(_init, config, base.config)
  key = jax.random.key(config.seed)
  shardings = tree_shardings(jax.eval_shape(init, key), mesh)
  return jax.jit(init, out_shardings=shardings)(key)


def describe_state(
  config: Config, shape: LlamaConfig, mesh: Mesh
) -> TrainState:
  """Returns the state's shapes and shardings, without arrays.

  Args:
    config: of the run.
    shape: of the base.
    mesh: the devices.

  Returns:
    A state of `jax.ShapeDtypeStruct`.
  """
  init = functools.partial(_init, config, shape)
  return described(jax.eval_shape(init, jax.random.key(0)), mesh)


def _init(config, shape, key):
  loras = init_stacked(key, shape, config.lora, config.data.tasks)
  opt = jax.vmap(make_optimizer(config.optim).init)(_weights(loras))
  return TrainState(jnp.int32(0), loras, opt)


def expert_losses(
  base: Llama,
  loras: Mapping[str, Lora],
  batch: Batch,
  keys: Key[Array, " B"] | None = None,
  dropout: float = 0.0,
  remat: str = "none",
  kernel: Kernel = XLA,
  gather: Gather | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Returns the losses of one expert's rows under its own adapter.

  Args:
    base: with stacked layers.
    loras: leaves [L, ...], without an expert axis.
    batch: arrays [B, T].
    keys: PRNG keys [B], one for each row's dropout; none is no dropout.
    dropout: share of the adapters' inputs that is zeroed.
    remat: the activations that the backward pass recomputes.
    kernel: the attention implementation.
    gather: gathers a layer's sharded weights and adapters.

  Returns:
    (losses, mask): float32[B, T], the loss in nats of predicting token t + 1 at
    t, 0 where there is no target; float32[B, T], 1 where there is one.
  """
  loras = jax.tree.map(lambda x: x[:, None], loras)
  tokens, segments = batch["tokens"], batch["segment_ids"]
  mixture = Mixture(get_rule("exact"), jnp.ones((tokens.shape[0], 1)))

  def adapt(lora, x, keys):
    if keys is not None and dropout:
      # One key per row: dropout must depend neither on the device that holds
      # the row nor on the other experts' rows.
      keep = jax.vmap(
        lambda key: jax.random.bernoulli(key, 1 - dropout, x.shape[1:])
      )(keys)
      x = jnp.where(keep, x / (1 - dropout), 0).astype(x.dtype)
    return mixture(lora, x)

  hidden, _ = base(
    tokens,
    batch["positions"],
    kernel.mask(segments),
    loras=loras,
    adapt=adapt,
    keys=keys,
    remat=remat,
    attend=kernel.attend,
    gather=gather,
  )
  targets = jnp.roll(tokens, -1, axis=1)
  mask = target_mask(batch)
  return token_losses(base, hidden, targets) * mask, mask


def target_mask(
  batch: Mapping[str, Num[Array | np.ndarray, "*B T"]],
) -> Float[Array, "*B T"]:
  """Returns the mask of positions whose next token is a target.

  Args:
    batch: `segment_ids` and `loss_mask` [..., T].

  Returns:
    float32[..., T] of 0 and 1; the last position has no next token.

  Example:
    >>> batch = {"segment_ids": jnp.array([1, 1, 2, 2]),
    ...          "loss_mask": jnp.array([0.0, 1.0, 1.0, 1.0])}
    >>> target_mask(batch).tolist()
    [1.0, 0.0, 1.0, 0.0]
  """
  segments = batch["segment_ids"]
  same = segments == jnp.roll(segments, -1, axis=-1)
  mask = jnp.roll(batch["loss_mask"], -1, axis=-1) * same
  return mask.at[..., -1].set(0)


def _gather_layer(parts):
  layer, loras = parts
  return whole(layer, "layers."), whole(loras)


# The shardings of the arguments under `shard_map` other than weights.
_PER_ROW = P("expert", ("data", "fsdp"))
_PER_EXPERT = P("expert")


def _on_each_device(function, mesh, loras, base, out_specs):
  """Returns `function(loras, base, batch, keys)`, run on each device's shards.

  Embedding, last norm and output map arrive gathered, the layers sharded.
  """

  def local(loras, base, batch, keys):
    return function(loras, whole_ends(base), batch, keys)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      manual_specs(loras, mesh),
      manual_specs(base, mesh),
      _PER_ROW,
      _PER_ROW,
    ),
    out_specs=out_specs,
    axis_names=MANUAL_AXES,
    check_vma=False,
  )


def _gradients(config, mesh, loras, base, batch, keys):
  """Returns the gradients of each expert's mean loss over its target tokens.

  Returns:
    (gradients, shaped as the adapters' weights; losses float32[E]; targets
    float32[E]).
  """
  length = batch["tokens"].shape[-1]
  kernel = choose_kernel(
    mesh, length, base.config, base.dtype, config.data.packing
  )

  def one_expert(loras, batch, keys, targets, base):
    def loss_of(weights, part):
      batch, keys = part
      losses, _ = expert_losses(
        base,
        _with_weights(loras, weights),
        batch,
        keys,
        config.lora.dropout,
        config.remat,
        kernel,
        _gather_layer,
      )
      return losses.sum() / jnp.maximum(targets, 1)

    loss_and_gradients = jax.value_and_grad(loss_of)
    weights = _weights(loras)
    if config.accumulate == 1:
      return loss_and_gradients(weights, (batch, keys))
    # Microbatches of this device's rows, one after the other.
    parts = jax.tree.map(
      lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), (batch, keys)
    )
    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, weights)

    def add(total, part):
      more = loss_and_gradients(weights, part)
      return jax.tree.map(jnp.add, total, more), None

    return jax.lax.scan(add, zero, parts)[0]

  def local(loras, base, batch, keys):
    targets = target_mask(batch).sum((1, 2))
    targets = jax.lax.psum(targets, ("data", "fsdp"))
    losses, gradients = jax.vmap(one_expert, in_axes=(0, 0, 0, 0, None))(
      loras, batch, keys, targets, base
    )
    # The gather's transpose has already summed gradients over fsdp.
    gradients = jax.lax.psum(gradients, "data")
    return gradients, jax.lax.psum(losses, ("data", "fsdp")), targets

  specs = manual_specs(_weights(loras), mesh), _PER_EXPERT, _PER_EXPERT
  run = _on_each_device(local, mesh, loras, base, specs)
  return run(loras, base, batch, keys)


def make_step(
  config: Config, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, " E"]]]]:
  """Returns the jitted training step.

  Args:
    config: of the run.
    mesh: the devices.

  Returns:
    step(state, base, batch) -> (state, metrics). `state` is donated; `batch`
    has arrays [E, B, T]. The metrics, float32[E] each: `loss`, in nats a target
    token; `gradient_norm`, before clipping; `targets`, the target tokens.
  """
  optimizer = make_optimizer(config.optim)

  @jax.vmap
  def update(weights, opt, gradients):
    updates, opt = optimizer.update(gradients, opt, weights)
    norm = optax.global_norm(gradients)
    return optax.apply_updates(weights, updates), opt, norm

  def step(state, base, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step + 1)
    rows = batch["tokens"].shape[1]
    keys = jax.vmap(lambda key: jax.random.split(key, rows))(
      expert_keys(key, config.data.tasks)
    )
    gradients, losses, targets = _gradients(
      config, mesh, state.loras, base, batch, keys
    )
    with jax.named_scope("optimizer"):
      weights, opt, norms = update(_weights(state.loras), state.opt, gradients)
    loras = _with_weights(state.loras, weights)
    state = TrainState(state.step + 1, loras, opt)
    # Keep the layout of the input, so that donation reuses its memory.
    layout = tree_shardings(state, mesh)
    metrics = dict(loss=losses, gradient_norm=norms, targets=targets)
    return jax.lax.with_sharding_constraint(state, layout), metrics

  # Replicated, since every process reads the metrics of all experts.
  everywhere = NamedSharding(mesh, P())
  return jax.jit(step, donate_argnums=0, out_shardings=(None, everywhere))


def held_out_sums(
  loras: Mapping[str, Lora], base: Llama, batch: Batch
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
  """Returns the sums of each expert's losses and of target tokens.

  Args:
    loras: leaves [E, L, ...].
    base: with stacked layers.
    batch: arrays [E, B, T] on the mesh, not packed.

  Returns:
    (losses, targets): float32[E] in nats, float32[E].
  """
  return _held_out_sums(batch["tokens"].sharding.mesh, loras, base, batch)


@functools.partial(jax.jit, static_argnums=0)
def _held_out_sums(mesh, loras, base, batch):
  length = batch["tokens"].shape[-1]
  # Held-out rows are not packed.
  kernel = choose_kernel(mesh, length, base.config, base.dtype, packed=False)

  def one(loras, batch, base):
    losses, mask = expert_losses(
      base, loras, batch, kernel=kernel, gather=_gather_layer
    )
    return losses.sum(), mask.sum()

  def local(loras, base, batch, _):
    sums = jax.vmap(one, in_axes=(0, 0, None))(loras, batch, base)
    return jax.lax.psum(sums, ("data", "fsdp"))

  specs = _PER_EXPERT, _PER_EXPERT
  run = _on_each_device(local, mesh, loras, base, specs)
  return run(loras, base, batch, None)


def put_batch(batch: Mapping, mesh: Mesh) -> Batch:
  """Puts a batch on the mesh.

  Args:
    batch: numpy arrays [E, B, T] of this process's experts and rows, as
      `sharding.process_block` gives them.
    mesh: the devices.

  Returns:
    Arrays [E, B, T] of all experts and rows.
  """
  sharding = NamedSharding(mesh, BATCH_SPEC)
  return {
    name: jax.make_array_from_process_local_data(sharding, batch[name])
    for name in BATCH_TYPES
  }
