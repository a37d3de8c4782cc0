"""Samples of a graph that is too large for one step: static shapes, drawn on the host.

A sample starts from central nodes; only these enter a loss. For each of them up to `fan_outs[0]`
in-neighbours are drawn without replacement. For each node found in this way for the first time, up
to `fan_outs[1]` of its in-neighbours are drawn, and so on. A node occurs once in a sample, with one
set of in-edges, however often it is drawn.

With as many hops as an encoder has layers, and fan-outs of at least the largest degree, the central
nodes get the same embeddings as in the whole graph, provided that the encoder has no normalisation
over nodes.

Sums over neighbours and degrees are unbiased. If c of the d in-edges of a node are drawn, each
stands for d / c edges (`Graph.edge_scale`); this also holds after edges have been dropped at
random. Nodes of the last hop only send. None of their in-edges is drawn; `Graph.outside_degree`
holds their number, and normalisation leaves these nodes out (`Graph.mask`).

The sample of one step consists of blocks of equal shape, one for each device. No edge joins two
blocks, and normalisation over a graph treats each block as a graph.

References: Hamilton et al. 2017, https://arxiv.org/abs/1706.02216 (sampling); Chen et al. 2018,
https://arxiv.org/abs/1801.10247, section 2 (why sums are scaled).
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from representation import graphs, message_passing
from sharding import checks

_SENDER_CHUNK = 4  # small, because most nodes of a sample send to few others


class Sampler:
  """Draws samples of one graph; several threads may call it at once.

  Attributes:
    fan_outs: the most in-neighbours that are drawn for a node, by hop.
    num_nodes: number of nodes in a block, with padding: as many as the fan-outs can reach.
    batch_size: number of central nodes in a step, over all blocks.
    num_blocks: number of blocks in a step.
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
    """Sorts the edges by receiver.

    Args:
      features: `[N, D]`, an array or a `scipy.sparse` matrix; samples hold them as a dense array.
      senders: `[E]` int; list both directions of an undirected edge.
      receivers: `[E]` int.
      fan_outs: the most in-neighbours that are drawn for a node, by hop from the central nodes.
      batch_size: number of central nodes in a step, over all blocks.
      num_blocks: a divisor of `batch_size`, such as the number of devices.

    Raises:
      ValueError: if a number is out of range, the blocks would not be equal, or `graphs.make_graph`
        would refuse an edge.
    """
    total = features.shape[0]
    self.fan_outs = tuple(fan_outs)
    if not self.fan_outs:
      raise ValueError("fan_outs must have one number for each hop, got none: give e.g. (10, 5)")
    for fan_out in self.fan_outs:
      checks.count("fan_outs", fan_out)
    checks.count("batch_size", batch_size)
    checks.count("num_blocks", num_blocks)
    if batch_size % num_blocks or batch_size > total:
      raise ValueError(
        f"batch_size must be a multiple of num_blocks = {num_blocks} and at most the number of "
        f"nodes, {total}, got {batch_size}"
      )
    senders, receivers = graphs.checked_edges(senders, receivers, total)
    order = np.argsort(receivers, kind="stable")
    self._features, self._senders = features, senders[order]
    self._degrees = np.bincount(receivers, minlength=total)
    self._starts = np.cumsum(self._degrees) - self._degrees
    self.batch_size, self.num_blocks = batch_size, num_blocks
    # The most nodes that each hop can add. They decide the shapes of a block.
    reach = [batch_size // num_blocks]
    for fan_out in self.fan_outs:
      reach.append(reach[-1] * fan_out)
    self.num_nodes = min(total, sum(reach))
    self._num_rows = min(total, sum(reach[:-1]))
    self._width = max(self.fan_outs)
    edges = min(sum(reach[1:]), self._num_rows * self._width, max(len(senders), 1))
    # The most rows: the full ones, and one that is not full for each node that sends.
    partial = min(edges, self.num_nodes) * (_SENDER_CHUNK - 1)
    self._num_transposed = (edges + partial) // _SENDER_CHUNK

  def __call__(self, nodes: Any, rng: np.random.Generator) -> graphs.Graph:
    """Returns a sample of NumPy arrays, always with the same shapes.

    Args:
      nodes: `[batch_size]` int, the central nodes; duplicates within a block count once.
      rng: draws the neighbours.

    Raises:
      ValueError: if there are not `batch_size` nodes, or one of them does not exist.
    """
    checks.row_numbers("nodes", nodes, len(self._degrees), ndim=1, fetch=True)
    checks.shape("nodes", nodes, (self.batch_size,), "[batch_size]")
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
    """Returns distinct in-neighbours `[n, fan_out]` of n nodes, and a mask of the real entries."""
    degrees = self._degrees[nodes]
    places = np.tile(np.arange(fan_out), (len(nodes), 1))
    many = np.flatnonzero(degrees > fan_out)
    # Floyd's sampling without replacement: the work grows with the fan-out, not with the degree.
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
    """Returns the edges of a block, with node numbers over all blocks, and the slot of each."""
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

    # `num_edges` is static, so a varying number would compile again: give the number of slots.
    num_slots = rows.mask.size
    neighbours = message_passing.Neighbours(
      shift(rows, num_slots),
      shift(transposed, num_slots),
      self.num_blocks * num_slots,
      self.num_blocks,
    )
    return neighbours, slots
