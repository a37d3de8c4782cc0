"""A graph as arrays: node features, edges, and masks that say which of them are in use."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from representation import message_passing
from sharding import checks


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["columns", "values"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SparseFeatures:
  """Features that are mostly zero, such as bags of words; only the others are stored.

  They are held as a graph between columns and nodes, so that `message_passing.neighbour_sum`
  multiplies them with a matrix.

  Attributes:
    columns: an edge from each column to each node where the feature is not zero.
    values: `[R, K]` float, the features in the layout of the edges.
  """

  columns: message_passing.Neighbours
  values: jax.Array

  @property
  def shape(self) -> tuple[int, int]:
    """(N, D): number of nodes, number of columns."""
    return self.columns.num_receivers, self.columns.num_senders

  @property
  def dtype(self) -> Any:
    """Dtype of the values."""
    return self.values.dtype


class Graph(NamedTuple):
  """One graph, or several graphs without edges between them.

  The arrays are JAX arrays, or NumPy arrays in a sample that has not been put on a device.

  Attributes:
    features: `[N, D]` float, or `SparseFeatures`; read them with `linear`.
    neighbours: the directed edges, without self-loops.
    mask: `[N]` bool, the nodes that normalisation uses. It is false for padding, and in a sample
      for nodes whose own in-edges were not drawn.
    graph_ids: `[N]` int32 in [0, N), the graph that each node belongs to.
    column_mask: `[D]` bool, the feature columns in use; None means all.
    edge_mask: `[R, K]` bool in the layout of `neighbours`, the edges in use; None means all.
    central: `[N]` bool, the nodes over which a loss is averaged; None means those of `mask`.
    edge_scale: `[R, K]`, the number of edges of the whole graph that each edge of a sample stands
      for; None means 1.
    outside_degree: `[N]`, the number of in-edges of each node in the whole graph that no edge of
      the sample stands for; None means 0.
  """

  features: Any
  neighbours: message_passing.Neighbours
  mask: Any
  graph_ids: Any
  column_mask: Any = None
  edge_mask: Any = None
  central: Any = None
  edge_scale: Any = None
  outside_degree: Any = None


def make_graph(
  features: Any,
  senders: Any,
  receivers: Any,
  *,
  graph_ids: Any = None,
  chunk_size: int | None = None,
  multiple: int = 1,
) -> Graph:
  """Returns a graph on the device.

  Args:
    features: `[N, D]`, an array or a `scipy.sparse` matrix, which stays sparse.
    senders: `[E]` int; list both directions of an undirected edge.
    receivers: `[E]` int.
    graph_ids: `[N]` int, the graph of each node; the default is one graph.
    chunk_size: slots in a row, as in `message_passing.layout`.
    multiple: N and the number of rows are padded to a multiple of this, such as the number of
      devices that share the graph.

  Raises:
    ValueError: if shapes do not fit, a feature is not finite, an edge names a node that does not
      exist, or an edge is a self-loop (layers add their own). Edges are not cleaned: one that is
      listed twice counts twice, and one without its reverse goes one way.
  """
  checks.count("multiple", multiple)
  if not hasattr(features, "tocoo"):
    features = np.asarray(features)
  if len(features.shape) != 2 or 0 in features.shape:
    raise ValueError(
      f"features must have shape [N, D] and must not be empty, got shape {features.shape}"
    )
  num_nodes, num_features = features.shape
  _check_finite(features)
  senders, receivers = checked_edges(senders, receivers, num_nodes)
  graph_ids = np.zeros(num_nodes, np.int32) if graph_ids is None else np.asarray(graph_ids)
  if graph_ids.shape != (num_nodes,):
    raise ValueError(f"graph_ids must have shape [N] = [{num_nodes}], got {graph_ids.shape}")
  if not np.issubdtype(graph_ids.dtype, np.integer):
    raise ValueError(f"graph_ids must be integers, got {graph_ids.dtype}: number the graphs")
  if graph_ids.min() < 0 or graph_ids.max() >= num_nodes:
    raise ValueError(
      f"graph_ids must lie in [0, N) = [0, {num_nodes}), got {graph_ids.min()} to {graph_ids.max()}"
    )
  total = -(-num_nodes // multiple) * multiple
  layout = functools.partial(
    message_passing.layout,
    num_receivers=total,
    chunk_size=chunk_size,
    num_rows_multiple=multiple,
  )
  neighbours = layout(senders, receivers)
  if hasattr(features, "tocoo"):
    entries = features.tocoo()
    columns = layout(entries.col, entries.row, num_senders=num_features)
    values = message_passing.to_slots(columns, jnp.asarray(_floating(entries.data)))
    features = SparseFeatures(columns, values)
  else:
    features = np.pad(_floating(np.asarray(features)), ((0, total - num_nodes), (0, 0)))
  # Padding is a graph of its own, so it enters no statistics of another graph.
  graph_ids = np.pad(graph_ids.astype(np.int32), (0, total - num_nodes), constant_values=total - 1)
  return Graph(
    features=features if isinstance(features, SparseFeatures) else jnp.asarray(features),
    neighbours=neighbours,
    mask=jnp.arange(total) < num_nodes,
    graph_ids=jnp.asarray(graph_ids),
  )


def checked_edges(senders: Any, receivers: Any, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the edges as two arrays `[E]` int32, after the checks that `make_graph` makes."""
  senders, receivers = message_passing.checked_edges(senders, receivers, num_nodes, num_nodes)
  if np.any(loops := senders == receivers):
    node = senders[loops][0]
    raise ValueError(f"edges must not be self-loops, got one at node {node}: layers add their own")
  return senders, receivers


def _check_finite(features: Any) -> None:
  values = features.tocoo() if hasattr(features, "tocoo") else features
  entries = values if values is features else values.data
  if entries.dtype.kind not in "biuf" and not jnp.issubdtype(entries.dtype, jnp.floating):
    raise ValueError(f"features must be real numbers, got {entries.dtype}")
  finite = np.isfinite(entries)
  if not finite.all():
    place = np.argwhere(~finite)[0]
    node = int(place[0]) if values is features else int(values.row[place[0]])
    raise ValueError(
      f"features must be finite, got {entries[tuple(place)]} at node {node} "
      f"({(~finite).sum()} such values): replace them or drop the nodes"
    )


def _floating(values: np.ndarray) -> np.ndarray:
  return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float32)


def edge_weights(graph: Graph) -> jax.Array:
  """Returns the weights `[R, K]` of the edges, for `message_passing`.

  An edge in use has weight 1, or in a sample the number of edges that it stands for. Other slots
  have weight 0.
  """
  mask = graph.neighbours.mask
  if graph.edge_mask is not None:
    mask = mask & graph.edge_mask
  weights = mask.astype(graph.features.dtype)
  return weights if graph.edge_scale is None else weights * graph.edge_scale


def in_degrees(graph: Graph, weights: jax.Array) -> jax.Array:
  """Returns the in-degree of each node, `[N]`, given `edge_weights`.

  In a sample this is the degree in the whole graph. It is known for nodes whose neighbours were not
  drawn, and estimated from the drawn edges in use for the others.
  """
  degrees = message_passing.degrees(graph.neighbours, weights)
  return degrees if graph.outside_degree is None else degrees + graph.outside_degree


def counted(graph: Graph) -> jax.Array:
  """Returns the nodes over which a loss is averaged, `[N]` bool: the central ones, or `mask`."""
  return graph.mask if graph.central is None else graph.central


def linear(graph: Graph, kernel: jax.Array) -> jax.Array:
  """Returns the features `[N, D]`, with masked columns set to 0, times a kernel `[D, W]`."""
  if graph.column_mask is not None:  # masking the kernel is cheaper: it has W columns, not N rows
    kernel = jnp.where(graph.column_mask[:, None], kernel, 0)
  if isinstance(graph.features, SparseFeatures):
    return message_passing.neighbour_sum(kernel, graph.features.columns, graph.features.values)
  return graph.features @ kernel


def masked_features(graph: Graph) -> jax.Array:
  """Returns dense features `[N, D]` with masked columns set to 0.

  `linear` is cheaper where only a product with a matrix is needed.

  Raises:
    ValueError: if the features are sparse.
  """
  if isinstance(graph.features, SparseFeatures):
    raise ValueError("features must be dense, got SparseFeatures: pass an array to make_graph")
  if graph.column_mask is None:
    return graph.features
  return jnp.where(graph.column_mask, graph.features, 0)
