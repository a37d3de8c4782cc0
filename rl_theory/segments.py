"""Sums over segments of an array that are known in advance, by gathers instead of scatters.

A scatter is serial on a CPU; on a GPU it uses atomics, so its sums are not reproducible. Here
segments of similar size are the rows of one table of positions, padded with a position that holds
zero. A sum is then a gather and a reduction over rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_NARROW = 8  # columns of a table


class Segments(NamedTuple):
  """Which entries of an array `[N, ...]` belong to which of `G` segments.

  Attributes:
    rows: tables `[n, w]` int32 of positions in the array; N pads rows shorter than w.
    order: `[G]` int32, the row of each segment when the tables are stacked; the row after the last
      for an empty segment.
  """

  rows: tuple[Any, ...]
  order: Any


def make(ids: np.ndarray, num_segments: int) -> Segments:
  """Returns the segments of an array whose entry k belongs to `ids[k]`, as NumPy arrays.

  Example:
    >>> segment_sum(jnp.array([1.0, 2.0, 4.0, 8.0]), make(np.array([2, 0, 2, 2]), 4))
    Array([ 2.,  0., 13.,  0.], dtype=float32)
  """
  ids = np.asarray(ids)
  by_segment = np.argsort(ids, kind="stable")
  counts = np.bincount(ids, minlength=num_segments)
  starts = np.cumsum(counts) - counts
  buckets = np.ceil(np.log2(np.maximum(counts, 1))).astype(int)  # padding at most doubles a row
  order = np.full(num_segments, np.count_nonzero(counts))
  rows, num_rows = [], 0
  for bucket in np.unique(buckets[counts > 0]):
    members = np.flatnonzero((buckets == bucket) & (counts > 0))
    column = np.arange(counts[members].max())
    taken = np.minimum(starts[members, None] + column, len(ids) - 1)
    table = np.where(column < counts[members, None], by_segment[taken], len(ids))
    rows.append(table.astype(np.int32))
    order[members] = num_rows + np.arange(len(members))
    num_rows += len(members)
  return Segments(tuple(rows), order.astype(np.int32))


def take(values: jax.Array, positions: Any) -> jax.Array:
  """Returns `values[positions]`; the positions must be valid, because nothing checks them."""
  return values.at[positions].get(mode="promise_in_bounds", wrap_negative_indices=False)


def gather(values: jax.Array, segments: Segments, padding: float = 0) -> tuple[jax.Array, ...]:
  """Returns the values `[N]` laid out as the tables `[n, w]`, with `padding` where they pad."""
  padded = jnp.concatenate([values, jnp.full(1, padding, values.dtype)])
  return tuple(take(padded, table) for table in segments.rows)


def sum_rows(tables: tuple[jax.Array, ...], segments: Segments, dtype: jnp.dtype) -> jax.Array:
  """Returns the sums `[G]` over the rows of tables `[n, w]` that are laid out as by `gather`."""
  sums = [_sum_row(table) for table in tables]
  return take(jnp.concatenate([*sums, jnp.zeros(1, dtype)]), segments.order)


def _sum_row(table: jax.Array) -> jax.Array:
  """Sums narrow rows column by column, because XLA on a CPU adds up a row one by one."""
  if table.shape[1] > _NARROW:
    return jnp.sum(table, axis=1)
  return functools.reduce(jnp.add, [table[:, column] for column in range(table.shape[1])])


def segment_sum(values: jax.Array, segments: Segments) -> jax.Array:
  """Returns the sum of each segment of the values `[N]`, `[G]`; 0 for an empty segment."""
  return sum_rows(gather(values, segments), segments, values.dtype)


def segment_max(values: jax.Array, segments: Segments) -> jax.Array:
  """Returns the maximum of each segment of the values `[N]`, `[G]`; -inf for an empty segment."""
  largest = [jnp.max(table, axis=1) for table in gather(values, segments, -jnp.inf)]
  return take(jnp.concatenate([*largest, jnp.full(1, -jnp.inf, values.dtype)]), segments.order)
