"""Trains one LoRA adapter a task, all at once, on one frozen Llama.

  python train.py --config FILE                     trains
  python train.py --config FILE --plan v5e:2x4      plans: would it fit, how fast
  python train.py --config FILE --fit-router NAME   fits a router to a bank

At the end the folder WORKDIR/bank holds a PEFT folder an expert, the centroids
that a router compares texts with, and bank.json; infer.py mixes them. A run
that was stopped goes on where its newest checkpoint stands; SIGTERM, as of a
preempted machine, lets it save one first.

A router that learns (lora-flow, phatgoose, switch, x-lora) is fitted on the same
tasks' training rows, base and adapters frozen, for `optim.steps` steps of
`data.rows` rows a task, and saved into the bank.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from pathlib import Path

import jax
from rich.console import Console
from rich.pretty import pprint

from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import Bank, Expert, load_bank, save_bank
from tokenlora_jax.bank.edit import save_fitted
from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError
from tokenlora_jax.data.batches import batches, held_out_batches
from tokenlora_jax.data.rows import Row, load_rows, sample_rows
from tokenlora_jax.data.tasks import get_task
from tokenlora_jax.encoders import HiddenEncoder
from tokenlora_jax.formats.load import base_shape, load_base
from tokenlora_jax.formats.minilm import load_minilm
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.routers import centroids
from tokenlora_jax.model.fused_attention import choose_kernel
from tokenlora_jax.parallel.processes import start_processes
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.plan.report import show_plans
from tokenlora_jax.plan.training import plan_training
from tokenlora_jax.training.loop import train, trained_adapters
from tokenlora_jax.training.routers import Work, get_fit
from tokenlora_jax.training.step import put_batch
from tokenlora_jax.training.workdir import claim_workdir


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
  """What train.py takes besides the config.

  Attributes:
    plan: do not train, but compile the step for hardware that need not be here
      and say whether it fits and what it takes: v5e:2x4, v5p:2x2x1, h100:8.
    plan_json: write the plan to this new JSON file too.
    fit_router: do not train, but fit this router to a bank and save it there.
    bank: of fit_router: the bank's folder; WORKDIR/bank by default.
  """

  plan: str = ""
  plan_json: str = ""
  fit_router: str = ""
  bank: str = ""


def main(argv: Sequence[str]) -> None:
  """Runs the program with these arguments."""
  args = cli.parse(Arguments, argv, __doc__)
  config, console = Config.of(args), cli.console()
  if args.plan:
    make = functools.partial(plan_training, config)
    shape = base_shape(config.base.path)
    show_plans(make, shape, args.plan, args.plan_json, console)
    return
  if args.fit_router:
    fit_router(config, args.fit_router, args.bank, console)
    return
  if args.bank:
    raise InputError("--bank: is for --fit-router, whose NAME is missing")

  # ---- Whatever can be wrong is found out before anything is written. ----
  start_processes(config.mesh)
  console.quiet = jax.process_index() > 0
  mesh = make_mesh(config.mesh, config.data.rows // config.accumulate)
  tokenizer = load_tokenizer(config.base.path)
  tasks = config.data.tasks
  rows = {task: load_rows(config.data, task, "train") for task in tasks}
  held_out = {task: load_rows(config.data, task, "test") for task in tasks}
  encoders = {}
  if config.router.encoder == "minilm":
    encoders["minilm"] = load_minilm(config.router.minilm)
  base = load_base(
    config.base.path,
    config.base.dtype,
    mesh,
    stacked=True,
    quantize=config.base.quantize,
  )
  data = batches(rows, tokenizer, config.data, mesh)
  tests = held_out_batches(held_out, tokenizer, config.data, mesh)
  tests = [put_batch(batch, mesh) for batch in tests]
  encoders["hidden"] = HiddenEncoder(base, tokenizer, config.data.length)

  # ---- Train. ----
  with claim_workdir(config) as workdir:
    if jax.process_index() == 0:
      pprint(config, console=console, expand_all=True)
      devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
      kernel = choose_kernel(
        mesh,
        config.data.length,
        base.config,
        base.dtype,
        config.data.packing,
      )
      console.print(
        f"{len(tasks)} experts on {config.base.path},"
        f" {jax.device_count()} x {devices}, attention by {kernel.name},"
        f" into {workdir}",
        soft_wrap=True,
      )
    state = train(config, base, mesh, data, tests, workdir, console)

    if state.step < config.optim.steps:
      return  # SIGTERM.

    # ---- The bank. ----
    texts = [[row.text for row in some] for some in centroid_rows(config, rows)]
    tables = {}
    for name, encoder in encoders.items():
      with console.status(f"{name} centroids of {sum(map(len, texts))} texts"):
        tables[name] = centroids(encoder, texts)
    adapters = trained_adapters(config, state)
    if jax.process_index() == 0:
      about = {task: Expert(task, get_task(task).template) for task in tasks}
      bank = Bank(adapters, config.base.path, base.fingerprint, tables, about)
      save_bank(workdir / "bank", bank)
      console.print(
        f"bank: {workdir / 'bank'}\nnext: python infer.py --config ..."
        f" --bank {workdir / 'bank'} --prompt '...'",
        soft_wrap=True,  # A command is copied whole.
      )


def fit_router(config: Config, name: str, bank: str, console: Console) -> None:
  """Fits a router to a bank, and saves it there.

  Args:
    config: as in training; `data.tasks` are the bank's experts.
    name: the router's.
    bank: the bank's folder; "" is WORKDIR/bank.
    console: where progress is shown.
  """
  fit = get_fit(name)
  start_processes(config.mesh)
  console.quiet = jax.process_index() > 0
  mesh = make_mesh(config.mesh, config.data.rows // config.accumulate)
  tokenizer = load_tokenizer(config.base.path)
  base = load_base(
    config.base.path,
    config.base.dtype,
    mesh,
    stacked=True,
    quantize=config.base.quantize,
  )
  folder = Path(bank or Path(config.workdir) / "bank")
  adapters = load_bank(folder, base).adapters
  experts = adapters.names
  if set(config.data.tasks) != set(experts):
    raise InputError(
      f"data.tasks: {', '.join(config.data.tasks)} is not allowed; want the"
      f" bank's experts, {', '.join(experts)}"
    )
  data = dataclasses.replace(config.data, tasks=experts)
  config = dataclasses.replace(config, data=data)
  rows = {task: load_rows(data, task, "train") for task in experts}
  encoder = functools.partial(HiddenEncoder, base, tokenizer, data.length)
  if config.router.encoder == "minilm":
    encoder = functools.partial(load_minilm, config.router.minilm)
  settings, arrays = fit(
    Work(
      config,
      base,
      adapters,
      mesh,
      batches(rows, tokenizer, data, mesh),
      centroid_rows(config, rows),
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


def centroid_rows(
  config: Config, rows: Mapping[str, Sequence[Row]]
) -> list[list[Row]]:
  """Returns the training rows of each task that its vectors are made of."""
  count = config.router.centroid_rows
  return [sample_rows(rows[task], count) for task in config.data.tasks]


if __name__ == "__main__":
  cli.run(main)
