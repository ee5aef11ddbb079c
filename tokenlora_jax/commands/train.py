"""Trains one LoRA adapter a task, all at once, on one frozen Llama.

  python train.py --config FILE                     trains
  python train.py --config FILE --plan v5e:2x4      estimates memory and time
  python train.py --config FILE --fit-router NAME   fits a router to a bank

The result is WORKDIR/bank: a PEFT folder per expert, the centroids that a
router compares texts with, and bank.json; infer.py mixes them. The same command
resumes a stopped run from its newest checkpoint; SIGTERM saves one first.

A trainable router (lora-flow, phatgoose, switch, x-lora) is fitted on the same
tasks' training rows, with base and adapters frozen, for `optim.steps` steps of
`data.rows` rows a task, and saved into the bank.
"""

from collections.abc import Sequence
import dataclasses
import functools

from tokenlora_jax.commands import cli
from tokenlora_jax.commands.memory import needing_memory
from tokenlora_jax.config import Config, InputError

# Heavy modules are imported where they are used, so that --help is fast.


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
  """The flags of train.py besides the config.

  Attributes:
    plan: do not train; compile the step for absent hardware (v5e:2x4,
      v5p:2x2x1, h100:8) and print whether it fits, its memory and its time.
    plan_json: write the plan to this new JSON file too.
    fit_router: do not train; fit this router to a bank and save it there.
    bank: for fit_router: the bank's folder; WORKDIR/bank by default.
    same_base: for fit_router: accept a bank whose base has another fingerprint,
      because it is this base in another form.
  """

  plan: str = ""
  plan_json: str = ""
  fit_router: str = ""
  bank: str = ""
  same_base: bool = False


def main(argv: Sequence[str]) -> None:
  """Runs train.py.

  Args:
    argv: the arguments, without the program's name.

  Raises:
    InputError: a flag, a file or the run's folder is not as it must be.
  """
  args = cli.parse(Arguments, argv, __doc__)
  if args.bank and not args.fit_router:
    raise InputError("--bank: needs --fit-router NAME; leave it out to train")
  config, console = Config.of(args), cli.console()
  if args.plan:
    from tokenlora_jax.formats.load import base_shape
    from tokenlora_jax.plan.report import show_plans
    from tokenlora_jax.plan.training import plan_training

    make = functools.partial(plan_training, config)
    shape = base_shape(config.base.path)
    show_plans(make, shape, args.plan, args.plan_json, console)
    return
  from tokenlora_jax.commands.training import fit_router, train_bank

  with needing_memory(
    "choose fewer --data.rows or a smaller --data.length, more --accumulate, or"
    " --base.quantize int8"
  ):
    if args.fit_router:
      fit_router(config, args.fit_router, args.bank, console, args.same_base)
    else:
      train_bank(config, console)


def script() -> None:
  """Runs train.py, or tokenlora-train, as a program, with its exit status."""
  cli.run(main)
