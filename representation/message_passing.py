"""Sums over the neighbours of nodes, forward and backward, at the speed of memory.

  y[r] = sum of weights[slot] * x[sender of the slot], over the slots of receiver r.

A scatter-add has to expect that two edges meet in one place, and XLA's sorted segment sum on a CPU
takes twenty times as long as the memory traffic asks for. Here edges lie in rows of at most K slots
(`Neighbours`): a receiver has as many rows as its neighbours fill, so a hub costs what its edges
cost. A row is K gathers that add up in registers; only the rows of one receiver are joined by a
segment sum. The gradient is the same sum over the transposed rows, and needs no scatter either.

Weights and masks of edges are arrays `[R, K]` in the layout of the slots, so that one drawn for a
step is used without moving it: `weights[i, k]` belongs to the edge from `senders[i, k]` to
`receivers[i]`. `to_slots` brings what is given by edge there.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNKS = (4, 8, 16, 32)
_BLOCK = 512  # rows whose products are taken at once
_JOIN = 3  # cost of joining one row of slots, in gathered slots (two CPU cores, 256 features)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["senders", "receivers", "mask", "edges"],
  meta_fields=["num_receivers"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
  """Edges in rows of K slots, each row of one receiver.

  Attributes:
    senders: `[R, K]` int32; 0 in empty slots.
    receivers: `[R]` int32, ascending; nodes without neighbours have no row.
    mask: `[R, K]` bool, false in empty slots.
    edges: `[R, K]` int32, which edge of the list lies there; 0 in empty slots. Of the transposed
      rows: which slot of the forward ones.
    num_receivers: static.
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
  """Who sends to whom, laid out for `neighbour_sum` and its gradient; from `layout`.

  Attributes:
    rows: by receiver.
    transposed: by sender; its `edges` point into the flattened slots of `rows`.
    num_edges: static.
    num_blocks: static; above 1, nodes and rows are so many equal parts side by side, each of its
      own edges: sums are taken part by part, and where parts lie on devices nothing moves.
  """

  rows: Rows
  transposed: Rows
  num_edges: int
  num_blocks: int = 1

  @property
  def num_receivers(self) -> int:
    """Number of nodes that receive."""
    return self.rows.num_receivers

  @property
  def num_senders(self) -> int:
    """Number of nodes that send."""
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
  """Returns the layout of a list of directed edges; on the host, once a graph.

  Args:
    senders: `[E]` int.
    receivers: `[E]` int.
    num_receivers: number of receiving nodes.
    num_senders: number of sending nodes; the same by default.
    chunk_size: K; by default the one of 4, 8, 16 and 32 that costs least, for each direction.
    num_rows_multiple: empty rows are added until their number is a multiple, such as that of the
      devices which share them.

  Raises:
    ValueError: if the lists differ in length or an index is out of range.
  """
  num_senders = num_receivers if num_senders is None else num_senders
  for name, count in (("chunk_size", chunk_size), ("num_rows_multiple", num_rows_multiple)):
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
      raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
  senders, receivers = checked_edges(senders, receivers, num_receivers, num_senders)
  options: Any = {"chunk_size": chunk_size, "multiple": num_rows_multiple}
  edges = np.arange(len(senders))
  rows, slots = make_rows(senders, receivers, edges, num_receivers, **options)
  transposed, _ = make_rows(receivers, senders, slots, num_senders, **options)
  return jax.tree.map(jnp.asarray, Neighbours(rows, transposed, len(senders)))


def checked_edges(
  senders: Any, receivers: Any, num_receivers: int, num_senders: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both lists as `[E]` int32, or raises the errors of `layout`."""
  senders, receivers = np.asarray(senders), np.asarray(receivers)
  if senders.ndim != 1 or senders.shape != receivers.shape:
    raise ValueError(
      f"senders and receivers must be lists of one length, got shapes {senders.shape} and "
      f"{receivers.shape}"
    )
  for name, index, size in (
    ("senders", senders, num_senders),
    ("receivers", receivers, num_receivers),
  ):
    if index.size and not np.issubdtype(index.dtype, np.integer):  # an empty list has none
      raise ValueError(f"{name} must be integers, got {index.dtype}")
    if index.size and (index.min() < 0 or index.max() >= size):
      wrong = int(np.flatnonzero((index < 0) | (index >= size))[0])
      raise ValueError(f"{name}[{wrong}]={index[wrong]} is no node: give numbers in [0, {size})")
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
  """Returns the rows of one direction in NumPy, and for each edge of the list its slot, `[E]`.

  Args:
    senders: `[E]` int32.
    receivers: `[E]` int32.
    edges: `[E]` what `Rows.edges` says in each slot.
    num_receivers: static.
    chunk_size: slots of a row; None as in `layout`.
    multiple: of which the number of rows is.
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
  owners = np.full(num_rows, max(num_receivers - 1, 0), np.int32)  # of empty rows: still ascending
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
  """Returns what is given for each edge, `[E, ...]`, as `[R, K, ...]`; zeros in empty slots."""
  if values.shape[0] != neighbours.num_edges:
    raise ValueError(f"values must have {neighbours.num_edges} rows, got shape {values.shape}")
  if not neighbours.num_edges:
    return jnp.zeros((*neighbours.mask.shape, *values.shape[1:]), values.dtype)
  found = values[neighbours.rows.edges]
  mask = neighbours.mask.reshape(*neighbours.mask.shape, *[1] * (values.ndim - 1))
  return jnp.where(mask, found, 0)


def degrees(neighbours: Neighbours, weights: jax.Array) -> jax.Array:
  """Returns the sum of the weights `[R, K, ...]` of each receiver, `[num_receivers, ...]`."""
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
    values: `[num_senders, ..., D]` what is sent.
    neighbours: the graph.
    weights: `[R, K]`, or `[R, K, ...]` with a weight for each of the first axes of what is sent,
      such as attention heads; what empty slots say is ignored. The edge mask gives a plain sum.
    implementation: "rows" (this module's), "segments" (XLA's segment sum, over slots), or "auto":
      rows on a CPU, segments elsewhere.

  Returns:
    `[num_receivers, ..., D]`; gradients reach `values` and `weights`. Rows have a reverse mode only
    (`grad`, of any order); `jvp` wants segments.

  Raises:
    ValueError: if a shape does not fit, or there is no such implementation.
  """
  if weights.shape[:2] != neighbours.mask.shape:
    raise ValueError(
      f"weights must begin with [R, K] = {list(neighbours.mask.shape)} as the slots do, got shape "
      f"{weights.shape}: to_slots brings weights of edges there"
    )
  if values.ndim < 1 or values.shape[0] != neighbours.num_senders:
    raise ValueError(
      f"values must have a row for each of {neighbours.num_senders} senders, got {values.shape}"
    )
  if not jnp.issubdtype(values.dtype, jnp.inexact):
    raise ValueError(
      f"values must be floating, got {values.dtype}, in which weights would lose their fractions"
    )
  if weights.shape[2:] != values.shape[1 : weights.ndim - 1]:
    raise ValueError(
      f"weights of shape {weights.shape} do not fit what is sent, {values.shape}: their axes after "
      "the slots must be its first ones after the nodes"
    )
  weights = jnp.where(_expand(neighbours.mask, weights.ndim), weights, 0).astype(values.dtype)
  functions: dict[str, Any] = {"rows": _by_rows, "segments": _by_segments, "auto": _by_platform}
  if implementation not in functions:
    raise ValueError(f"implementation must be 'auto', 'rows' or 'segments', got {implementation!r}")
  function = functions[implementation]
  if neighbours.num_blocks > 1:

    def of_block(sent, block):
      return function(sent[0], block, sent[1])

    return _block_by_block(of_block, neighbours, (values, weights))
  return function(values, neighbours, weights)


def _by_platform(values: jax.Array, neighbours: Neighbours, weights: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(values, neighbours, weights, cpu=_by_rows, default=_by_segments)


def _block_by_block(function: Any, neighbours: Neighbours, arrays: Any) -> jax.Array:
  """Returns `function(arrays, neighbours)` of each block, side by side."""
  num_blocks = neighbours.num_blocks
  cut = jax.tree.map(
    lambda leaf: leaf.reshape(num_blocks, -1, *leaf.shape[1:]), (arrays, neighbours)
  )
  arrays, whole = cut
  num_slots = neighbours.mask.size // num_blocks
  sizes = neighbours.num_senders // num_blocks, neighbours.num_receivers // num_blocks

  def local(rows: Rows, num_senders: int, num_receivers: int) -> Rows:
    def shift(numbers, size):  # to numbers within the block
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
  # Dropped by the compiler where nobody asks for the gradient of weights.
  to_weights = _products(values, cotangents, rows, weights)
  return _sum_rows(cotangents, transposed, moved), None, to_weights


def _products(
  values: jax.Array, cotangents: jax.Array, rows: Rows, weights: jax.Array
) -> jax.Array:
  """Returns the product of each slot's sender and receiver, in the shape of the weights.

  A block of rows at a time: what is gathered for it stays in the cache.
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
  # Else XLA computes both anew for every slot that reads them, inside the loop over slots.
  values, weights = jax.lax.optimization_barrier((values, weights))
  total = jnp.zeros((), values.dtype)
  for k in range(rows.senders.shape[1]):  # unrolled: one pass that keeps the sum in registers
    total = total + _expand(weights[:, k], values.ndim) * values[rows.senders[:, k]]
  return _join(total, rows)


def _join(sums: jax.Array, rows: Rows) -> jax.Array:
  return jax.ops.segment_sum(sums, rows.receivers, rows.num_receivers, indices_are_sorted=True)


def _expand(weights: jax.Array, ndim: int) -> jax.Array:
  return weights.reshape(*weights.shape, *[1] * (ndim - weights.ndim))
