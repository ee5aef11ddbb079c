"""Runs train.py: trains a bank, or fits a router to one."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
from pathlib import Path

import jax
from rich.console import Console
from rich.pretty import pprint

from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.bank.edit import save_fitted
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.bank.record import BankRecord, read_record
from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError
from tokenlora_jax.data.batches import batches, held_out_batches
from tokenlora_jax.data.rows import Row, load_rows, sample_rows
from tokenlora_jax.data.tasks import TASKS, get_task
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.encoders import HiddenEncoder
from tokenlora_jax.formats.load import Base
from tokenlora_jax.formats.minilm import load_minilm
from tokenlora_jax.mixing.routers import centroids
from tokenlora_jax.model.fused_attention import choose_kernel
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.parallel.processes import start_processes
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training.loop import train, trained_adapters
from tokenlora_jax.training.routers import Work, get_fit
from tokenlora_jax.training.step import put_batch
from tokenlora_jax.training.workdir import claim_workdir, contents


@dataclasses.dataclass(frozen=True)
class Run:
  """The devices, rows and base of a training run.

  Attributes:
    config: the settings.
    mesh: the devices.
    tokenizer: the base's.
    rows: the training rows of each expert.
    base: with stacked layers, sharded over the mesh.
  """

  config: Config
  mesh: jax.sharding.Mesh
  tokenizer: Tokenizer
  rows: Mapping[str, Sequence[Row]]
  base: Llama

  def batches(self) -> Iterable:
    """Returns the endless batches of training rows, arrays [E, B, T]."""
    return batches(self.rows, self.tokenizer, self.config.data, self.mesh)

  def hidden_encoder(self) -> HiddenEncoder:
    """Returns the encoder that averages the base's hidden states."""
    return HiddenEncoder(self.base, self.tokenizer, self.config.data.length)


def set_up(config: Config, tasks: Mapping[str, str], console: Console) -> Run:
  """Starts the processes, then reads the rows and the base.

  Args:
    config: the settings; `data.tasks` are the experts' names.
    tasks: {expert: the task whose rows it reads}.
    console: silenced in all processes but the first.

  Raises:
    InputError: the base, rows or devices do not fit the settings.
  """
  start_processes(config.mesh)
  console.quiet = jax.process_index() > 0
  cli.keep_programs(config.compilation_cache)
  mesh = make_mesh(config.mesh, config.data.rows // config.accumulate)
  found = Base.open(config.base.path)
  tokenizer = found.tokenizer()
  by_task = {
    task: load_rows(config.data, task, "train")
    for task in dict.fromkeys(tasks.values())
  }
  rows = {name: by_task[task] for name, task in tasks.items()}
  base = found.weights(
    config.base.dtype, mesh, stacked=True, quantize=config.base.quantize
  )
  return Run(config, mesh, tokenizer, rows, base)


def train_bank(config: Config, console: Console) -> None:
  """Trains one adapter a task, and saves them as a bank in WORKDIR/bank.

  Args:
    config: the settings.
    console: shows progress.

  Raises:
    InputError: the base, rows, devices or run folder do not fit the settings.
    FloatingPointError: a loss or gradient is not finite.
  """
  # ---- Check all inputs before anything is written. ----
  tasks = config.data.tasks
  run = set_up(config, dict(zip(tasks, tasks, strict=True)), console)
  held_out = {task: load_rows(config.data, task, "test") for task in tasks}
  encoders = {}
  if config.router.encoder == "minilm":
    encoders["minilm"] = load_minilm(config.router.minilm)
  data = run.batches()
  tests = held_out_batches(held_out, run.tokenizer, config.data, run.mesh)
  tests = [put_batch(batch, run.mesh) for batch in tests]
  encoders["hidden"] = run.hidden_encoder()

  # ---- Train. ----
  made_of = contents(run.base.fingerprint, train=run.rows, test=held_out)
  with claim_workdir(config, made_of) as workdir:
    if jax.process_index() == 0:
      pprint(config, console=console, expand_all=True)
      devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
      kernel = choose_kernel(
        run.mesh,
        config.data.length,
        run.base.config,
        run.base.dtype,
        config.data.packing,
      )
      console.print(
        f"{len(tasks)} experts on {config.base.path},"
        f" {jax.device_count()} x {devices}, attention by {kernel.name},"
        f" into {workdir}",
        soft_wrap=True,
      )
    state = train(config, run.base, run.mesh, data, tests, workdir, console)

    if state.step < config.optim.steps:
      return  # SIGTERM.

    # ---- The bank. ----
    texts = [
      [row.text for row in some] for some in centroid_rows(config, run.rows)
    ]
    tables = {}
    for name, encoder in encoders.items():
      with console.status(f"{name} centroids of {sum(map(len, texts))} texts"):
        tables[name] = centroids(encoder, texts)
    adapters = trained_adapters(config, state)
    if jax.process_index() == 0:
      about = {task: Expert(task, get_task(task).template) for task in tasks}
      bank = Bank(
        adapters, config.base.path, run.base.fingerprint, tables, about
      )
      save_bank(workdir / "bank", bank)
      console.print(
        f"bank: {workdir / 'bank'}\nnext: python infer.py --config ..."
        f" --bank {workdir / 'bank'} --prompt '...'",
        soft_wrap=True,  # A command is copied whole.
      )


def fit_router(
  config: Config,
  name: str,
  bank: str,
  console: Console,
  same_base: bool = False,
) -> None:
  """Fits a router to a bank, and saves it there.

  Args:
    config: as in training; `data.tasks` are those of the bank's experts.
    name: the router's.
    bank: the bank's folder; "" is WORKDIR/bank.
    console: shows progress.
    same_base: accept a bank whose base has another fingerprint.

  Raises:
    InputError: the bank, base or rows do not fit the settings.
    FloatingPointError: a loss or gradient is not finite.
  """
  fit = get_fit(name)
  folder = Path(bank or Path(config.workdir) / "bank")
  tasks = experts_tasks(folder, read_record(folder))
  experts = tuple(tasks)
  if set(config.data.tasks) != set(tasks.values()):
    want = ", ".join(dict.fromkeys(tasks.values()))
    raise InputError(
      f"data.tasks: {', '.join(config.data.tasks)} is not allowed; want the"
      f" tasks of the bank's experts, {want}"
    )
  data = dataclasses.replace(config.data, tasks=experts)
  config = dataclasses.replace(config, data=data)
  run = set_up(config, tasks, console)
  encoder = run.hidden_encoder
  if config.router.encoder == "minilm":
    encoder = functools.partial(load_minilm, config.router.minilm)
  settings, arrays = fit(
    Work(
      config,
      run.base,
      load_bank(folder, run.base, same_base=same_base).adapters,
      run.mesh,
      run.batches(),
      centroid_rows(config, run.rows),
      encoder,
      console,
    )
  )
  if jax.process_index() == 0:
    save_fitted(folder, name, Fitted(settings, arrays, experts))
    console.print(
      f"{name}: fitted to {', '.join(experts)}, in {folder}\nnext: python"
      f" infer.py --config ... --bank {folder} --router.name {name}"
      " --prompt '...'",
      soft_wrap=True,
    )


def experts_tasks(folder: Path, record: BankRecord) -> dict[str, str]:
  """Returns {expert: the task that it was trained on}.

  Args:
    folder: the bank's.
    record: its bank.json. An expert without a task there has its name as task.

  Raises:
    InputError: an expert's task is not a known one.
  """
  tasks = {expert.name: expert.task or expert.name for expert in record.experts}
  for name, task in tasks.items():
    if task not in TASKS:
      raise InputError(
        f"--bank {folder}: expert {name!r} is of task {task!r}, which has no"
        f" training rows here; known are {', '.join(TASKS)}; drop it, and add"
        " it again with --task"
      )
  return tasks


def centroid_rows(
  config: Config, rows: Mapping[str, Sequence[Row]]
) -> list[list[Row]]:
  """Returns the sample of each expert's rows whose texts are embedded."""
  count = config.router.centroid_rows
  return [sample_rows(rows[name], count) for name in config.data.tasks]
