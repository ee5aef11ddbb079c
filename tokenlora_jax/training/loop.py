"""The training loop: steps, checkpoints, held-out losses, clean shutdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
from pathlib import Path
import signal
import threading

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np
from rich.console import Console

from tokenlora_jax.config import Config, InputError
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters
from tokenlora_jax.training.checkpoint import Checkpoints
from tokenlora_jax.training.run_log import RunLog
from tokenlora_jax.training.step import (
  TrainState,
  held_out_sums,
  init_state,
  make_step,
  put_batch,
)


def trained_adapters(config: Config, state: TrainState) -> Adapters:
  """Returns the state's adapters, float32, in the decoding layout, on the host.

  Args:
    config: names the experts.
    state: on the mesh; every process must call this.
  """
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
    state: holds the adapters.
    base: with stacked layers.
    batches: arrays [E, B, T] on the mesh; rows of padding have no targets.

  Returns:
    {expert: loss}.

  Raises:
    InputError: an expert has no held-out target.
  """
  losses = targets = 0.0
  for batch in batches:
    more = _on_host(held_out_sums(state.loras, base, batch))
    losses, targets = losses + more[0], targets + more[1]
  for expert, count in zip(config.data.tasks, targets, strict=True):
    if count == 0:
      raise InputError(
        f"data.eval_rows: the held-out rows of {expert} have no token to"
        " predict; give it rows with answers, or set eval_every to 0"
      )
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
  """Trains the adapters, resuming from the newest checkpoint if there is one.

  Args:
    config: of the run.
    base: with stacked layers, on the mesh.
    mesh: the devices.
    batches: a Grain data set; element i is the batch of step i.
    held_out: batches on the mesh, for the held-out losses.
    workdir: gets checkpoints and logs.
    console: shows progress.

  Returns:
    The state after `config.optim.steps` steps, or after the step at which
    SIGTERM came, which is saved and printed.

  Raises:
    FloatingPointError: a loss or gradient is not finite (names step, expert and
      rows), or a held-out loss is not (names step and expert). Earlier
      checkpoints stay.
    KeyboardInterrupt: on Ctrl-C; names the step from which the same command
      resumes.
    InputError: there are checkpoints, but none is whole; or an expert has no
      held-out target.
  """
  steps = config.optim.steps
  data = iter(batches)
  state = init_state(config, base, mesh)
  with contextlib.ExitStack() as stack:
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
    stack.enter_context(contextlib.closing(checkpoints))
    restored = checkpoints.restore(state, mesh)
    if restored is not None:
      # A checkpoint holds the state and the position in the data.
      state, about = restored
      data.set_state(about["data"])
    first = int(state.step)
    step_function = make_step(config, mesh)
    log = None
    if jax.process_index() == 0:
      if restored is not None:
        console.print(f"resuming from step {first} of {steps}")
      log = RunLog(
        workdir,
        config.data.tasks,
        steps,
        first,
        base.config.matmul_parameters,
        console,
      )
      stack.enter_context(contextlib.closing(log))
    terminated = stack.enter_context(_termination())
    stop = False
    try:
      for step in range(first + 1, steps + 1):
        batch = next(data)
        state, metrics = step_function(state, base, put_batch(batch, mesh))
        metrics = jax.device_get(metrics)
        _check_finite(step, config.data.tasks, metrics, batch)
        if log:
          log.step(step, metrics, batch)
        last = step == steps
        stop = terminated(step) and not last
        if last or (config.eval_every and step % config.eval_every == 0):
          losses = held_out_losses(config, state, base, held_out)
          for expert, loss in losses.items():
            if not np.isfinite(loss):
              raise FloatingPointError(
                f"step {step}: the held-out loss of {expert} is {loss}"
              )
          if log:
            log.held_out(step, losses)
        # Save after logging: a resumed run then logs only later steps.
        if last or stop or step % config.save_every == 0:
          about = {"config": config.to_json(), "data": data.get_state()}
          checkpoints.save(step, state, about)
        if stop:
          break
    except KeyboardInterrupt:
      newest = checkpoints.newest() or 0
      raise KeyboardInterrupt(
        f"stopped; the same command resumes from step {newest}"
      ) from None
  if stop and jax.process_index() == 0:
    console.print(
      f"stopped by SIGTERM; step {step} of {steps} is saved, and the same"
      " command resumes from there",
      soft_wrap=True,
    )
  return state


@contextlib.contextmanager
def _termination() -> Iterator[Callable[[int], bool]]:
  """Yields a function of a step: whether SIGTERM came and all stop after it."""
  if jax.process_count() > 1:
    # JAX handles SIGTERM then, and makes all processes agree on a step.
    yield multihost_utils.reached_preemption_sync_point
    return
  came = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: came.set())
  try:
    yield lambda step: came.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)


def _check_finite(step, experts, metrics, batch):
  # An infinite gradient makes NaN weights; stop before they are saved.
  for name in ("loss", "gradient_norm"):
    for i, value in enumerate(metrics[name]):
      if not np.isfinite(value):
        raise FloatingPointError(
          f"step {step}: the {name.replace('_', ' ')} of {experts[i]} is"
          f" {value} on rows {batch['rows'][i].tolist()}"
        )
