"""Sums over the neighbours of each node, and their gradients, at the speed of memory.

  y[r] = sum of weights[slot] * x[sender of the slot], over the slots of receiver r.

A scatter-add has to handle two edges that write to one place. On a CPU, XLA's sorted segment sum
takes twenty times as long as the memory traffic needs. Here the edges lie in rows of at most K
slots (`Neighbours`). Every row belongs to one receiver, and a receiver has as many rows as it needs
for its neighbours, so a hub costs no more than its edges. A row is K gathers that are summed in
registers; a segment sum joins only the rows of the same receiver. The gradient is the same sum over
the rows of the transposed graph, so it needs no scatter either.

Weights and masks of edges are arrays `[R, K]` with one entry for each slot: `weights[i, k]` belongs
to the edge from `senders[i, k]` to `receivers[i]`. A random mask that is drawn in this shape needs
no further gather. `to_slots` brings an array with one entry for each edge into this shape.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import checks

_CHUNKS = (4, 8, 16, 32)
_BLOCK = 512  # rows whose products are computed at once
_JOIN = 3  # cost of joining one row, in units of one slot (measured on two CPU cores, 256 features)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["senders", "receivers", "mask", "edges"],
  meta_fields=["num_receivers"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
  """Edges in R rows of K slots; all edges of a row have the same receiver.

  Attributes:
    senders: `[R, K]` int32; 0 in empty slots.
    receivers: `[R]` int32, ascending; nodes without neighbours have no row.
    mask: `[R, K]` bool, false in empty slots.
    edges: `[R, K]` int32, the position of each edge in the list of edges; 0 in empty slots. In
      transposed rows, the position of the edge among the slots of the forward rows.
    num_receivers: number of nodes that can receive; static.
  """

  senders: Any
  receivers: Any
  mask: Any
  edges: Any
  num_receivers: int


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rows", "transposed"],
  meta_fields=["num_edges", "num_blocks"],
)
@dataclasses.dataclass(frozen=True)
class Neighbours:
  """The edges of a graph, laid out by `layout` for `neighbour_sum` and its gradient.

  Attributes:
    rows: the edges by receiver.
    transposed: the edges by sender; its `edges` point into the flattened slots of `rows`.
    num_edges: length of the list of edges; static.
    num_blocks: number of equal blocks of nodes and rows without an edge between two of them;
      static. Sums are taken block by block, so with one block on each device no data moves.
  """

  rows: Rows
  transposed: Rows
  num_edges: int
  num_blocks: int = 1

  @property
  def num_receivers(self) -> int:
    """Number of nodes that can receive."""
    return self.rows.num_receivers

  @property
  def num_senders(self) -> int:
    """Number of nodes that can send."""
    return self.transposed.num_receivers

  @property
  def mask(self) -> jax.Array:
    """`[R, K]` bool, the slots that hold an edge."""
    return self.rows.mask

  @property
  def senders(self) -> jax.Array:
    """`[R, K]` int32, the sender of each slot."""
    return self.rows.senders

  @property
  def receivers(self) -> jax.Array:
    """`[R]` int32, the receiver of each row."""
    return self.rows.receivers


def layout(
  senders: Any,
  receivers: Any,
  *,
  num_receivers: int,
  num_senders: int | None = None,
  chunk_size: int | None = None,
  num_rows_multiple: int = 1,
) -> Neighbours:
  """Returns the layout of a list of directed edges; call it once for each graph, on the host.

  Args:
    senders: `[E]` int.
    receivers: `[E]` int.
    num_receivers: number of nodes that can receive.
    num_senders: number of nodes that can send; the default is `num_receivers`.
    chunk_size: K; the default is the cheapest of 4, 8, 16 and 32, chosen for each direction.
    num_rows_multiple: empty rows are added until the number of rows is a multiple of this, such as
      the number of devices that share them.

  Raises:
    ValueError: if the lists differ in length or an index is out of range.
  """
  num_senders = num_receivers if num_senders is None else num_senders
  if chunk_size is not None:
    checks.count("chunk_size", chunk_size)
  checks.count("num_rows_multiple", num_rows_multiple)
  senders, receivers = checked_edges(senders, receivers, num_receivers, num_senders)
  options: Any = {"chunk_size": chunk_size, "multiple": num_rows_multiple}
  edges = np.arange(len(senders))
  rows, slots = make_rows(senders, receivers, edges, num_receivers, **options)
  transposed, _ = make_rows(receivers, senders, slots, num_senders, **options)
  return jax.tree.map(jnp.asarray, Neighbours(rows, transposed, len(senders)))


def checked_edges(
  senders: Any, receivers: Any, num_receivers: int, num_senders: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both lists as arrays `[E]` int32, after the checks that `layout` makes."""
  senders, receivers = np.asarray(senders), np.asarray(receivers)
  if senders.ndim != 1 or senders.shape != receivers.shape:
    raise ValueError(
      f"senders and receivers must be lists of equal length, got shapes {senders.shape} and "
      f"{receivers.shape}"
    )
  for name, index, size in (
    ("senders", senders, num_senders),
    ("receivers", receivers, num_receivers),
  ):
    if index.size and not np.issubdtype(index.dtype, np.integer):  # an empty list is float
      raise ValueError(f"{name} must be integers, got {index.dtype}")
    if index.size and (index.min() < 0 or index.max() >= size):
      wrong = int(np.flatnonzero((index < 0) | (index >= size))[0])
      raise ValueError(f"{name} must lie in [0, {size}), got {index[wrong]} at position {wrong}")
  return senders.astype(np.int32), receivers.astype(np.int32)


def make_rows(
  senders: np.ndarray,
  receivers: np.ndarray,
  edges: np.ndarray,
  num_receivers: int,
  *,
  chunk_size: int | None,
  multiple: int,
) -> tuple[Rows, np.ndarray]:
  """Returns the rows of one direction, in NumPy, and the slot of each edge, `[E]`.

  Args:
    senders: `[E]` int32.
    receivers: `[E]` int32.
    edges: `[E]`, the entries of `Rows.edges`.
    num_receivers: number of nodes that can receive.
    chunk_size: K; None chooses as in `layout`.
    multiple: the number of rows becomes a multiple of this.
  """
  order = np.argsort(receivers, kind="stable")
  degrees = np.bincount(receivers, minlength=num_receivers)
  if chunk_size is None:
    chunk_size = min(_CHUNKS, key=lambda size: int((-(-degrees // size)).sum()) * (size + _JOIN))
  counts = -(-degrees // chunk_size)
  num_rows = -(-max(int(counts.sum()), 1) // multiple) * multiple
  first_row, first_edge = (np.cumsum(x) - x for x in (counts, degrees))
  ordered = receivers[order]
  place = np.arange(len(order)) - first_edge[ordered]
  slots = (first_row[ordered] + place // chunk_size) * chunk_size + place % chunk_size
  flat = np.zeros((3, num_rows * chunk_size), np.int32)
  flat[0, slots], flat[1, slots], flat[2, slots] = senders[order], edges[order], 1
  shaped = flat.reshape(3, num_rows, chunk_size)
  # Empty rows belong to the last node, so that receivers stay ascending.
  owners = np.full(num_rows, max(num_receivers - 1, 0), np.int32)
  owners[: counts.sum()] = np.repeat(np.arange(num_receivers), counts)
  by_edge = np.zeros(len(order), np.int64)
  by_edge[order] = slots
  rows = Rows(
    senders=shaped[0],
    receivers=owners,
    mask=shaped[2].astype(bool),
    edges=shaped[1],
    num_receivers=num_receivers,
  )
  return rows, by_edge


def to_slots(neighbours: Neighbours, values: jax.Array) -> jax.Array:
  """Returns values of edges `[E, ...]` in the layout of the slots, `[R, K, ...]`.

  Empty slots get zeros.

  Raises:
    ValueError: if there is not one row for each edge.
  """
  if values.shape[0] != neighbours.num_edges:
    raise ValueError(
      f"values must have one row for each of {neighbours.num_edges} edges, got shape {values.shape}"
    )
  if not neighbours.num_edges:
    return jnp.zeros((*neighbours.mask.shape, *values.shape[1:]), values.dtype)
  found = values[neighbours.rows.edges]
  mask = neighbours.mask.reshape(*neighbours.mask.shape, *[1] * (values.ndim - 1))
  return jnp.where(mask, found, 0)


def degrees(neighbours: Neighbours, weights: jax.Array) -> jax.Array:
  """Returns the sum of weights `[R, K, ...]` over the edges of each receiver, `[N, ...]`."""
  sums = jnp.sum(weights, axis=1)
  if neighbours.num_blocks > 1:
    return _block_by_block(lambda sums, block: _join(sums, block.rows), neighbours, sums)
  return _join(sums, neighbours.rows)


def neighbour_sum(
  values: jax.Array,
  neighbours: Neighbours,
  weights: jax.Array,
  *,
  implementation: str = "auto",
) -> jax.Array:
  """Returns the weighted sum over each node's neighbours.

  Args:
    values: `[num_senders, ..., D]` floating, the messages.
    neighbours: the graph.
    weights: `[R, K]`, or `[R, K, ...]` with further axes that match the first axes of a message,
      such as attention heads. Weights of empty slots are ignored. `neighbours.mask` as weights
      gives a plain sum.
    implementation: "rows" (of this module), "segments" (XLA's segment sum over all slots) or "auto"
      (rows on a CPU, segments elsewhere).

  Returns:
    `[num_receivers, ..., D]`. Both `values` and `weights` get gradients. "rows" supports reverse
    mode of any order but no forward mode; use "segments" with `jax.jvp`.

  Raises:
    ValueError: if shapes do not fit, `values` are integers, or `implementation` is unknown.
  """
  if weights.shape[:2] != neighbours.mask.shape:
    raise ValueError(
      f"weights must have shape [R, K, ...], [R, K] = {list(neighbours.mask.shape)}, got "
      f"{weights.shape}: convert weights [E] with to_slots"
    )
  if values.ndim < 1 or values.shape[0] != neighbours.num_senders:
    raise ValueError(
      f"values must have one row for each of {neighbours.num_senders} senders, got {values.shape}"
    )
  if not jnp.issubdtype(values.dtype, jnp.inexact):
    raise ValueError(
      f"values must be floating, got {values.dtype}: weights would be rounded to integers"
    )
  if weights.shape[2:] != values.shape[1 : weights.ndim - 1]:
    raise ValueError(
      f"weights of shape {weights.shape} do not fit values of shape {values.shape}: the axes of "
      "weights after [R, K] must be the axes of values after the first"
    )
  weights = jnp.where(_expand(neighbours.mask, weights.ndim), weights, 0).astype(values.dtype)
  functions: dict[str, Any] = {"auto": _by_platform, "rows": _by_rows, "segments": _by_segments}
  checks.choice("implementation", implementation, list(functions))
  function = functions[implementation]
  if neighbours.num_blocks > 1:

    def of_block(sent, block):
      return function(sent[0], block, sent[1])

    return _block_by_block(of_block, neighbours, (values, weights))
  return function(values, neighbours, weights)


def _by_platform(values: jax.Array, neighbours: Neighbours, weights: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(values, neighbours, weights, cpu=_by_rows, default=_by_segments)


def _block_by_block(function: Any, neighbours: Neighbours, arrays: Any) -> jax.Array:
  """Returns `function(arrays, neighbours)` of each block, concatenated."""
  num_blocks = neighbours.num_blocks
  cut = jax.tree.map(
    lambda leaf: leaf.reshape(num_blocks, -1, *leaf.shape[1:]), (arrays, neighbours)
  )
  arrays, whole = cut
  num_slots = neighbours.mask.size // num_blocks
  sizes = neighbours.num_senders // num_blocks, neighbours.num_receivers // num_blocks

  def local(rows: Rows, num_senders: int, num_receivers: int) -> Rows:
    def shift(numbers, size):  # to positions within the block
      first = size * jnp.arange(num_blocks, dtype=numbers.dtype)
      return numbers - first.reshape(-1, *[1] * (numbers.ndim - 1))

    return Rows(
      senders=shift(rows.senders, num_senders),
      receivers=shift(rows.receivers, num_receivers),
      mask=rows.mask,
      edges=shift(rows.edges, num_slots),
      num_receivers=num_receivers,
    )

  blocks = Neighbours(
    local(whole.rows, *sizes), local(whole.transposed, *sizes[::-1]), neighbours.num_edges
  )
  found = jax.vmap(function)(arrays, blocks)
  return found.reshape(-1, *found.shape[2:])


def _by_segments(values: jax.Array, neighbours: Neighbours, weights: jax.Array) -> jax.Array:
  rows = neighbours.rows
  sent = _expand(weights, values.ndim + 1) * values[rows.senders]
  flat = sent.reshape(-1, *sent.shape[2:])
  owners = jnp.repeat(rows.receivers, rows.senders.shape[1], total_repeat_length=len(flat))
  return jax.ops.segment_sum(flat, owners, rows.num_receivers, indices_are_sorted=True)


@jax.custom_vjp
def _by_rows(values: jax.Array, neighbours: Neighbours, weights: jax.Array) -> jax.Array:
  return _sum_rows(values, neighbours.rows, weights)


def _forward(values: jax.Array, neighbours: Neighbours, weights: jax.Array) -> tuple[Any, Any]:
  return _by_rows(values, neighbours, weights), (values, neighbours, weights)


def _backward(saved: Any, cotangents: jax.Array) -> tuple[jax.Array, None, jax.Array]:
  values, neighbours, weights = saved
  rows, transposed = neighbours.rows, neighbours.transposed
  flat = weights.reshape(-1, *weights.shape[2:])
  moved = flat[transposed.edges]
  moved = jnp.where(_expand(transposed.mask, moved.ndim), moved, 0)
  # The compiler drops this where the gradient of the weights is not used.
  to_weights = _products(values, cotangents, rows, weights)
  return _sum_rows(cotangents, transposed, moved), None, to_weights


def _products(
  values: jax.Array, cotangents: jax.Array, rows: Rows, weights: jax.Array
) -> jax.Array:
  """Returns the dot product of each slot's sender and receiver, in the shape of the weights.

  Rows are processed in blocks, so that the gathered values stay in the cache.
  """
  heads = math.prod(weights.shape[2:])
  sent = values.reshape(len(values), heads, -1)
  received = cotangents.reshape(len(cotangents), heads, -1)
  missing = -len(weights) % _BLOCK
  senders = jnp.pad(rows.senders, ((0, missing), (0, 0))).reshape(-1, _BLOCK, weights.shape[1])
  receivers = jnp.pad(rows.receivers, (0, missing)).reshape(-1, _BLOCK)
  blocks = jax.lax.map(
    lambda block: jnp.einsum("rkhd,rhd->rkh", sent[block[0]], received[block[1]]),
    (senders, receivers),
  )
  return blocks.reshape(-1, *weights.shape[1:])[: len(weights)].astype(weights.dtype)


_by_rows.defvjp(_forward, _backward)


def _sum_rows(values: jax.Array, rows: Rows, weights: jax.Array) -> jax.Array:
  # Without the barrier XLA recomputes both for each slot that reads them.
  values, weights = jax.lax.optimization_barrier((values, weights))
  total = jnp.zeros((), values.dtype)
  for k in range(rows.senders.shape[1]):  # unrolled, so that the sum stays in registers
    total = total + _expand(weights[:, k], values.ndim) * values[rows.senders[:, k]]
  return _join(total, rows)


def _join(sums: jax.Array, rows: Rows) -> jax.Array:
  return jax.ops.segment_sum(sums, rows.receivers, rows.num_receivers, indices_are_sorted=True)


def _expand(weights: jax.Array, ndim: int) -> jax.Array:
  return weights.reshape(*weights.shape, *[1] * (ndim - weights.ndim))
