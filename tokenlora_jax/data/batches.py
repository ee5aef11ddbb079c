"""Batches [E, B, T] of all experts, planned from the rows' lengths alone.

A *bin* is the content of one row of a batch: the indices of one row of the task
or, with packing, of several.

  lengths {0: 6, 1: 7, 2: 3, 3: 4}, T = 10  ->  bins [[0, 3], [1, 2]]

All processes know all lengths, and so the bins of every step. Each tokenizes
and builds only its own devices' shard.

Axes: E experts (tasks), B rows an expert, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import sys
import zlib

import grain
from jax.sharding import Mesh
from jaxtyping import Int, Num
import numpy as np

from tokenlora_jax.config import DataConfig
from tokenlora_jax.data.examples import LENGTH_STEP, fitting, tokenize
from tokenlora_jax.data.rows import Row
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.parallel.sharding import process_block

Bin = Sequence[int]
# The arrays of a batch on the host, by name; see `batches`.
HostBatch = dict[
  str,
  Num[np.ndarray, "E B T"]
  | Int[np.ndarray, "E_all B_all"]
  | list[Int[np.ndarray, " _"]],
]


def pack(
  lengths: Mapping[int, int], order: Iterable[int], capacity: int
) -> list[list[int]]:
  """Packs rows into few bins, each row into the fullest bin with enough room.

  Best fit (Johnson et al., 1974): at most 1.7 times as many bins as the fewest
  possible, and in practice little more than the tokens need.

  Args:
    lengths: tokens of each row, at most `capacity`.
    order: the rows, in the order of packing.
    capacity: the most tokens in a bin.

  Returns:
    Bins in the order in which they were opened; in each the rows in the order
    of packing.

  Example:
    >>> pack({0: 6, 1: 7, 2: 3, 3: 4}, [0, 1, 2, 3], capacity=10)
    [[0, 3], [1, 2]]
  """
  bins: list[list[int]] = []
  # Bins by their free room. Bit r of `rooms` is set if some bin has room r, so
  # one shift finds the least room of at least n.
  by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
  rooms = 0
  for row in order:
    length = lengths[row]
    if enough := rooms >> length:
      room = length + (enough & -enough).bit_length() - 1
      chosen = by_room[room].pop()
      if not by_room[room]:
        rooms ^= 1 << room
    else:
      room, chosen = capacity, []
      bins.append(chosen)
    chosen.append(row)
    room -= length
    by_room[room].append(chosen)
    rooms |= 1 << room
  return bins


def batches(
  rows_by_task: Mapping[str, Sequence[Row]],
  tokenizer: Tokenizer,
  config: DataConfig,
  mesh: Mesh | None = None,
) -> grain.IterDataset:
  """Returns an endless dataset of batches, one per optimizer step.

  Step i depends on the rows and `config` alone, not on the number of processes.
  Each task is shuffled anew every epoch, independently of the other tasks. With
  `config.packing` bins are shuffled; their rows are packed once. The iterator's
  `get_state` and `set_state` hold the position, for checkpoints.

  Args:
    rows_by_task: the training rows of each task of `config.tasks`.
    tokenizer: a transformers-style tokenizer.
    config: the experts' order, B, the longest T, packing and the seed.
    mesh: this process builds the shard of its devices in this mesh; without a
      mesh the whole batch.

  Returns:
    Batches as dicts. This process's shard, with experts in the order of
    `config.tasks`; T is the smallest multiple of 64 that holds the longest row
    of the whole batch, at most `config.length`:
      tokens: int32[E, B, T], 0 in the padding.
      positions: int32[E, B, T], from 0 in each segment.
      segment_ids: int32[E, B, T], 1, 2, ... for the rows of a bin, 0 for
        padding.
      loss_mask: float32[E, B, T], 1 where a token is a target (not shifted).
    The whole batch, the same in all processes:
      rows: E arrays, int32, the indices in `rows_by_task[task]` of the first
        bin's rows, then of the second's, and so on.
      sizes: int32[E, B], the tokens of each bin.

  Raises:
    InputError: no row of a task fits, or the mesh cannot be divided among the
      processes.
  """
  builder = _Builder.make(rows_by_task, tokenizer, config, mesh, sys.maxsize)
  streams = []
  for task, lengths in zip(config.tasks, builder.lengths, strict=True):
    seed = zlib.crc32(f"{config.seed}:{task}".encode())
    bins = [[row] for row in lengths]
    if config.packing:
      # Shuffled, since neighbours in a file may share one text.
      order = np.random.default_rng(seed).permutation(list(lengths))
      bins = pack(lengths, order.tolist(), config.length)
    streams.append(grain.MapDataset.source(bins).shuffle(seed).repeat())

  def batch(step: int) -> HostBatch:
    places = range(step * config.rows, (step + 1) * config.rows)
    return builder([[stream[i] for i in places] for stream in streams])

  steps = grain.MapDataset.range(sys.maxsize // config.rows).map(batch)
  return steps.to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  )


def held_out_batches(
  rows_by_task: Mapping[str, Sequence[Row]],
  tokenizer: Tokenizer,
  config: DataConfig,
  mesh: Mesh | None = None,
) -> list[HostBatch]:
  """Returns the rows of `held_out` as batches in the format of `batches`.

  Rows are sorted by length, one per bin, so that there is little padding. A task
  with fewer rows than another gets empty bins, without tokens or targets.

  Args:
    rows_by_task: the held-out rows of each task of `config.tasks`.
    tokenizer: a transformers-style tokenizer.
    config: the experts' order, B and the longest T.
    mesh: see `batches`.
  """
  builder = _Builder.make(
    rows_by_task, tokenizer, config, mesh, config.eval_rows
  )
  by_length = [sorted(lengths, key=lengths.get) for lengths in builder.lengths]

  def bins(rows: Sequence[int], start: int) -> list[Bin]:
    return [rows[i : i + 1] for i in range(start, start + config.rows)]

  starts = range(0, max(map(len, by_length)), config.rows)
  return [
    builder([bins(rows, start) for rows in by_length]) for start in starts
  ]


@dataclasses.dataclass(frozen=True)
class _Builder:
  """Builds batches from the bins of all experts.

  Attributes:
    rows: the rows of each expert.
    lengths: per expert {row: tokens} of the rows that fit.
    tokenizer: a transformers-style tokenizer.
    config: see `batches`.
    experts: indices of the batch's experts that this process builds.
    places: indices of the batch's rows that this process builds.
  """

  rows: Sequence[Sequence[Row]]
  lengths: Sequence[Mapping[int, int]]
  tokenizer: Tokenizer
  config: DataConfig
  experts: Sequence[int]
  places: Sequence[int]

  @classmethod
  def make(cls, rows_by_task, tokenizer, config, mesh, most):
    rows = [rows_by_task[task] for task in config.tasks]
    block = range(len(rows)), range(config.rows)
    if mesh is not None:
      block = process_block(mesh, len(rows), config.rows)
    lengths = [fitting(some, tokenizer, config, most) for some in rows]
    return cls(rows, lengths, tokenizer, config, *block)

  def __call__(self, bins: Sequence[Sequence[Bin]]) -> HostBatch:
    sizes = np.array(
      [
        [sum(lengths[row] for row in rows) for rows in expert]
        for lengths, expert in zip(self.lengths, bins, strict=True)
      ],
      np.int32,
    )
    # The smallest multiple that holds the bins of every process.
    steps = -(-int(sizes.max()) // LENGTH_STEP)
    length = min(steps * LENGTH_STEP, self.config.length)
    shape = (len(self.experts), len(self.places), length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    batch = {
      "tokens": np.zeros(shape, np.int32),
      "positions": positions,
      "segment_ids": np.zeros(shape, np.int32),
      "loss_mask": np.zeros(shape, np.float32),
    }
    for e, expert in enumerate(self.experts):
      for b, place in enumerate(self.places):
        end = 0
        for segment, row in enumerate(bins[expert][place], 1):
          example = tokenize(
            self.rows[expert][row], self.tokenizer, self.config
          )
          start, end = end, end + len(example.tokens)
          here = e, b, slice(start, end)
          batch["tokens"][here] = example.tokens
          batch["positions"][here] = np.arange(end - start)
          batch["segment_ids"][here] = segment
          batch["loss_mask"][here] = example.loss_mask
    rows = [np.array([*itertools.chain(*expert)], np.int32) for expert in bins]
    return batch | {"rows": rows, "sizes": sizes}
