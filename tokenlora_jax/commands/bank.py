"""The subcommands of infer.py that show, edit and export a bank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenlora_jax.bank.bank import Bank, check_base, load_bank
from tokenlora_jax.bank.edit import add_expert, drop_expert
from tokenlora_jax.bank.expert import figures
from tokenlora_jax.bank.export import Exported, export_mixture
from tokenlora_jax.bank.record import read_record
from tokenlora_jax.commands import cli
from tokenlora_jax.config import Config, InputError
from tokenlora_jax.data.rows import load_rows, sample_rows
from tokenlora_jax.data.tasks import TASKS, get_task
from tokenlora_jax.encoders import HiddenEncoder
from tokenlora_jax.files import check_new_file, read_lines, writing
from tokenlora_jax.formats.load import Base
from tokenlora_jax.formats.minilm import load_minilm
from tokenlora_jax.formats.peft import expert_maps

# The end of an error of the disk.
_AGAIN = "give the command again; the bank is whole"


@dataclasses.dataclass(frozen=True)
class Show:
  """The flags of `infer.py bank`.

  Attributes:
    bank: the folder that train.py wrote.
  """

  bank: str


def show(argv: Sequence[str], console: Console) -> None:
  """Checks a bank's files and prints its contents: `infer.py bank`."""
  args = cli.parse_flags(Show, argv, "Shows what is in a bank.")
  bank = load_bank(args.bank)
  console.print(
    f"{args.bank}: {len(bank.adapters.names)} experts on {bank.base}"
    f" (fingerprint {bank.fingerprint[:12]})",
    markup=False,
    soft_wrap=True,
  )
  console.print(experts_table(bank))
  if bank.fitted:
    console.print(fitted_table(bank))


def experts_table(bank: Bank) -> Table:
  """Returns a table of a bank's experts, one a row."""
  table = Table("expert", "task", "rank", "scaling", "projections", "centroids")
  for name in bank.adapters.names:
    ranks, scalings, projections = figures(expert_maps(bank.adapters, name))
    table.add_row(
      name,
      bank.experts[name].task or "?",
      ", ".join(map(str, ranks)),
      ", ".join(f"{scaling:.4g}" for scaling in scalings),
      " ".join(projections),
      ", ".join(
        f"no {encoder}" if name in bank.lacking(encoder) else encoder
        for encoder in bank.centroids
      ),
    )
  return table


def fitted_table(bank: Bank) -> Table:
  """Returns a table of a bank's fitted routers, one a row."""
  table = Table("fitted router", "settings", "arrays", "for")
  for name, fitted in bank.fitted.items():
    is_ours = fitted.experts == bank.adapters.names
    arrays = [f"{key} {list(x.shape)}" for key, x in fitted.arrays.items()]
    table.add_row(
      name,
      json.dumps(fitted.settings),
      ", ".join(arrays),
      "these experts" if is_ours else f"others: {', '.join(fitted.experts)}",
    )
  return table


@dataclasses.dataclass(frozen=True)
class Add(Config):
  """The flags of `infer.py bank-add` besides the config.

  Attributes:
    bank: the folder that train.py wrote.
    adapter: a PEFT folder.
    name: of the new expert.
    task: the task that it was trained on; if it is a known task, its training
      rows give the expert's centroids.
    texts_file: a file with a training text a line, for the centroids, instead
      of a task's rows.
    same_base: accept a base whose fingerprint is not the bank's, and an adapter
      whose config names another base, because they are the same base under
      another name or in another form.
  """

  bank: str = ""
  adapter: str = ""
  name: str = ""
  task: str = ""
  texts_file: str = ""
  same_base: bool = False


def add(argv: Sequence[str], console: Console) -> None:
  """Adds a PEFT folder to a bank: `infer.py bank-add`."""
  args = cli.parse(Add, argv, "Adds an adapter to a bank, as a new expert.")
  for flag in ("bank", "adapter", "name"):
    if not getattr(args, flag):
      raise InputError(f"--{flag}: is needed; see --help")
  record = read_record(args.bank)
  base = Base.open(args.base.path)
  check_base(Path(args.bank), record, base.identity, args.same_base)
  texts = _texts(args) if record.centroids else []
  encoders = _encoders(args, base, record.centroids) if texts else {}
  with writing(Path(args.bank), _AGAIN):
    lacking = add_expert(
      args.bank,
      args.adapter,
      args.name,
      task=args.task,
      template=get_task(args.task).template if args.task in TASKS else "",
      texts=texts if encoders else [],
      encoders=encoders,
      base=base.identity,
      same_base=args.same_base,
    )
  console.print(f"added {args.name} to {args.bank}", markup=False)
  if lacking:
    console.print(
      f"{args.name} has no centroid of {', '.join(lacking)}: the centroid router"
      " needs one; add it with --task or --texts-file",
      markup=False,
      soft_wrap=True,
    )


def _encoders(args: Add, base: Base, wanted: Iterable[str]) -> dict:
  encoders = {}
  if "minilm" in wanted:
    encoders["minilm"] = load_minilm(args.router.minilm)
  if "hidden" in wanted:
    model = base.weights(args.base.dtype, quantize=args.base.quantize)
    encoders["hidden"] = HiddenEncoder(
      model, base.tokenizer(), args.data.length
    )
  return encoders


def _texts(args: Add) -> list[str]:
  if args.texts_file:
    file = Path(args.texts_file)
    return read_lines(file, f"--texts-file {file}", "text")
  if args.task not in TASKS:
    return []
  rows = load_rows(args.data, args.task, "train")
  return [row.text for row in sample_rows(rows, args.router.centroid_rows)]


@dataclasses.dataclass(frozen=True)
class Drop:
  """The flags of `infer.py bank-drop`.

  Attributes:
    bank: the folder that train.py wrote.
    name: of the expert to remove, with its files.
  """

  bank: str
  name: str


def drop(argv: Sequence[str], console: Console) -> None:
  """Removes an expert from a bank: `infer.py bank-drop`."""
  args = cli.parse_flags(Drop, argv, "Removes an expert from a bank.")
  with writing(Path(args.bank), _AGAIN):
    drop_expert(args.bank, args.name)
  console.print(f"dropped {args.name} from {args.bank}", markup=False)


@dataclasses.dataclass(frozen=True)
class Export:
  """The flags of `infer.py export`.

  Attributes:
    bank: the folder that train.py wrote.
    gates: one number per expert, in the bank's order.
    output: a new PEFT folder.
    rank: the highest rank allowed; by default the sum of all ranks, which is
      exact.
  """

  bank: str
  gates: tuple[float, ...]
  output: str
  rank: int | None = None


def export(argv: Sequence[str], console: Console) -> None:
  """Writes a fixed mixture as one PEFT folder: `infer.py export`."""
  args = cli.parse_flags(
    Export, argv, "Writes a mixture under fixed gates as one PEFT folder."
  )
  check_new_file("--output", args.output)
  bank = load_bank(args.bank)
  with writing(Path(args.output), "give the command again"):
    made = export_mixture(
      bank.adapters, args.gates, args.output, args.rank, bank.base
    )
  console.print(errors_table(made))
  console.print(
    f"{args.output}: rank {made.rank}, relative error {made.error:.2e}",
    markup=False,
    soft_wrap=True,
  )


def errors_table(made: Exported) -> Table:
  """Returns a table of an export's errors: layers x projections."""
  layers = sorted({layer for layer, _ in made.errors})
  names = list(dict.fromkeys(name for _, name in made.errors))
  table = Table(title="relative Frobenius error")
  table.add_column("layer", justify="right")
  for name in names:
    table.add_column(name, justify="right")
  for layer in layers:
    cells = [made.errors.get((layer, name)) for name in names]
    table.add_row(str(layer), *("" if x is None else f"{x:.2e}" for x in cells))
  return table


COMMANDS = {"bank": show, "bank-add": add, "bank-drop": drop, "export": export}
