"""A graph as arrays: features of nodes, neighbours, and which of both are in use."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from representation import checks, message_passing


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["columns", "values"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SparseFeatures:
  """Features that are mostly zero, such as words of 8,000: only the others are stored.

  Attributes:
    columns: who sends to a node: the columns in which it is not zero.
    values: `[R, K]` float, the features in the layout of their slots.
  """

  columns: message_passing.Neighbours
  values: jax.Array

  @property
  def shape(self) -> tuple[int, int]:
    """(N, D)."""
    return self.columns.num_receivers, self.columns.num_senders

  @property
  def dtype(self) -> Any:
    """Of the values."""
    return self.values.dtype


class Graph(NamedTuple):
  """One graph, or several side by side without edges between them.

  Arrays are NumPy's in a sample that lies on no device yet.

  Attributes:
    features: `[N, D]` float, or `SparseFeatures`; `linear` reads them.
    neighbours: who sends to whom; without loops.
    mask: `[N]` bool, false at nodes that only fill the shape up, or whose own neighbours are not
      there; normalisation does not see them.
    graph_ids: `[N]` int32 in [0, N), which graph a node is of.
    column_mask: `[D]` bool, the columns in use; None means all.
    edge_mask: `[R, K]` bool in the layout of the slots, the edges in use; None means all.
    central: `[N]` bool, the nodes that a loss counts; None means those of the mask.
    edge_scale: `[R, K]`, how many edges of the whole graph each slot of a sample stands for; None
      means 1.
    outside_degree: `[N]`, how many edges of the whole graph come in for which no slot stands; None
      means 0.
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
    features: `[N, D]`, an array or a matrix of `scipy.sparse`, which stays sparse.
    senders: `[E]` int; each undirected edge comes twice.
    receivers: `[E]` int.
    graph_ids: `[N]` int, for several graphs side by side; one graph by default.
    chunk_size: slots of a row, as in `message_passing.layout`.
    multiple: N and the number of rows are filled up to a multiple of it, such as the number of
      devices that share the graph.

  Raises:
    ValueError: if sizes do not fit, a feature is not finite, an edge joins what is no node, or is a
      loop (layers add their own). Other edges are taken as they are: one that comes twice counts
      twice, and one without its reverse goes one way (`experiments.data.graphs.build` cleans).
  """
  checks.count("multiple", multiple)
  if not hasattr(features, "tocoo"):
    features = np.asarray(features)
  if len(features.shape) != 2 or 0 in features.shape:
    raise ValueError(f"features must be [N, D], neither of them 0, got shape {features.shape}")
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
  # Nodes that fill up are a graph of their own, so that no statistic of a graph meets them.
  graph_ids = np.pad(graph_ids.astype(np.int32), (0, total - num_nodes), constant_values=total - 1)
  return Graph(
    features=features if isinstance(features, SparseFeatures) else jnp.asarray(features),
    neighbours=neighbours,
    mask=jnp.arange(total) < num_nodes,
    graph_ids=jnp.asarray(graph_ids),
  )


def checked_edges(senders: Any, receivers: Any, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the edges as two `[E]` int32, or raises the errors of `make_graph`."""
  senders, receivers = message_passing.checked_edges(senders, receivers, num_nodes, num_nodes)
  if np.any(loops := senders == receivers):
    node = senders[loops][0]
    raise ValueError(f"edges must not be loops, got one at node {node}: layers add their own")
  return senders, receivers


def _check_finite(features: Any) -> None:
  values = features.tocoo() if hasattr(features, "tocoo") else features
  entries = values if values is features else values.data
  if entries.dtype.kind not in "biuf" and not jnp.issubdtype(entries.dtype, jnp.floating):
    raise ValueError(f"features must be numbers, got {entries.dtype}")
  finite = np.isfinite(entries)
  if not finite.all():
    place = np.argwhere(~finite)[0]
    node = int(place[0]) if values is features else int(values.row[place[0]])
    raise ValueError(
      f"features must be finite, got {entries[tuple(place)]} at node {node} "
      f"({(~finite).sum()} such values): repair or drop them"
    )


def _floating(values: np.ndarray) -> np.ndarray:
  return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float32)


def edge_weights(graph: Graph) -> jax.Array:
  """Returns how many edges each slot in use stands for, else 0, `[R, K]`, for `message_passing`."""
  mask = graph.neighbours.mask
  if graph.edge_mask is not None:
    mask = mask & graph.edge_mask
  weights = mask.astype(graph.features.dtype)
  return weights if graph.edge_scale is None else weights * graph.edge_scale


def in_degrees(graph: Graph, weights: jax.Array) -> jax.Array:
  """Returns how many edges come into each node, `[N]`, by weights of `edge_weights`.

  In a sample that is the degree in the whole graph: known where no neighbour is there, estimated
  from the neighbours in use elsewhere.
  """
  degrees = message_passing.degrees(graph.neighbours, weights)
  return degrees if graph.outside_degree is None else degrees + graph.outside_degree


def counted(graph: Graph) -> jax.Array:
  """Returns the nodes over which a loss is averaged, `[N]` bool."""
  return graph.mask if graph.central is None else graph.central


def linear(graph: Graph, kernel: jax.Array) -> jax.Array:
  """Returns the features of the nodes, `[N, D]` with columns out of use at 0, times `[D, W]`."""
  if graph.column_mask is not None:  # the kernel is the smaller of the two, by N / W
    kernel = jnp.where(graph.column_mask[:, None], kernel, 0)
  if isinstance(graph.features, SparseFeatures):
    return message_passing.neighbour_sum(kernel, graph.features.columns, graph.features.values)
  return graph.features @ kernel


def masked_features(graph: Graph) -> jax.Array:
  """Returns dense features `[N, D]` with the columns out of use at 0; `linear` is cheaper.

  Raises:
    ValueError: if the features are sparse.
  """
  if isinstance(graph.features, SparseFeatures):
    raise ValueError("features must be dense here, got SparseFeatures: give make_graph an array")
  if graph.column_mask is None:
    return graph.features
  return jnp.where(graph.column_mask, graph.features, 0)
