"""Random views of a graph: some feature columns are masked and some edges are dropped.

Only masks change; the arrays of the graph stay as they are.

Reference: Thakoor et al. 2021, https://arxiv.org/abs/2102.06514, section 3.
"""

import numbers
from typing import Any

import jax
import numpy as np

from representation import graphs
from sharding import checks


def mask_columns(graph: graphs.Graph, key: jax.Array, *, prob: Any) -> graphs.Graph:
  """Returns the graph with each feature column masked with probability `prob`.

  A column is masked for all nodes at once. The remaining columns are not scaled up.

  Args:
    graph: the graph.
    key: typed PRNG key.
    prob: in [0, 1].
  """
  kept = jax.random.uniform(key, graph.features.shape[1:]) >= prob
  return graph._replace(column_mask=kept if graph.column_mask is None else kept & graph.column_mask)


def drop_edges(graph: graphs.Graph, key: jax.Array, *, prob: Any) -> graphs.Graph:
  """Returns the graph with each directed edge dropped with probability `prob`.

  The two directions of an undirected edge are dropped independently. Degrees then count the
  remaining edges. Of edges that a sample left out, they count the expected share (1 - prob).

  Args:
    graph: the graph.
    key: typed PRNG key.
    prob: in [0, 1].
  """
  kept = jax.random.uniform(key, graph.neighbours.mask.shape) >= prob
  if graph.outside_degree is not None:
    graph = graph._replace(outside_degree=graph.outside_degree * (1 - prob))
  return graph._replace(edge_mask=kept if graph.edge_mask is None else kept & graph.edge_mask)


def corrupt(
  graph: graphs.Graph, key: jax.Array, *, feature_mask_prob: Any, edge_drop_prob: Any
) -> graphs.Graph:
  """Returns one view of the graph, with columns masked and edges dropped at random."""
  feature_key, edge_key = jax.random.split(key)
  graph = mask_columns(graph, feature_key, prob=feature_mask_prob)
  return drop_edges(graph, edge_key, prob=edge_drop_prob)


def two_views(
  graph: graphs.Graph, key: jax.Array, *, feature_mask_probs: Any, edge_drop_probs: Any
) -> list[graphs.Graph]:
  """Returns two independent views of the graph, each with its own probabilities."""
  return [
    corrupt(graph, view_key, feature_mask_prob=p_f, edge_drop_prob=p_e)
    for view_key, p_f, p_e in zip(
      jax.random.split(key), feature_mask_probs, edge_drop_probs, strict=True
    )
  ]


def check(config: Any) -> None:
  """Raises `ValueError` for bad values in the config fields of a method with two views."""
  for name in ("feature_mask_probs", "edge_drop_probs"):
    values = getattr(config, name)
    if isinstance(values, np.ndarray):
      values = values.tolist()
    if isinstance(values, tuple | list):
      for value in values:
        checks.probabilities(name, value)
    if isinstance(values, numbers.Real | str) or (
      isinstance(values, tuple | list) and len(values) != 2
    ):
      raise ValueError(f"{name} must have one number for each of the two views, got {values!r}")
  if config.num_microbatches != 1:
    raise ValueError(
      f"num_microbatches must be 1, got {config.num_microbatches}: a graph is read as a whole; "
      "train on samples of it instead (representation.neighbour_sampling)"
    )
