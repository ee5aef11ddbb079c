"""The groups of devices of a collective, from a compiled program's text."""

from __future__ import annotations

import math
import re

import numpy as np


def replica_groups(text: str) -> tuple[tuple[int, ...], ...]:
  """Returns a collective's groups of devices, from any of XLA's notations.

  Args:
    text: of the instruction.

  Returns:
    The groups, or () for one group of all devices.

  Example:
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), x")
    ((0, 2), (1, 3))
  """
  pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
  if pairs:
    found = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
    return _rings([(int(a), int(b)) for a, b in found])
  listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
  if listed:
    return tuple(
      tuple(int(n) for n in group.split(","))
      for group in re.findall(r"\{([\d,]+)\}", listed[1])
    )
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  )
  if iota:
    shape, dims = (list(map(int, iota[i].split(","))) for i in (1, 2))
    devices = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      devices = devices.transpose(list(map(int, iota[3].split(","))))
    return tuple(map(tuple, devices.reshape(shape).tolist()))
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
  if mesh:
    sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    named = re.findall(r"'(\w+)'", mesh[2])
    devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    last = [list(sizes).index(n) for n in named]
    first = [i for i in range(len(sizes)) if i not in last]
    size = math.prod(sizes[n] for n in named)
    groups = devices.transpose(first + last).reshape(-1, size)
    return tuple(map(tuple, groups.tolist()))
  return ()


def _rings(pairs: list[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
  """Returns the groups of devices that a permutation connects."""
  group = {n: {n} for pair in pairs for n in pair}
  for a, b in pairs:
    if group[a] is not group[b]:
      group[a] |= group[b]
      for n in group[b]:
        group[n] = group[a]
  unique = {id(g): tuple(sorted(g)) for g in group.values()}
  return tuple(unique.values())


def crosses(groups, mesh_shape: dict[str, int], axis: str) -> bool:
  """Returns whether a group has devices at different places on a mesh axis.

  Args:
    groups: as in `Collective`; () is one group of all devices.
    mesh_shape: {axis: devices}, in the mesh's order.
    axis: one of them.

  Example:
    >>> crosses(((0, 1), (2, 3)), {"expert": 2, "fsdp": 2}, "expert")
    False
  """
  places = np.unravel_index(
    np.arange(math.prod(mesh_shape.values())), tuple(mesh_shape.values())
  )[list(mesh_shape).index(axis)]
  groups = groups or [range(len(places))]
  return any(len({int(places[n]) for n in group}) > 1 for group in groups)
