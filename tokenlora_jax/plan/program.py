"""Counts FLOPs, transfers and memory traffic in a compiled program's text.

XLA's own cost analysis counts a loop's body once. Here each computation counts
as often as it runs: the entry once, a loop's body by its trip count, a called
computation as often as all its callers together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import re

import numpy as np

from tokenlora_jax.plan.groups import replica_groups

_SIZES = {
  "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1,
  "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "f16": 2,
  "bf16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(
  r"^\s+(ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)"
  r"\((?P<rest>.*)$"
)
_CALLS = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
  "collective-permute", "ragged-all-to-all",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
  """The type of an array.

  Attributes:
    dtype: XLA's name of it: `bf16`, `s32`.
    dims: the sizes of its axes.
    main: whether it is in the chip's main memory (HBM).

  Example:
    >>> Shape("bf16", (2, 3)).bytes
    12
  """

  dtype: str
  dims: tuple[int, ...]
  main: bool = True

  @property
  def bytes(self) -> float:
    """The array's size in bytes, without padding."""
    return math.prod(self.dims) * _SIZES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a program.

  Attributes:
    name: unique in its computation.
    shapes: of its results.
    op: XLA's opcode, as `fusion`.
    operands: the names of its operands.
    text: the rest of its line, after the opening bracket.
    root: whether it is its computation's result.
  """

  name: str
  shapes: tuple[Shape, ...]
  op: str
  operands: tuple[str, ...]
  text: str
  root: bool

  @property
  def bytes(self) -> float:
    """The size of its results in bytes."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def scope(self) -> str:
    """The scope in our code that it comes from, or ""."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ""


def _shapes(text: str) -> tuple[Shape, ...]:
  found = []
  for dtype, dims, layout in _SHAPE.findall(text):
    sizes = tuple(int(d) for d in dims.split(",") if d)
    # S(n), n > 0, is on-chip memory (VMEM, SMEM).
    found.append(Shape(dtype, sizes, not re.search(r"S\([1-9]", layout)))
  return tuple(found)


def _operands(rest: str) -> tuple[str, ...]:
  """Returns the names before the bracket that closes the operands."""
  depths = itertools.accumulate(
    (letter in "({") - (letter in ")}") for letter in rest
  )
  inside = itertools.takewhile(
    lambda pair: pair[1] >= 0, zip(rest, depths, strict=True)
  )
  text = "".join(letter for letter, _ in inside)
  return tuple(re.findall(r"%([\w.-]+)", text))


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective transfer between chips.

  Attributes:
    kind: one of `COLLECTIVES`.
    scope: the scope in our code that it comes from.
    count: number of runs.
    bytes: received by a chip in one run.
    groups: the groups of devices that exchange data, numbered as in the mesh.
  """

  kind: str
  scope: str
  count: int
  bytes: float
  groups: tuple[tuple[int, ...], ...]


class Program:
  """A compiled program, parsed from its text.

  Args:
    text: from `compiled.as_text()`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> lowered = jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(x)
    >>> Program(lowered.compile().as_text()).flops  # Two of 2 * 8**3.
    2048.0
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    for line in text.splitlines():
      if line and not line[0].isspace() and line.endswith("{"):
        head = re.match(r"(ENTRY )?%?([\w.-]+)", line)
        if head and "(" in line:
          current = self.computations.setdefault(head[2], [])
          self.entry = head[2] if head[1] else self.entry
      elif (found := _INSTRUCTION.match(line)) is not None:
        current.append(
          Instruction(
            found["name"],
            _shapes(found["type"]),
            found["op"],
            _operands(found["rest"]),
            found["rest"],
            bool(found[1]),
          )
        )

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """The number of runs of each computation."""
    runs = Counter({self.entry: 1})
    # The text lists callees before their callers.
    for name in reversed(self.computations):
      for instruction in self.computations[name]:
        times = runs[name]
        if instruction.op == "while":
          times *= self._trips(instruction)
        for one, many in _CALLS.findall(instruction.text):
          for callee in [one] if one else re.findall(r"%?([\w.-]+)", many):
            runs[callee] += times
    return runs

  def _trips(self, loop: Instruction) -> int:
    """Returns the trip count of a loop that counts from 0 to a constant."""
    known = re.search(r'known_trip_count[^}]*"n":"(\d+)"', loop.text)
    if known:
      return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.text)[1]
    constants = [
      int(found[1])
      for instruction in self._with_callees(condition)
      if instruction.op == "constant"
      and (found := re.match(r"(\d+)\)", instruction.text))
    ]
    return max(constants, default=1)

  def _with_callees(self, name: str) -> Iterator[Instruction]:
    for instruction in self.computations[name]:
      yield instruction
      for one, _ in _CALLS.findall(instruction.text):
        if one:
          yield from self._with_callees(one)

  def _all(self) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
    for name, instructions in self.computations.items():
      if self.runs[name]:
        by_name = {i.name: i for i in instructions}
        for instruction in instructions:
          yield instruction, self.runs[name], by_name

  # ---------------------------------------------------------------------------

  @functools.cached_property
  def flops(self) -> float:
    """FLOPs of one device's matrix products, without fused kernels."""
    total = 0.0
    for instruction, runs, by_name in self._all():
      if instruction.op in ("convolution", "dot", "custom-call"):
        operands = [by_name[n].shapes for n in instruction.operands]
        total += runs * _product_flops(instruction, operands)
    return total

  @functools.cached_property
  def kernels(self) -> Counter[str]:
    """The number of runs of each fused kernel, by its name."""
    found: Counter[str] = Counter()
    for instruction, runs, _ in self._all():
      if "tpu_custom_call" in instruction.text or "fmha" in instruction.text:
        found[instruction.name.partition(".")[0]] += runs
    return found

  @functools.cached_property
  def collectives(self) -> list[Collective]:
    """The transfers, each once even where XLA splits it into steps."""
    seen: dict[str, Collective] = {}
    for instruction, runs, by_name in self._all():
      kind = instruction.op.removesuffix("-start")
      if kind not in COLLECTIVES:
        continue
      # The steps of one asynchronous transfer share a chain.
      chain = re.search(r'chain_id="(\d+)"', instruction.text)
      groups = replica_groups(instruction.text)
      size = len(groups[0]) if groups else 1
      made = [s.bytes for s in instruction.shapes]
      given = [s.bytes for n in instruction.operands for s in by_name[n].shapes]
      received = {
        # A started gather names its input beside its output.
        "all-gather": max(made) if len(given) == 1 else sum(made),
        "all-reduce": 2 * sum(given),
        "reduce-scatter": sum(given),
        "all-to-all": sum(given),
      }.get(kind, sum(given))
      if kind != "collective-permute":
        received *= (size - 1) / size
      one = Collective(kind, instruction.scope, runs, received, groups)
      key = f"chain {chain[1]}" if chain else instruction.name
      if key not in seen or seen[key].count < runs:
        seen[key] = one
    return list(seen.values())

  @functools.cached_property
  def memory_traffic(self) -> float:
    """Bytes that one device reads from and writes to its main memory."""
    inner = {
      callee
      for instruction, _, _ in self._all()
      if instruction.op != "while" and instruction.op != "conditional"
      for callee, _ in _CALLS.findall(instruction.text)
    }
    total = 0.0
    for name, instructions in self.computations.items():
      if name in inner or not self.runs[name]:
        continue
      by_name = {i.name: i for i in instructions}
      for instruction in instructions:
        total += self.runs[name] * self._traffic(instruction, by_name)
    return total

  def _traffic(self, instruction, by_name) -> float:
    op = instruction.op
    if op in _FREE or op.endswith("-done"):
      return 0.0
    sizes = [_main(by_name[n]) for n in instruction.operands]
    out = _main(instruction)
    if op == "dynamic-slice":
      return 2 * out
    if op == "dynamic-update-slice":
      return 2 * sizes[1]
    if op in ("copy-start", "slice-start"):
      # Its shapes are source and destination, either of which may be on-chip.
      ends = [s for s in instruction.shapes if s.dims]
      moved = min(s.bytes for s in ends)
      return moved * sum(s.main for s in ends)
    if op == "fusion":
      body = self.computations[_CALLS.search(instruction.text)[1]]
      reads = [min(size, _read_of(body, i)) for i, size in enumerate(sizes)]
      return sum(reads) + min(out, _written_by(body, out))
    return out + sum(sizes)


_FREE = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while",
  "conditional", "after-all", "partition-id", "replica-id", "iota", "call",
}  # fmt: skip


def _main(instruction: Instruction) -> float:
  return sum(s.bytes for s in instruction.shapes if s.main)


def _read_of(body: list[Instruction], index: int) -> float:
  """Returns the bytes that a fusion reads of an operand: a slice or inf."""
  [parameter] = [
    i for i in body
    if i.op == "parameter" and i.text.startswith(f"{index})")
  ]  # fmt: skip
  names, total = {parameter.name}, 0.0
  for instruction in body:
    if not names & set(instruction.operands):
      continue
    if instruction.op == "bitcast":
      names.add(instruction.name)
    elif instruction.op in ("dynamic-slice", "gather", "slice"):
      total += instruction.bytes
    elif (
      instruction.op == "dynamic-update-slice"
      and instruction.operands[0] in names
    ):
      continue
    else:
      return math.inf
  return total


def _written_by(body: list[Instruction], out: float) -> float:
  """Returns the bytes that a fusion writes: the slice, if it updates one."""
  by_name = {i.name: i for i in body}
  [root] = [i for i in body if i.root]
  while root.op == "bitcast":
    root = by_name[root.operands[0]]
  if root.op == "dynamic-update-slice":
    return by_name[root.operands[1]].bytes
  return out


def _product_flops(instruction, operands) -> float:
  out = math.prod(instruction.shapes[0].dims)
  if instruction.op == "convolution":
    return _convolution_flops(instruction, operands[0][0], operands[1][0])
  # A dot or a library call; both name the contracted axes.
  found = re.search(
    r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)[\]}]',
    instruction.text,
  )
  if not found:
    return 0.0
  axes = re.findall(r"\d+", found[1])
  return 2.0 * out * math.prod(operands[0][0].dims[int(i)] for i in axes)


def _convolution_flops(instruction, lhs: Shape, rhs: Shape) -> float:
  """Returns 2 FLOPs a pair of elements, padding left out, as XLA counts."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
  window = re.search(r"window=\{([^}]*)\}", instruction.text)
  settings = dict(
    part.split("=", 1) for part in (window[1].split() if window else [])
  )
  left, right, made = (dict(zip(label, s.dims, strict=True))
    for label, s in zip(
      labels.groups(), (lhs, rhs, instruction.shapes[0]), strict=True)
  )  # fmt: skip
  spatial = sorted(label for label in left if label.isdigit())

  def numbers(name, default):
    text = settings.get(name)
    return text.split("x") if text else [default] * len(spatial)

  pairs = 1
  for axis, size, stride, pad, left_dilate, right_dilate in zip(
    spatial,
    numbers("size", "1"),
    numbers("stride", "1"),
    numbers("pad", "0_0"),
    numbers("lhs_dilate", "1"),
    numbers("rhs_dilate", "1"),
    strict=True,
  ):
    places = (
      np.arange(made[axis])[:, None] * int(stride)
      + np.arange(int(size))[None] * int(right_dilate)
      - int(pad.partition("_")[0])
    )
    dilate = int(left_dilate)
    inside = (places >= 0) & (places <= (left[axis] - 1) * dilate)
    pairs *= int((inside & (places % dilate == 0)).sum())
  return 2.0 * made["b"] * made["f"] * right["i"] * pairs
