"""Peak rates and memory of accelerators, from the makers' data sheets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates and memory of one accelerator.

  Attributes:
    kinds: its names in JAX (`device.device_kind` starts with one).
    flops: dense peak in bfloat16, FLOP/s.
    memory: bytes a program may use.
    memory_rate: bytes/s between the chip and its memory.
    network_rate: bytes/s that a chip can receive from its neighbours.
  """

  kinds: tuple[str, ...]
  flops: float
  memory: int
  memory_rate: float
  network_rate: float


_GIB = 2**30

# From the makers' data sheets. A TPU's runtime reserves part of the memory.
CHIPS = {
  "v4": Chip(("TPU v4",), 275e12, int(30.75 * _GIB), 1228e9, 300e9),
  "v5e": Chip(
    ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * _GIB), 819e9, 200e9
  ),
  "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, int(95.0 * _GIB), 2765e9, 600e9),
  "v6e": Chip(
    ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * _GIB), 1640e9, 448e9
  ),
  "a100": Chip(("NVIDIA A100",), 312e12, 80 * 10**9, 2039e9, 300e9),
  "h100": Chip(("NVIDIA H100",), 989e12, 80 * 10**9, 3350e9, 450e9),
  "h200": Chip(("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 450e9),
}


def chip_of(kind: str) -> Chip | None:
  """Returns the chip of a `device_kind`, or None if the table lacks it.

  Args:
    kind: JAX's name of the device, `device.device_kind`.

  Example:
    >>> chip_of("TPU v5 lite").flops / 1e12
    197.0
  """
  matches = [
    (len(prefix), name)
    for name, chip in CHIPS.items()
    for prefix in chip.kinds
    if kind.startswith(prefix)
  ]
  return CHIPS[max(matches)[1]] if matches else None
