"""Saves and restores a run: adapters, optimizer, step and data position.

Orbax writes in the background and renames a checkpoint into place only when it
is complete, so a killed run leaves complete checkpoints or none. A disk may
damage one later: each holds a checksum of its arrays, and one that cannot be
read, or whose checksum differs, is moved aside for the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import enum
import errno
import itertools
import json
import logging
from pathlib import Path
import re
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tokenlora_jax.config import InputError, first_line
from tokenlora_jax.files import writing
from tokenlora_jax.parallel.sharding import described

_log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints in a folder, the newest few kept.

  Args:
    folder: of the checkpoints; made if need be.
    keep: number of checkpoints that stay.
  """

  def __init__(self, folder: str | Path, keep: int):
    self._folder = Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      # Those that a killed run left half written.
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      self._folder, options=options, item_names=("state", "about")
    )

  def save(self, step: int, state: Any, about: Mapping) -> None:
    """Starts to write a checkpoint; waits only for one still being written.

    Args:
      step: optimizer steps done.
      state: a pytree of arrays.
      about: the run's config and data position, as JSON.

    Raises:
      OSError, ValueError: the previous checkpoint could not be written.
    """
    about = json.loads(json.dumps(about))
    about["checksum"] = checksum(state, about)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
      ),
    )

  def newest(self) -> int | None:
    """Returns the newest checkpoint's step once it is whole, or None."""
    self._manager.wait_until_finished()
    return self._manager.latest_step()

  def restore(self, like: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns (state, about) of the newest whole checkpoint, or None.

    Damaged ones that are newer are moved to the folder `damaged` beside this
    one, with a warning, so that their steps can be saved again.

    Args:
      like: a pytree of arrays or shapes as the state's.
      mesh: to put the state on; need not be the mesh it was saved from.

    Raises:
      InputError: there are checkpoints, but none is whole; or one cannot be
        read now, because memory ran out or the disk did not answer. All stay.
    """
    self._manager.wait_until_finished()
    abstract = described(like, mesh)
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      restored, reason = self._read(step, abstract)
      if not reason:
        self._set_aside(damaged, step)
        return restored
      # Its files, without the folder, which the error names already.
      damaged[step] = reason.replace(f"{self._folder / str(step)}/", "")
    if damaged:
      reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
      raise InputError(
        f"{self._folder}: none of its checkpoints is whole ({reasons}); choose"
        " another --workdir, or remove this folder to start from step 0"
      )
    return None

  def _read(self, step: int, abstract: Any) -> tuple[Any, str]:
    """Returns a checkpoint's (state, about), and what is wrong with it."""
    with _agreed() as found, self._reading(step):
      if jax.process_index() == 0:
        # Orbax reads many arrays at once, and when one fails, the others'
        # errors come up anywhere. So they are read one by one first.
        folder = self._folder / str(step) / "state"
        found.damage = _why_unreadable(folder, len(jax.tree.leaves(abstract)))
    if found.damage:
      return None, found.damage
    restored = None
    with _agreed() as found, self._reading(step):
      try:
        items = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            about=ocp.args.JsonRestore(),
          ),
        )
        about = dict(items.about)
        if about.pop("checksum") != checksum(items.state, about):
          found.damage = "it does not hold the numbers that were saved"
        restored = items.state, about
      except Exception as error:  # Whatever damaged files make Orbax raise.
        if passes(error):
          raise
        found.damage = first_line(error)
    return restored, found.damage

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Turns an error that damages no checkpoint into an `InputError`."""
    try:
      yield
    except Exception as error:  # What does not pass is a bug.
      if not passes(error):
        raise
      raise InputError(
        f"{self._folder / str(step)}: cannot be read now ({first_line(error)});"
        " it stays as it is: free memory or look after the disk, and start"
        " again"
      ) from error

  def _set_aside(self, damaged: Mapping[int, str], whole: int) -> None:
    """Moves damaged checkpoints out of the way, and says so."""
    if not damaged:
      return
    aside = self._folder.with_name("damaged")
    with _agreed(), writing(aside):
      if jax.process_index() == 0:
        aside.mkdir(exist_ok=True)
        for step, reason in damaged.items():
          names = itertools.chain(
            [f"{step}"], (f"{step}.{i}" for i in itertools.count(1))
          )
          place = next(aside / n for n in names if not (aside / n).exists())
          (self._folder / str(step)).rename(place)
          _log.warning(
            "%s: damaged (%s); moved to %s, resuming from step %d",
            self._folder / str(step), reason, place, whole,
          )  # fmt: skip
    self._manager.reload()

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.close()


# The messages of TensorStore, XLA and the operating system for errors without
# an errno that are no fault of the file.
_PASSING = re.compile(
  r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|[Oo]ut of memory"
  r"|Cannot allocate memory|Input/output error|Stale file handle|timed out"
  r"|Too many open files|Permission denied|Transport endpoint"
)
_PASSING_ERRNO = frozenset(
  [
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE,
    errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.EAGAIN,
  ]
)  # fmt: skip


def passes(error: BaseException) -> bool:
  """Returns whether an error is temporary: no memory, or a disk's hiccup.

  A checkpoint whose reading fails with such an error is not damaged.

  Args:
    error: with its causes, which count too.

  Example:
    >>> passes(MemoryError()), passes(ValueError("DATA_LOSS: bad checksum"))
    (True, False)
  """
  while error is not None:
    if isinstance(error, MemoryError | ConnectionError | TimeoutError):
      return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
      return True
    if _PASSING.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def checksum(state: Any, about: Mapping) -> int:
  """Returns a checksum that changes with any single bit of a checkpoint.

  It is the CRC-32 of `about` and of each array's sum of bits, modulo 2^32. Sums
  of integers do not depend on their order, so not on the mesh.

  Args:
    state: a pytree of arrays.
    about: a JSON object.

  Returns:
    An int of 32 bits.

  Example:
    >>> state = {"a": jnp.arange(3.0)}
    >>> checksum(state, {}) == checksum({"a": jnp.array([0.0, 1.0, 2.5])}, {})
    False
  """
  sums = [int(leaf) for leaf in jax.device_get(_sums(jax.tree.leaves(state)))]
  return zlib.crc32(json.dumps([about, sums], sort_keys=True).encode())


@jax.jit
def _sums(leaves):
  def one(x):
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return bits.sum(dtype=jnp.uint32)

  return [one(leaf) for leaf in leaves]


def _why_unreadable(folder: Path, count: int) -> str:
  """Returns why a folder's `count` arrays cannot all be read, or ""."""
  store = {
    "driver": "ocdbt",
    "base": {"driver": "file", "path": f"{folder}/"},
  }
  try:
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = [
      key.decode().removesuffix(".zarray")
      for key in keys
      if key.endswith(b"/.zarray")
    ]
    for name in names:
      kvstore = store | {"path": name}
      spec = {"driver": "zarr", "kvstore": kvstore}
      tensorstore.open(spec).result().read().result()
  except ValueError as error:
    if passes(error):
      raise OSError(first_line(error)) from error
    return first_line(error)
  return "" if len(names) == count else f"{len(names)} arrays, not {count}"


# Bytes of a reason that go from process to process.
_REASON = 4096


class _Outcome(enum.IntEnum):
  """The outcomes of a part of a restore, from best to worst."""

  FINE = 0
  DAMAGED = 1
  REFUSED = 2  # An InputError.
  FAILED = 3  # A bug.


@dataclasses.dataclass
class _Found:
  """The fault of a checkpoint, or "": in this process, then in any."""

  damage: str = ""


@contextlib.contextmanager
def _agreed() -> Iterator[_Found]:
  """Runs a part in every process, so that all of them go on or stop together.

  Without it, an error that process 0 alone meets would leave the others waiting
  for it in their next collective.

  Yields:
    What this process finds; afterwards that of the first one that found damage.

  Raises:
    InputError: a process raised it; all raise the same line.
    RuntimeError: another process raised any other error.
  """
  found, raised = _Found(), None
  outcome, reason = _Outcome.FINE, ""
  try:
    yield found
  except InputError as error:
    raised, outcome, reason = error, _Outcome.REFUSED, str(error)
  except Exception as error:  # It is raised again once the others know.
    raised, outcome, reason = error, _Outcome.FAILED, first_line(error)
  else:
    if found.damage:
      outcome, reason = _Outcome.DAMAGED, found.damage
  data = np.zeros(_REASON, np.uint8)
  text = np.frombuffer(reason.encode()[:_REASON], np.uint8)
  data[: text.size] = text
  outcomes, reasons = multihost_utils.process_allgather(
    (np.array(outcome, np.int32), data)
  )
  first = int(np.argmax(outcomes))
  reason = bytes(reasons[first]).rstrip(b"\0").decode(errors="ignore")
  if outcomes[first] == _Outcome.FAILED:
    raise raised or RuntimeError(f"process {first} failed: {reason}")
  if outcomes[first] == _Outcome.REFUSED:
    raise InputError(reason) from raised
  found.damage = reason
