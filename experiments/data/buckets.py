"""Batches of rows of similar length, cut to a few widths: fewer tokens are padding.

Rows are shuffled as ever. Each window of 16 batches is then sorted by length and split into
batches, whose order is shuffled too. A batch loses the columns that only padding uses, down to one
of a few sets of widths, since the step is compiled once for each.
"""

import math
from typing import Any

import numpy as np

from sharding import checks

WINDOW = 16  # batches that are sorted together
_MULTIPLE = 8  # of which widths are


def check(num_buckets: Any) -> None:
  """Raises `ValueError` unless there can be so many sets of widths: each compiles a program."""
  checks.count("data.length_buckets", num_buckets, most=64)


class Buckets:
  """The widths of a data set, and the rows of each batch.

  Args:
    arrays: a NamedTuple of arrays with a leading axis of N rows. A field `mask` or `x_mask`, whose
      last axis is that of tokens, belongs to a field `tokens` or `x_tokens`. Padding is on one side
      of all rows, on the left or on the right.
    num_buckets: the number of sets of widths, at least 1.

  Raises:
    ValueError: `num_buckets` is out of range, or `arrays` have no masks of tokens.
  """

  def __init__(self, arrays: Any, num_buckets: int):
    check(num_buckets)
    self._fields: dict[str, _Field] = {}
    for name in getattr(arrays, "_fields", ()):
      tokens = name.removesuffix("mask") + "tokens"
      if name.endswith("mask") and hasattr(arrays, tokens):
        mask = np.asarray(getattr(arrays, name))
        if mask.ndim > 1 and mask.shape == np.shape(getattr(arrays, tokens)):
          self._fields[name] = self._fields[tokens] = _Field(mask)
    if not self._fields:
      raise ValueError(
        "data.length_buckets groups rows by their number of tokens, and the training examples are "
        "not tokens: set it to 1"
      )
    self._masks = masks = [field for name, field in self._fields.items() if name.endswith("mask")]
    # Rows are ordered by their longest text, which decides how wide a batch is. The sum would put
    # a row with one long text beside rows with two short ones.
    total = sum(field.lengths * field.copies for field in masks)
    longest = np.max([field.lengths for field in masks], axis=0)
    self._order = np.lexsort((total, longest))
    self._rank = np.argsort(self._order)
    num_rows = len(self._order)
    ends = np.ceil(np.arange(1, num_buckets + 1) * num_rows / num_buckets).astype(int)
    self._bucket = np.searchsorted(ends, self._rank, side="right")
    for size in {field.size for field in masks}:
      alike = [field for field in masks if field.size == size]  # updates may join them: one width
      lengths = np.max([field.lengths for field in alike], axis=0)
      needed = [int(lengths[self._order[:end]].max(initial=1)) for end in ends]
      for field in alike:
        field.widths = [min(size, -(-n // _MULTIPLE) * _MULTIPLE) for n in needed]

  def sorted(self, rows: np.ndarray) -> np.ndarray:
    """Returns these rows by length, the shortest first."""
    return rows[np.argsort(self._rank[rows], kind="stable")]

  def cut(self, batch: Any, rows: np.ndarray) -> Any:
    """Returns the batch of these rows without columns that hold nothing but padding."""
    bucket = int(self._bucket[rows].max())
    return batch._replace(
      **{name: field.cut(getattr(batch, name), bucket) for name, field in self._fields.items()}
    )

  def padding(self, rows: Any) -> float:
    """Returns the share of padding in batches, given the rows of each."""
    masks = self._masks
    used = size = 0.0
    for batch in rows:
      bucket = int(self._bucket[batch].max())
      used += sum(float(field.used[batch].sum()) for field in masks)
      size += sum(len(batch) * field.copies * field.widths[bucket] for field in masks)
    return 1 - used / size


class _Field:
  """The lengths of the rows of one mask, and the widths that its arrays are cut to."""

  def __init__(self, mask: np.ndarray):
    self.size, self.copies = mask.shape[-1], math.prod(mask.shape[1:-1])
    kept = (mask != 0).reshape(len(mask), -1, self.size)
    self.used = kept.sum((1, 2))
    columns = kept.any(1)
    self.left = bool((columns.any(1) & ~columns[:, 0]).any())
    numbers = np.arange(self.size, 0, -1) if self.left else np.arange(1, self.size + 1)
    self.lengths = np.max(columns * numbers, axis=1)
    self.widths: list[int] = []

  def cut(self, array: np.ndarray, bucket: int) -> np.ndarray:
    width = self.widths[bucket]
    return array[..., self.size - width :] if self.left else array[..., :width]
