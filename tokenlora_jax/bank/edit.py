"""Adds and drops experts of a bank, and saves fitted routers, atomically.

  add_expert("bank", "adapters/mine", "mine")
  drop_expert("bank", "mine")

Files of the bank's other parts are not touched.

Axis letters: E experts, D_enc width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path

import numpy as np

from tokenlora_jax.bank.arrays import (
  Fitted,
  read_centroids,
  write_centroids,
  write_fitted,
)
from tokenlora_jax.bank.bank import check_base
from tokenlora_jax.bank.expert import Expert, describe_expert
from tokenlora_jax.bank.folder import drafting, publish
from tokenlora_jax.bank.record import (
  CENTROIDS,
  BankRecord,
  check_name,
  fitted_file,
  read_record,
  sha256,
)
from tokenlora_jax.config import InputError, check_choice
from tokenlora_jax.formats.load import BaseIdentity
from tokenlora_jax.formats.peft import (
  expert_maps,
  stack_adapters,
  trim,
  write_adapter,
)
from tokenlora_jax.formats.peft_read import (
  Factors,
  adapter_shapes,
  read_adapter,
)
from tokenlora_jax.mixing.routers import Embeds, centroids
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters


def add_expert(
  folder: str | Path,
  adapter: str | Path | Adapters,
  name: str,
  *,
  task: str = "",
  template: str = "",
  texts: Sequence[str] = (),
  encoders: Mapping[str, Embeds] | None = None,
  base: Llama | BaseIdentity | None = None,
  same_base: bool = False,
) -> tuple[str, ...]:
  """Adds an expert to a bank, after the others, atomically.

  Routers that were fitted for the other experts stay in the bank and are
  refused when used. Those fitted for an earlier expert of this name are removed.

  Args:
    folder: the bank's folder.
    adapter: a PEFT folder, or `Adapters` of one expert.
    name: the expert's name.
    task: the task whose rows it was trained on, if known.
    template: the form of that task's prompts.
    texts: its training texts, answers included, for its centroids.
    encoders: text encoders for them, by the bank's names of encoders.
    base: the bank's base, whose shapes the adapter must fit; without it the
      adapter is compared with the other experts alone.
    same_base: accept another fingerprint of `base`, and another base name in
      the adapter's config.

  Returns:
    The encoders of which the expert has no centroid.

  Raises:
    InputError: there is no bank, the name is taken, the adapter has another
      base or shape, or texts are given without an encoder or the reverse.

  Example:
    >>> import tempfile
    >>> from tokenlora_jax import Bank, load_base, random_adapters, save_bank
    >>> base = load_base("random:tiny")
    >>> two, three = (random_adapters(base, experts=n, rank=4) for n in (2, 3))
    >>> with tempfile.TemporaryDirectory() as bank:
    ...   save_bank(bank, Bank(two, "random:tiny", base.fingerprint, {}))
    ...   add_expert(bank, three.select("e2"), "e2", base=base)
    ...   read_record(bank).names
    ()
    ('e0', 'e1', 'e2')
  """
  folder, encoders = Path(folder), encoders or {}
  read_record(folder)  # There is one.
  check_name("name", name)
  if bool(texts) != bool(encoders):
    raise InputError(
      f"texts: {len(texts)} with {len(encoders)} encoders; want both, or neither"
    )
  named, adapters = _read_adapter(adapter, name)
  maps = expert_maps(adapters, name)
  if not maps:
    raise InputError(f"{_source(adapter, name)}: all of it is zero")
  if base is not None:
    adapters.check(base.config)
  rows = {e: centroids(x, [texts])[0] for e, x in encoders.items()}
  with drafting(folder) as scratch:
    record = _completed(folder, read_record(folder))
    check_base(folder, record, base, same_base)
    _check_new(folder, record, name)
    for encoder in encoders:
      check_choice("encoders", encoder, tuple(record.centroids))
    if named not in ("", record.base) and not same_base:
      raise InputError(
        f"{adapter}: says that its base is {named}, but the bank's is"
        f" {record.base}; where both are the same weights, say --same-base"
      )
    _check_shapes(_source(adapter, name), maps, _shapes(folder, record))
    write_adapter(scratch / name, maps, record.base)
    tables = {}
    for encoder, table in read_centroids(folder, record).items():
      row = rows.get(encoder, np.full(table.shape[1], np.nan, np.float32))
      if row.shape != table.shape[1:]:
        raise InputError(
          f"encoders: {encoder} gives {len(row)} numbers, but the bank's"
          f" centroids have {table.shape[1]}"
        )
      tables[encoder] = np.vstack([table, row])
    names = (*record.names, name)
    having, digest = write_centroids(scratch, tables, names)
    expert = describe_expert(maps, name, scratch / name, Expert(task, template))
    stale = [r for r, fitted in record.fitted.items() if name in fitted.experts]
    record = dataclasses.replace(
      record,
      experts=(*record.experts, expert),
      centroids=having,
      centroids_sha256=digest,
      fitted={r: x for r, x in record.fitted.items() if r not in stale},
    )
    publish(folder, scratch, record, list(map(fitted_file, stale)))
  return tuple(sorted(record.centroids.keys() - encoders.keys()))


def drop_expert(folder: str | Path, name: str) -> None:
  """Removes an expert from a bank atomically.

  Args:
    folder: the bank's folder.
    name: the expert's name.

  Raises:
    InputError: there is no bank, no such expert, or no other expert.

  Example:
    >>> import tempfile
    >>> from tokenlora_jax import Bank, load_base, random_adapters, save_bank
    >>> base = load_base("random:tiny")
    >>> adapters = random_adapters(base, experts=2, rank=4)
    >>> with tempfile.TemporaryDirectory() as bank:
    ...   save_bank(bank, Bank(adapters, "random:tiny", base.fingerprint, {}))
    ...   drop_expert(bank, "e0")
    ...   read_record(bank).names
    ('e1',)
  """
  folder = Path(folder)
  read_record(folder)  # There is one.
  with drafting(folder) as scratch:
    record = _completed(folder, read_record(folder))
    check_choice("name", name, record.names)
    if len(record.names) == 1:
      raise InputError(
        f"name: {name!r} is the bank's only expert; remove {folder} instead"
      )
    others = [i for i, other in enumerate(record.names) if other != name]
    tables = {
      encoder: table[others]
      for encoder, table in read_centroids(folder, record).items()
    }
    names = [record.names[i] for i in others]
    having, digest = write_centroids(scratch, tables, names)
    record = dataclasses.replace(
      record,
      experts=tuple(record.experts[i] for i in others),
      centroids=having,
      centroids_sha256=digest,
    )
    publish(folder, scratch, record, [name])


def save_fitted(folder: str | Path, router: str, fitted: Fitted) -> None:
  """Saves the arrays and settings of a fitted router in a bank, atomically.

  Args:
    folder: the bank's folder.
    router: the router's name; its earlier arrays are replaced.
    fitted: the arrays and settings.

  Raises:
    InputError: there is no bank, it has other experts, or a name, setting or
      array cannot be saved.

  Example:
    >>> import tempfile
    >>> from tokenlora_jax import Bank, Fitted, load_base, random_adapters
    >>> from tokenlora_jax import load_bank, save_bank
    >>> base = load_base("random:tiny")
    >>> adapters = random_adapters(base, experts=2, rank=4)
    >>> fitted = Fitted({"encoder": "hidden"}, {"bias": np.zeros(2)}, ("e0", "e1"))
    >>> with tempfile.TemporaryDirectory() as bank:
    ...   save_bank(bank, Bank(adapters, "random:tiny", base.fingerprint, {}))
    ...   save_fitted(bank, "mine", fitted)
    ...   load_bank(bank).fitted_for("mine").arrays["bias"].tolist()
    [0.0, 0.0]
  """
  folder = Path(folder)
  read_record(folder)  # There is one.
  with drafting(folder) as scratch:
    record = _completed(folder, read_record(folder))
    if tuple(fitted.experts) != record.names:
      raise InputError(
        f"fitted {router}: for {', '.join(fitted.experts)}, but the bank has"
        f" {', '.join(record.names)}"
      )
    entry = write_fitted(scratch, router, fitted)
    record = dataclasses.replace(
      record, fitted={**record.fitted, router: entry}
    )
    publish(folder, scratch, record)


def _completed(folder: Path, record: BankRecord) -> BankRecord:
  """Returns a record of format 2 for a bank of format 1."""
  if record.centroids_sha256:
    return record
  read_centroids(folder, record)  # Raises if the file is damaged.
  return dataclasses.replace(
    record,
    experts=tuple(
      describe_expert(
        trim(read_adapter(folder / name).maps), name, folder / name, Expert()
      )
      for name in record.names
    ),
    centroids_sha256=sha256(folder / CENTROIDS),
  )


def _check_new(folder: Path, record: BankRecord, name: str) -> None:
  if name in record.names:
    raise InputError(
      f"name: the bank has an expert {name!r} already; choose another, or drop"
      " that one first"
    )
  if (folder / name).exists():
    raise InputError(
      f"name: {folder / name} exists, and is no expert of the bank; move it away"
      " or choose another name"
    )


def _read_adapter(
  adapter: str | Path | Adapters, name: str
) -> tuple[str, Adapters]:
  """Returns the base that an adapter names, or "", and its one expert."""
  if not isinstance(adapter, Adapters):
    stored = read_adapter(adapter)
    return stored.base, stack_adapters([stored], [name])
  if len(adapter.names) != 1:
    raise InputError(
      f"adapter: {len(adapter.names)} experts ({', '.join(adapter.names)});"
      " want one, as Adapters.select gives it"
    )
  return "", Adapters((name,), adapter.layers)


def _source(adapter: str | Path | Adapters, name: str) -> str:
  """Returns an adapter's name for errors."""
  return name if isinstance(adapter, Adapters) else str(adapter)


# [in, out] by layer and projection.
Shapes = Mapping[tuple[int, str], tuple[int, int]]


def _shapes(folder: Path, record: BankRecord) -> dict[str, Shapes]:
  """Reads the shapes of all experts' maps from their files' headers."""
  return {name: adapter_shapes(folder / name) for name in record.names}


def _check_shapes(
  source: str,
  maps: Mapping[tuple[int, str], Factors],
  shapes: Mapping[str, Shapes],
) -> None:
  """Raises `InputError` unless the experts' maps have the same [in, out]."""
  for other, theirs in shapes.items():
    for place, (a, b, _) in maps.items():
      ours = a.shape[1], b.shape[1]
      if place in theirs and theirs[place] != ours:
        raise InputError(
          f"{source}: layer {place[0]} {place[1]} is made for [in, out] ="
          f" {list(ours)}, but the bank's {other!r} for {list(theirs[place])};"
          " was it trained on another base?"
        )
