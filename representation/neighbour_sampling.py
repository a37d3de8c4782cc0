"""Samples of a graph for steps that cannot hold the whole of it: static shapes, drawn on the host.

A sample begins with central nodes, which alone a loss counts. Each of them gets up to `fan_outs[0]`
of its in-neighbours, drawn without replacement; each node met there for the first time up to
`fan_outs[1]` of its own, and so on. A node is there once, however often it is met, and with it one
set of in-edges. With as many hops as an encoder has layers, and fan-outs no smaller than the
largest degree, layers without normalisation over nodes give the central nodes what they would in
the whole graph.

Degrees are those of the whole graph, in it or estimated: of the d in-edges of a node c are drawn,
and each stands for d / c of them (`Graph.edge_scale`), so that a sum over neighbours has the right
expectation, and after edges have been dropped the degree is an unbiased estimate of what it would
be. Nodes of the last hop only send: none of their in-edges is there, `Graph.outside_degree` says
how many there are, and normalisation does not see them (`Graph.mask`).

The sample of one step is blocks of equal shape side by side, one for each device; no edge joins
two of them, and each is a graph of its own for normalisation over graphs.

Reference: Hamilton et al. 2017, https://arxiv.org/abs/1706.02216 (sampling); Chen et al. 2018,
https://arxiv.org/abs/1801.10247, section 2 (why sums are scaled).
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from representation import checks, graphs, message_passing

_SENDER_CHUNK = 4  # most nodes of a sample send to few others


class Sampler:
  """Draws samples of one graph; calls may run in several threads at once.

  Attributes:
    num_nodes: of one block, padding included: as many as the fan-outs can reach.
    batch_size: central nodes of a step.
    num_blocks: in which these are read.
  """

  def __init__(
    self,
    features: Any,
    senders: Any,
    receivers: Any,
    *,
    fan_outs: Sequence[int],
    batch_size: int,
    num_blocks: int = 1,
  ):
    """Sorts the edges by receiver, once.

    Args:
      features: `[N, D]`, an array or a matrix of `scipy.sparse`; those of a sample are dense.
      senders: `[E]` int; each undirected edge comes twice.
      receivers: `[E]` int.
      fan_outs: the most in-neighbours that are drawn for a node, by hop from the centre.
      batch_size: central nodes of a step, in all blocks together.
      num_blocks: a divisor of it, such as the number of devices.

    Raises:
      ValueError: if a number is out of range, blocks cannot be equal, or an edge is one that
        `graphs.make_graph` refuses.
    """
    total = features.shape[0]
    self.fan_outs = tuple(fan_outs)
    if not self.fan_outs:
      raise ValueError("fan_outs must have a number for each hop, got none: give (10, 5), say")
    for fan_out in self.fan_outs:
      checks.count("fan_outs", fan_out)
    checks.count("batch_size", batch_size)
    checks.count("num_blocks", num_blocks)
    if batch_size % num_blocks or batch_size > total:
      raise ValueError(
        f"batch_size is {batch_size}: give a multiple of {num_blocks}, the number of blocks, of at "
        f"most {total}, the number of nodes"
      )
    senders, receivers = graphs.checked_edges(senders, receivers, total)
    order = np.argsort(receivers, kind="stable")
    self._features, self._senders = features, senders[order]
    self._degrees = np.bincount(receivers, minlength=total)
    self._starts = np.cumsum(self._degrees) - self._degrees
    self.batch_size, self.num_blocks = batch_size, num_blocks
    # How many nodes each hop can add, and with that the shapes of a block.
    reach = [batch_size // num_blocks]
    for fan_out in self.fan_outs:
      reach.append(reach[-1] * fan_out)
    self.num_nodes = min(total, sum(reach))
    self._num_rows = min(total, sum(reach[:-1]))
    self._width = max(self.fan_outs)
    edges = min(sum(reach[1:]), self._num_rows * self._width, max(len(senders), 1))
    # Full rows, and one that is not full for each node that sends.
    partial = min(edges, self.num_nodes) * (_SENDER_CHUNK - 1)
    self._num_transposed = (edges + partial) // _SENDER_CHUNK

  def __call__(self, nodes: Any, rng: np.random.Generator) -> graphs.Graph:
    """Returns a sample around some nodes, of NumPy arrays with shapes that are always the same.

    Args:
      nodes: `[batch_size]` int central nodes; one that comes twice counts once.
      rng: what the sample depends on, besides the nodes.

    Raises:
      ValueError: if there are fewer or more of them, or one is no node.
    """
    checks.row_numbers("nodes", nodes, len(self._degrees), ndim=1)
    if len(nodes) != self.batch_size:
      raise ValueError(f"nodes must be batch_size = {self.batch_size} numbers, got {len(nodes)}")
    parts = np.split(np.asarray(nodes), self.num_blocks)
    blocks = [self._block(part, rng, index) for index, part in enumerate(parts)]
    treedef = jax.tree.structure(blocks[0])
    leaves = [np.concatenate(pieces) for pieces in zip(*map(jax.tree.leaves, blocks), strict=True)]
    return jax.tree.unflatten(treedef, leaves)

  def _block(self, centre: np.ndarray, rng: np.random.Generator, index: int) -> graphs.Graph:
    order = np.unique(centre)
    num_central, start = len(order), 0
    senders, receivers, scales = [], [], []
    for fan_out in self.fan_outs:
      drawn, used = self._draw(order[start:], fan_out, rng)
      counts = used.sum(axis=1)
      senders.append(drawn[used])
      receivers.append(np.repeat(np.arange(start, len(order)), counts))
      scales.append(np.repeat(self._degrees[order[start:]] / np.maximum(counts, 1), counts))
      start = len(order)
      new = np.setdiff1d(senders[-1], order)
      order = np.concatenate([order, new])
    sender_nodes, receiver, scale = map(np.concatenate, (senders, receivers, scales))
    sorter = np.argsort(order)
    sender = sorter[np.searchsorted(order, sender_nodes, sorter=sorter)]
    neighbours, slots = self._layout(sender.astype(np.int32), receiver.astype(np.int32), index)
    edge_scale = np.zeros(neighbours.mask.size, np.float32)
    edge_scale[slots] = scale
    num_nodes = self.num_nodes
    places = np.arange(num_nodes)
    outside = np.zeros(num_nodes, np.float32)
    outside[start : len(order)] = self._degrees[order[start:]]
    found = self._features[order]
    features = np.zeros((num_nodes, found.shape[1]), np.float32)
    features[: len(order)] = found.toarray() if hasattr(found, "toarray") else found
    return graphs.Graph(
      features=features,
      neighbours=neighbours,
      mask=places < start,
      graph_ids=np.full(num_nodes, index, np.int32),
      central=places < num_central,
      edge_scale=edge_scale.reshape(neighbours.mask.shape),
      outside_degree=outside,
    )

  def _draw(
    self, nodes: np.ndarray, fan_out: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns in-neighbours `[n, fan_out]` of nodes, all different, and which entries count."""
    degrees = self._degrees[nodes]
    places = np.tile(np.arange(fan_out), (len(nodes), 1))
    many = np.flatnonzero(degrees > fan_out)
    # Floyd's sampling without replacement: its work is that of the fan-out, not of the degree.
    picked = np.zeros((len(many), fan_out), np.int64)
    for k in range(fan_out):
      last = degrees[many] - fan_out + k
      place = rng.integers(0, last, endpoint=True)
      met = functools.reduce(operator.or_, (picked[:, j] == place for j in range(k)), False)
      picked[:, k] = np.where(met, last, place)
    places[many] = picked
    used = places < degrees[:, None]
    edges = np.where(used, self._starts[nodes][:, None] + places, 0)
    return (self._senders[edges] if len(self._senders) else edges), used

  def _layout(
    self, senders: np.ndarray, receivers: np.ndarray, index: int
  ) -> tuple[message_passing.Neighbours, np.ndarray]:
    """Returns the edges of a block, numbered as part of all blocks, and the slot of each in it."""
    rows, slots = message_passing.make_rows(
      senders, receivers, np.arange(len(senders)), self.num_nodes,
      chunk_size=self._width, multiple=self._num_rows,
    )  # fmt: skip
    transposed, _ = message_passing.make_rows(
      receivers, senders, slots, self.num_nodes,
      chunk_size=_SENDER_CHUNK, multiple=self._num_transposed,
    )  # fmt: skip

    def shift(rows: message_passing.Rows, num_edges: int) -> message_passing.Rows:
      return message_passing.Rows(
        senders=rows.senders + np.int32(index * self.num_nodes),
        receivers=rows.receivers + np.int32(index * self.num_nodes),
        mask=rows.mask,
        edges=rows.edges + np.int32(index * num_edges),
        num_receivers=self.num_blocks * self.num_nodes,
      )

    # The number of edges is part of the compiled type: it is that of the slots, always the same.
    num_slots = rows.mask.size
    neighbours = message_passing.Neighbours(
      shift(rows, num_slots),
      shift(transposed, num_slots),
      self.num_blocks * num_slots,
      self.num_blocks,
    )
    return neighbours, slots
