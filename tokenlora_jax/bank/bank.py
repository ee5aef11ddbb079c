"""The bank: adapters of one base, with the arrays that routers need.

  bank = load_bank("runs/demo/bank", base)
  bank.adapters.names, bank.router(RouterConfig("uniform"))

Axis letters: E experts, D_enc width of an embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
import dataclasses
from pathlib import Path
from typing import Any

from jaxtyping import Float
import numpy as np

from tokenlora_jax.bank.arrays import (
  Fitted,
  read_centroids,
  read_fitted,
  write_centroids,
  write_fitted,
)
from tokenlora_jax.bank.expert import Expert, check_described, describe_expert
from tokenlora_jax.bank.folder import drafting, publish
from tokenlora_jax.bank.record import (
  BANK,
  BankRecord,
  ExpertRecord,
  check_file,
  check_name,
  fitted_file,
  read_record,
)
from tokenlora_jax.config import InputError, RouterConfig, nearest
from tokenlora_jax.encoders import HiddenEncoder, TextEncoder
from tokenlora_jax.formats.load import BaseIdentity
from tokenlora_jax.formats.minilm import load_minilm
from tokenlora_jax.formats.peft import expert_maps, load_adapters, save_adapter
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import (
  make_router,
  router_defaults,
  router_settings,
)
from tokenlora_jax.mixing.shaping import SHAPING
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters


@dataclasses.dataclass(frozen=True)
class Bank:
  """Adapters trained on one base, with centroids and fitted routers.

  Attributes:
    adapters: the experts' adapters.
    base: the base's path, as it was given.
    fingerprint: a hash of the base's weights.
    centroids: float32[E, D_enc] by encoder, `minilm` or `hidden`; the row of an
      expert without a centroid is NaN.
    experts: each expert's task and template, by name.
    fitted: arrays and settings fitted for routers, by the router's name.
    folder: the folder it was read from; "" if from none or several.

  Example:
    >>> from tokenlora_jax import load_base, random_adapters
    >>> base = load_base("random:tiny")
    >>> adapters = random_adapters(base, experts=2, rank=4)
    >>> table = np.array([[1.0, 0.0], [np.nan, np.nan]], np.float32)
    >>> bank = Bank(adapters, "random:tiny", base.fingerprint, {"hidden": table})
    >>> bank.lacking("hidden"), bank.router(RouterConfig("uniform")).experts
    (('e1',), 2)
  """

  adapters: Adapters
  base: str
  fingerprint: str
  centroids: Mapping[str, Float[np.ndarray, "E _"]]
  experts: Mapping[str, Expert] = dataclasses.field(default_factory=dict)
  fitted: Mapping[str, Fitted] = dataclasses.field(default_factory=dict)
  folder: str = ""

  def lacking(self, encoder: str) -> tuple[str, ...]:
    """Returns the names of the experts without a centroid of this encoder.

    Args:
      encoder: a key of `centroids`.

    Example:
      >>> table = np.array([[1.0, 0.0], [np.nan, np.nan]], np.float32)
      >>> bank = Bank(Adapters(("a", "b"), ()), "", "", {"hidden": table})
      >>> bank.lacking("hidden")
      ('b',)
    """
    rows = zip(self.adapters.names, self.centroids[encoder], strict=True)
    return tuple(name for name, row in rows if np.isnan(row).all())

  def fitted_for(self, router: str) -> Fitted:
    """Returns the arrays and settings fitted for a router.

    Args:
      router: the router's name.

    Raises:
      InputError: nothing was fitted for it, or it was fitted for other experts.

    Example:
      >>> fitted = {"mine": Fitted({}, {"bias": np.zeros(2)}, ("a", "b"))}
      >>> bank = Bank(Adapters(("a", "b"), ()), "", "", {}, fitted=fitted)
      >>> bank.fitted_for("mine").arrays["bias"].tolist()
      [0.0, 0.0]
    """
    names = self.adapters.names
    remedy = (
      f"`python train.py --fit-router {router} --bank {self.folder or 'DIR'}`"
      " fits it"
    )
    if router not in self.fitted:
      raise InputError(
        f"router.name: the bank has nothing fitted for {router!r}"
        f"{nearest(router, self.fitted)}; {remedy}"
      )
    fitted = self.fitted[router]
    if tuple(fitted.experts) != names:
      raise InputError(
        f"router.name: {router!r} was fitted for {', '.join(fitted.experts)},"
        f" but the bank has {', '.join(names)}; {remedy} again"
      )
    return fitted

  def router(
    self, config: RouterConfig, given: Set[str] = frozenset()
  ) -> Router:
    """Returns the router with these settings, for this bank's experts.

    A fitted router is made with the bank's arrays and settings for it. A
    setting that equals the config's default is left to the router's function,
    which may have another default (a person's own router), unless it is given.

    Args:
      config: the router's name and settings.
      given: the settings that were asked for, even if they equal the defaults.

    Raises:
      InputError: there is no such router, or the bank lacks its centroids or
        its fitted arrays.

    Example:
      >>> bank = Bank(Adapters(("a", "b"), ()), "", "", {})
      >>> router = bank.router(RouterConfig("one-hot", expert="b"))
      >>> router.gates(1, (), None).tolist()
      [[0.0, 1.0]]
    """
    taken = router_settings(config.name)
    fitted = self.fitted.get(config.name)
    own, unset = router_defaults(config.name), RouterConfig()
    settings: dict[str, Any] = {
      name: getattr(config, name)
      for name in taken
      if hasattr(config, name)
      and not (
        name in own
        and name not in given
        and getattr(config, name) == getattr(unset, name)
      )
    }
    encoder = settings.get("encoder", own.get("encoder"))
    if fitted is not None:
      fitted = self.fitted_for(config.name)
      # It compares only vectors of one encoder: its own.
      settings.pop("encoder", None)
      settings |= fitted.settings
    if "arrays" in taken:
      settings["arrays"] = self.fitted_for(config.name).arrays
    elif fitted is not None:
      settings |= fitted.arrays
    elif "centroids" in taken:
      settings["centroids"] = self._table(
        encoder if isinstance(encoder, str) else config.encoder
      )
    elif "encoder" in taken:
      # The vectors that it compares with must have been fitted.
      self.fitted_for(config.name)
    if "encoder" in settings:
      settings["encoder"] = _encoder(settings["encoder"], config)
    if "adapters" in taken:
      settings["adapters"] = self.adapters
    if "prior" in settings:
      prior = dataclasses.replace(
        config, name=config.prior, prior="uniform", top_k=None,
        temperature=None, threshold=0.0, smoothing=0.0,
      )  # fmt: skip
      settings["prior"] = self.router(prior, given - set(SHAPING))
    shaping = {name: getattr(config, name) for name in SHAPING}
    # For a 0 that nobody asked for, the router's own value counts.
    shaping = {
      k: v for k, v in shaping.items() if v or k == "top_k" or k in given
    }
    router = make_router(config.name, **settings, **shaping)
    return router.bind(self.adapters.names)

  def _table(self, encoder: str) -> Float[np.ndarray, "E D_enc"]:
    if encoder not in self.centroids:
      raise InputError(
        f"router.encoder: the bank has no centroids of {encoder!r},"
        f" only of {', '.join(sorted(self.centroids))}"
      )
    if lacking := self.lacking(encoder):
      raise InputError(
        f"router.encoder: {', '.join(lacking)} has no centroid of {encoder!r};"
        " drop it from the bank and add it again with its texts"
      )
    return self.centroids[encoder]


def _encoder(
  name: str | TextEncoder | HiddenEncoder, config: RouterConfig
) -> str | TextEncoder | HiddenEncoder:
  if name != "minilm":
    return name
  return dataclasses.replace(load_minilm(config.minilm), window=config.window)


# -----------------------------------------------------------------------------
# Writing.


def save_bank(folder: str | Path, bank: Bank) -> None:
  """Writes a bank; replaces an older bank there atomically.

  Args:
    folder: the bank's folder; made if need be.
    bank: the bank.

  Raises:
    InputError: the folder holds something that is not a bank, the name of an
      expert or router is not allowed as a file name, or an array is not finite.

  Example: see `load_bank`.
  """
  folder = Path(folder)
  names = bank.adapters.names
  for name in names:
    check_name("experts", name)
  with drafting(folder) as scratch:
    for name in names:
      save_adapter(bank.adapters, name, scratch / name, base_name=bank.base)
    having, digest = write_centroids(scratch, bank.centroids, names)
    record = BankRecord(
      bank.base,
      bank.fingerprint,
      tuple(
        describe_expert(
          expert_maps(bank.adapters, name),
          name,
          scratch / name,
          bank.experts.get(name, Expert()),
        )
        for name in names
      ),
      having,
      digest,
      {
        name: write_fitted(scratch, name, fitted)
        for name, fitted in bank.fitted.items()
      },
    )
    publish(folder, scratch, record, _gone(folder, record))


def _gone(folder: Path, record: BankRecord) -> list[str]:
  """Returns the paths of the bank on disk that the new bank lacks."""
  try:
    old = read_record(folder)
  except InputError:  # No bank there, or a damaged one.
    return []
  routers = sorted(old.fitted.keys() - record.fitted.keys())
  return [
    *(name for name in old.names if name not in record.names),
    *map(fitted_file, routers),
  ]


# -----------------------------------------------------------------------------
# Reading.


def load_bank(
  folder: str | Path | Sequence[str | Path],
  base: Llama | None = None,
  *,
  same_base: bool = False,
) -> Bank:
  """Reads a bank, or joins several banks of one base.

  Joined experts keep the order of the folders. A name that occurs in two banks
  becomes FOLDER/NAME for both, FOLDER as it was given. Centroids are joined for
  the encoders that all banks have; fitted routers are left out.

  Args:
    folder: a bank's folder, or a list of folders.
    base: the base, which is compared with the bank's; None skips the check.
    same_base: accept another fingerprint of `base`, or different ones among
      several banks; the adapters' shapes are still checked.

  Returns:
    The bank, in the decoding layout.

  Raises:
    InputError: there is no bank; a file is missing, damaged or exchanged; the
      base is another one; or the banks cannot be joined.

  Example:
    >>> import tempfile
    >>> from tokenlora_jax import load_base, random_adapters
    >>> base = load_base("random:tiny")
    >>> adapters = random_adapters(base, experts=2, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_bank(folder, Bank(adapters, "random:tiny", base.fingerprint, {}))
    ...   load_bank(folder, base).adapters.names
    ('e0', 'e1')
  """
  several = [folder] if isinstance(folder, (str, Path)) else list(folder)
  records = _read_records(several, base, same_base)
  experts = _locate(records)
  for place, expert in experts.values():
    for file, digest in expert.sha256.items():
      check_file(place / file, digest)
  adapters = load_adapters(
    [place for place, _ in experts.values()], list(experts)
  )
  if base is not None:
    adapters.check(base.config)
  for name, (place, expert) in experts.items():
    check_described(adapters, name, place, expert)
  centroids = _join(
    {one: read_centroids(one, record) for one, record in records.items()}
  )
  fitted = {}
  first, about = next(iter(records.items()))
  if len(records) == 1:
    fitted = {name: read_fitted(first, about, name) for name in about.fitted}
  return Bank(
    adapters,
    about.base,
    about.fingerprint,
    centroids,
    {name: Expert(x.task, x.template) for name, (_, x) in experts.items()},
    fitted,
    str(first) if len(records) == 1 else "",
  )


def _read_records(
  folders: Sequence[str | Path], base: Llama | None, same_base: bool
) -> dict[Path, BankRecord]:
  """Reads each folder's bank.json, and checks that all share one base."""
  if not folders:
    raise InputError("--bank: no folder is given; want at least one")
  records: dict[Path, BankRecord] = {}
  for folder in map(Path, folders):
    if folder in records:
      raise InputError(f"--bank {folder}: is given twice; want it once")
    record = records[folder] = read_record(folder)
    check_base(folder, record, base, same_base)
    first = next(iter(records.values()))
    # Two versions of a fingerprint may stand for one base; with `base` given,
    # each bank's was compared with it above.
    is_other = base is None and record.fingerprint != first.fingerprint
    if is_other and not same_base:
      raise InputError(
        f"--bank {folder}: was trained on {record.base} (fingerprint"
        f" {record.fingerprint[:12]}), but {folders[0]} on {first.base}"
        f" ({first.fingerprint[:12]}); want banks of one base, or, where these"
        " are the same weights, load_bank(..., same_base=True)"
      )
  return records


def _locate(
  records: Mapping[Path, BankRecord],
) -> dict[str, tuple[Path, ExpertRecord]]:
  """Returns {name: (folder, record)} of all banks' experts."""
  counts = Counter(name for record in records.values() for name in record.names)
  experts = {}
  for folder, record in records.items():
    for expert in record.experts:
      name = expert.name
      name = f"{folder}/{name}" if counts[name] > 1 else name
      experts[name] = record.place(folder, expert.name), expert
  return experts


def check_base(
  folder: Path,
  record: BankRecord,
  base: Llama | BaseIdentity | None,
  same_base: bool = False,
) -> None:
  """Raises `InputError` if a bank was trained on another base.

  Args:
    folder: the bank's folder.
    record: its bank.json.
    base: the base; None skips the check.
    same_base: accept another fingerprint, since a person vouches for the base.
  """
  if (
    base is None
    or same_base
    or record.fingerprint
    in (
      base.fingerprint,
      base.fingerprint_1,
    )
  ):
    return
  raise InputError(
    f"{folder / BANK}: the bank was trained on {record.base} (fingerprint"
    f" {record.fingerprint[:12]}), not on this base ({base.fingerprint[:12]});"
    " give --base.path that one, or, where both are the same weights, say"
    " --same-base (in Python, same_base=True)"
  )


def _join(
  tables: Mapping[Path, Mapping[str, Float[np.ndarray, "_ _"]]],
) -> dict[str, Float[np.ndarray, "E _"]]:
  """Joins the centroids of the encoders that all banks have."""
  joined = {}
  for encoder in sorted(set.intersection(*map(set, tables.values()))):
    rows = {folder: table[encoder] for folder, table in tables.items()}
    if len({table.shape[1] for table in rows.values()}) > 1:
      shown = ", ".join(f"{x.shape[1]} in {f}" for f, x in rows.items())
      raise InputError(f"centroids: {encoder} has different widths: {shown}")
    joined[encoder] = np.concatenate(list(rows.values()))
  return joined
