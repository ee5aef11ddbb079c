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

from collections.abc import Sequence
import dataclasses
import functools

from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError

# What takes seconds to import is imported where it is used: --help is at once.


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
  """What train.py takes besides the config.

  Attributes:
    plan: do not train, but compile the step for hardware that need not be here
      and say whether it fits and what it takes: v5e:2x4, v5p:2x2x1, h100:8.
    plan_json: write the plan to this new JSON file too.
    fit_router: do not train, but fit this router to a bank and save it there.
    bank: of fit_router: the bank's folder; WORKDIR/bank by default.
    same_base: of fit_router: go on with a bank whose base has another
      fingerprint, because it is this base in another form.
  """

  plan: str = ""
  plan_json: str = ""
  fit_router: str = ""
  bank: str = ""
  same_base: bool = False


def main(argv: Sequence[str]) -> None:
  """Runs the program with these arguments."""
  args = cli.parse(Arguments, argv, __doc__)
  if args.bank and not args.fit_router:
    raise InputError("--bank: is for --fit-router, whose NAME is missing")
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

  if args.fit_router:
    fit_router(config, args.fit_router, args.bank, console, args.same_base)
  else:
    train_bank(config, console)


def script() -> None:
  """Runs the program as a command: train.py, or tokenlora-train."""
  cli.run(main)
