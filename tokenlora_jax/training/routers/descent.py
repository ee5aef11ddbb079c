"""The loop that fits in-layer gates: AdamW on the loss of the target tokens.

The rows of all experts are one batch [E * B, T]. Only the gates' parameters are
differentiated; base and adapters have neither gradient nor optimizer state.
Parameters and adapters are replicated, base and rows sharded as in training;
XLA inserts the transfers.

Axis letters: E experts, B rows an expert, T length, L layers, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key
import numpy as np
import optax
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from tokenlora_jax.config import Config
from tokenlora_jax.mixing.mixture import Mixture, Routed
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import flat_table
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Adapt, Llama
from tokenlora_jax.model.lora import Adapters, Lora
from tokenlora_jax.model.loss import token_losses
from tokenlora_jax.training.routers.registry import Work
from tokenlora_jax.training.step import (
  Batch,
  make_optimizer,
  put_batch,
  target_mask,
)

# The fitted arrays: {projection: {field: float32[L, E, ...]}}.
Params = dict[str, dict[str, Float[Array | np.ndarray, "L E ..."]]]


@dataclasses.dataclass(frozen=True)
class Step:
  """The batch of a step, or a microbatch of it, with base and adapters.

  Attributes:
    config: of the fit.
    base: with stacked layers.
    loras: {projection: Lora}, float32[L, E, ...].
    batch: arrays [E, B, T].
    targets: float32[E], target tokens of the whole step.
    key: a PRNG key.
  """

  config: Config
  base: Llama
  loras: Mapping[str, Lora]
  batch: Batch
  targets: Float[Array, " E"]
  key: Key[Array, ""]

  @property
  def experts(self) -> int:
    """E, the number of experts."""
    return len(self.batch["tokens"])

  @property
  def rows(self) -> Batch:
    """The arrays as [E * B, T]; the rows of an expert are neighbours."""
    return {name: x.reshape(-1, x.shape[-1]) for name, x in self.batch.items()}

  def mixture(
    self, router: Router, gates: Float[Array, "EB E"] | None = None
  ) -> Mixture:
    """Returns the exact mixture under the router's gates times `gates`.

    Args:
      router: decides gates inside the layers.
      gates: float32[E * B, E]; none is 1.
    """
    if gates is None:
      gates = jnp.ones((self.rows["tokens"].shape[0], self.experts))
    return Mixture(get_rule("exact"), gates, router)

  def read(
    self,
    loras: Mapping[str, Lora | Routed] | None = None,
    adapt: Adapt | None = None,
    keys: Key[Array, " EB"] | None = None,
  ) -> Float[Array, "EB T D"]:
    """Returns the last hidden states, [E * B, T, D], in the base's dtype.

    Args:
      loras: the adapters and the parameters of each projection, as `adapt`
        takes them; none is the base alone.
      adapt: computes the term that the adapters add to a projection.
      keys: PRNG keys [E * B], for `adapt`.
    """
    rows = self.rows
    hidden, _ = self.base(
      rows["tokens"],
      rows["positions"],
      # XLA cannot shard a fused kernel by itself.
      causal_mask(rows["segment_ids"]),
      loras=loras,
      adapt=adapt,
      keys=keys,
      remat=self.config.remat,
    )
    return hidden

  def losses(
    self,
    loras: Mapping[str, Lora | Routed],
    adapt: Adapt,
    keys: Key[Array, " EB"] | None = None,
  ) -> Float[Array, " E"]:
    """Returns float32[E], each expert's loss in nats a target token.

    The arguments are those of `read`.
    """
    hidden, rows = self.read(loras, adapt, keys), self.rows
    targets = jnp.roll(rows["tokens"], -1, axis=1)
    losses = token_losses(self.base, hidden, targets) * target_mask(rows)
    return losses.reshape(self.experts, -1).sum(axis=1) / self.targets


# Returns the total loss to minimise, and each expert's loss, float32[E].
Objective = Callable[
  [Params, Step], tuple[Float[Array, ""], Float[Array, " E"]]
]


def zeros(
  adapters: Adapters,
  depth: int,
  shapes: Callable[[int], Mapping[str, tuple[int, ...]]],
) -> Params:
  """Returns zero parameters for every projection that an expert adapts.

  Args:
    adapters: the experts.
    depth: L, of the base.
    shapes: from the input width of a projection to the shape of each of its
      fields, without the leading [L, E].

  Returns:
    {projection: {field: float32[L, E, ...]}}.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> base = load_base("random:tiny")
    >>> adapters = random_adapters(base, experts=2)
    >>> params = zeros(adapters, 2, lambda width: {"bias": ()})
    >>> params["q"]["bias"].shape
    (2, 2)
  """
  widths = {
    name: lora.a.shape[-1]
    for layer in adapters.layers
    for name, lora in layer.items()
  }
  lead = depth, len(adapters.names)
  return {
    name: {
      field: jnp.zeros((*lead, *shape))
      for field, shape in shapes(width).items()
    }
    for name, width in widths.items()
  }


def flat(
  adapters: Adapters, params: Params
) -> dict[str, Float[np.ndarray, "E ..."]]:
  """Returns the fitted arrays of the adapted projections, by flat name.

  Args:
    adapters: the experts.
    params: as `zeros` makes them.

  Returns:
    {"layers.I.PROJECTION.FIELD": float32[E, ...]}.
  """
  table = [
    {name: {k: x[i] for k, x in params[name].items()} for name in layer}
    for i, layer in enumerate(adapters.layers)
  ]
  return flat_table(table)


def descend(
  work: Work,
  name: str,
  params: Params,
  objective: Objective,
  optimizer: optax.GradientTransformation | None = None,
) -> Params:
  """Fits parameters by `config.optim.steps` steps of AdamW.

  Args:
    work: the inputs of the fit.
    name: of the router, for the progress bar.
    params: the initial ones.
    objective: the loss, differentiated with respect to `params`.
    optimizer: by default that of `config.optim`, over all parameters.

  Returns:
    The last parameters, on the host.

  Raises:
    FloatingPointError: a loss or gradient is not finite; names step and rows.
  """
  config, experts = work.config, work.adapters.names
  optimizer = optimizer or make_optimizer(config.optim)
  everywhere = NamedSharding(work.mesh, P())
  stacked = work.adapters.stack(work.base.config.layers)
  loras = jax.tree.map(lambda x: x.swapaxes(0, 1), stacked)
  params, loras = jax.device_put((params, loras), everywhere)
  opt = jax.jit(optimizer.init, out_shardings=everywhere)(params)
  step_function = _make_step(work, objective, optimizer, everywhere)
  steps, data, means = config.optim.steps, iter(work.batches), []
  with _progress(work, name) as progress:
    task = progress.add_task("", total=steps, losses="")
    for step in range(1, steps + 1):
      batch = next(data)
      params, opt, losses, norm = step_function(
        params, opt, work.base, loras, put_batch(batch, work.mesh), step
      )
      losses, norm = jax.device_get((losses, norm))
      _check_finite(step, experts, losses, norm, batch)
      means.append(float(losses.mean()))
      told = " ".join(
        f"{expert} {loss:.3f}"
        for expert, loss in zip(experts, losses, strict=True)
      )
      progress.update(task, completed=step, losses=told)
      shown = step % max(1, steps // 10) == 0 or step in (1, steps)
      if shown and not work.console.is_terminal:
        work.console.print(f"step {step}/{steps}  {told}", soft_wrap=True)
  part = max(1, steps // 10)
  work.console.print(
    f"{name}: {np.mean(means[:part]):.3f} -> {np.mean(means[-part:]):.3f} nats a"
    f" target token, the mean of the experts over {part} steps",
    soft_wrap=True,
  )
  return jax.device_get(params)


def _make_step(work, objective, optimizer, everywhere):
  """Returns the jitted step; it gives (params, opt, losses [E], norm)."""
  config, experts = work.config, len(work.adapters.names)

  @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
  def step(params, opt, base, loras, batch, number):
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    targets = jnp.maximum(target_mask(batch).sum((1, 2)), 1)
    # Microbatches of each expert's rows, one after the other.
    parts = {
      name: x.reshape(experts, config.accumulate, -1, x.shape[-1]).swapaxes(
        0, 1
      )
      for name, x in batch.items()
    }

    def add(total, part):
      def of(params):
        rows, key = part
        step = Step(config, base, loras, rows, targets, key)
        return objective(params, step)

      (_, losses), gradients = jax.value_and_grad(of, has_aux=True)(params)
      return jax.tree.map(jnp.add, total, (gradients, losses)), None

    zero = jax.tree.map(jnp.zeros_like, params), jnp.zeros(experts)
    keys = jax.random.split(key, config.accumulate)
    (gradients, losses), _ = jax.lax.scan(add, zero, (parts, keys))
    updates, opt = optimizer.update(gradients, opt, params)
    norm = optax.global_norm(gradients)
    return optax.apply_updates(params, updates), opt, losses, norm

  return step


def _progress(work, name):
  return Progress(
    TextColumn(f"fit {name}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TextColumn("{task.fields[losses]}"),
    TimeRemainingColumn(compact=True),
    console=work.console,
    disable=not work.console.is_terminal,
  )


def _check_finite(step, experts, losses, norm, batch):
  values = zip(experts, losses, batch["rows"], strict=True)
  for expert, loss, rows in values:
    if not np.isfinite(loss):
      raise FloatingPointError(
        f"step {step}: the loss of {expert} is {loss} on rows {rows.tolist()}"
      )
  if not np.isfinite(norm):
    every = {e: r.tolist() for e, r in zip(experts, batch["rows"], strict=True)}
    raise FloatingPointError(
      f"step {step}: the gradient norm is {norm} on rows {every}"
    )
