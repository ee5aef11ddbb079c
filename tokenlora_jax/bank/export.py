"""Exports a mixture under fixed gates as one PEFT adapter, for other servers.

Axis letters: E experts, R rank of one expert, K = the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import numbers
from pathlib import Path

from jaxtyping import Float, Real
import numpy as np

from tokenlora_jax.config import InputError, check
from tokenlora_jax.formats.peft import Factors, expert_maps, write_adapter
from tokenlora_jax.model.lora import Adapters


@dataclasses.dataclass(frozen=True)
class Exported:
  """Rank and errors of an exported adapter.

  Attributes:
    rank: the adapter's rank.
    errors: by layer and projection, |M' - M| / |M| (Frobenius), with M the map
      of the exact mixture and M' that of the adapter.
    error: the same over all maps together.
  """

  rank: int
  errors: Mapping[tuple[int, str], float]
  error: float


def export_mixture(
  adapters: Adapters,
  gates: Sequence[float] | Real[np.ndarray, "..."],
  folder: str | Path,
  rank: float | None = None,
  base_name: str = "",
) -> Exported:
  """Writes the mixture under fixed gates as one PEFT folder.

  A map of the mixture is M = sum_e g_e s_e A_e^T B_e. At full rank K the rows
  of all A_e and of all g_e s_e B_e are concatenated (PEFT's "cat"). A smaller
  rank gets the nearest map of that rank (Eckart and Young, 1936), by the SVD of
  M = (Q1 R1)(Q2 R2)^T, whose singular values are those of R1 R2^T: no [in, out]
  array is built.

  All maps get one rank, and alpha / r is 1: vLLM reads neither `rank_pattern`
  nor `alpha_pattern`. Experts with gate 0 add nothing to K.

  Args:
    adapters: E experts.
    gates: float[E]; may be negative.
    folder: the PEFT folder, made if need be; an adapter there is replaced.
    rank: the largest rank allowed; None is K, which is exact.
    base_name: the base's path or hub id.

  Returns:
    The rank, and the errors against the exact mixture.

  Raises:
    InputError: the gates are not E finite numbers or leave a map of zeros, the
      rank is below 1, or the folder holds something else.

  Example:
    >>> import tempfile
    >>> from tokenlora_jax import load_base, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   exact = export_mixture(adapters, [0.5, -0.25], folder)
    ...   small = export_mixture(adapters, [0.5, -0.25], folder, rank=2)
    >>> exact.rank, exact.error, small.rank, 0 < small.error < 1
    (8, 0.0, 2, True)
  """
  gates = np.asarray(gates, np.float64)
  names = adapters.names
  if gates.shape != (len(names),):
    raise InputError(
      f"gates: {gates.size} numbers for {len(names)} experts"
      f" ({', '.join(names)})"
    )
  check(bool(np.isfinite(gates).all()), "gates", gates.tolist(), "finite ones")
  whole = isinstance(rank, numbers.Integral) and rank >= 1
  check(rank is None or whole, "rank", rank, "a whole number of at least 1")
  mixed = _concatenated(adapters, gates)
  if not mixed:
    raise InputError(
      f"gates: {gates.tolist()} leave nothing of {', '.join(names)} to export"
    )
  lost = dict.fromkeys(mixed, 0.0)
  norms = {place: 1.0 for place in mixed}
  if rank is not None:
    for place, (a, b, _) in mixed.items():
      mixed[place], lost[place], norms[place] = _truncated(a, b, rank)
  widest = max(len(a) for a, _, _ in mixed.values())
  write_adapter(
    folder, {p: _padded(x, widest) for p, x in mixed.items()}, base_name
  )
  return Exported(
    widest,
    {place: _ratio(lost[place], norms[place]) for place in mixed},
    _ratio(math.hypot(*lost.values()), math.hypot(*norms.values())),
  )


def _concatenated(
  adapters: Adapters, gates: Float[np.ndarray, " E"]
) -> dict[tuple[int, str], Factors]:
  """Returns the exact mixture's maps: a [K, in], b [K, out], scaling 1."""
  parts: dict[tuple[int, str], list[Factors]] = {}
  for name, gate in zip(adapters.names, gates, strict=True):
    for place, (a, b, scaling) in expert_maps(adapters, name).items():
      if gate * scaling:
        part = Factors(a, gate * scaling * b.astype(np.float64), 1.0)
        parts.setdefault(place, []).append(part)
  return {
    place: Factors(
      np.concatenate([a for a, _, _ in found]),
      np.concatenate([b for _, b, _ in found]),
      1.0,
    )
    for place, found in sorted(parts.items())
  }


def _truncated(
  a: Float[np.ndarray, "K I"], b: Float[np.ndarray, "K O"], rank: int
) -> tuple[Factors, float, float]:
  """Returns a^T b cut to this rank, the norm of the rest, and |a^T b|."""
  q1, r1 = np.linalg.qr(a.T.astype(np.float64))
  q2, r2 = np.linalg.qr(b.T.astype(np.float64))
  u, s, vt = np.linalg.svd(r1 @ r2.T, full_matrices=False)
  root = np.sqrt(s[:rank, None])  # On each side, so that neither gets large.
  near = Factors(root * (q1 @ u[:, :rank]).T, root * (q2 @ vt[:rank].T).T, 1.0)
  return near, float(np.linalg.norm(s[rank:])), float(np.linalg.norm(s))


def _padded(factors: Factors, rank: int) -> Factors:
  """Returns factors in float32, padded with zero rows up to a rank."""
  rows = ((0, rank - len(factors.a)), (0, 0))
  a, b = (np.pad(x, rows).astype(np.float32) for x in factors[:2])
  return Factors(a, b, factors.scaling)


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
