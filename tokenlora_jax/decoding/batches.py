"""Groups prompts into batches for decoding.

Axis letters: B batch, P padded prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import math


def make_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Groups prompts of similar length into batches for decoding.

  A batch is padded to the bucket of its longest prompt, so prompts are sorted
  by length first. Then they are cut into as few batches as possible, of nearly
  equal
  size: few values of B, so few programs are compiled. Batches are ordered by
  their earliest prompt, so that texts come out in order as early as possible.

  Args:
    lengths: tokens of each prompt.
    size: the most prompts per batch.

  Returns:
    The indices of each batch's prompts; each index occurs once.

  Example:
    >>> make_batches([5, 300, 7, 9, 280], size=2)
    [[0, 2], [1], [3, 4]]
    >>> make_batches([9] * 5, size=4)
    [[0, 1, 2], [3, 4]]
  """
  order = sorted(range(len(lengths)), key=lengths.__getitem__)
  rows = math.ceil(len(order) / math.ceil(len(order) / size)) if order else 1
  parts = [order[i : i + rows] for i in range(0, len(order), rows)]
  return sorted((sorted(part) for part in parts), key=min)


def filled_batches(
  prompts: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
  """Yields (indices of a batch's prompts, the prompts of its rows).

  A short batch is filled up with copies of its last prompt, so that it needs no
  program of its own.

  Args:
    prompts: the tokens of each prompt.
    size: the most prompts per batch.

  Example:
    >>> list(filled_batches([[1], [2], [3]], size=2))
    [([0, 1], [[1], [2]]), ([2], [[3], [3]])]
  """
  parts = make_batches([len(prompt) for prompt in prompts], size)
  rows = max(map(len, parts))
  for places in parts:
    batch = [prompts[place] for place in places]
    yield places, batch + batch[-1:] * (rows - len(batch))
