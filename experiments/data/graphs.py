"""Graphs with features and labels on their nodes: loaded by name, checked and cleaned.

`load` finds and reads a data set in any layout of `graph_formats`, `build` does the same for arrays
in memory (`csbm.sample` needs no files at all). Whatever was found and done is in `Graph.notes`.

Edges come sorted by receiver, then sender, each once and none from a node to itself: encoders add
self-loops as they need them.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from experiments.data import graph_formats

EDGE_POLICIES = ("symmetrise", "keep", "error")
# Bag-of-words and word-vector sets, whose features BGRL divides by their row sums.
_ROW_NORMALISED = ("repacked", "gnn_benchmark", "wikics")


class Graph(NamedTuple):
  """A graph of N nodes and E directed edges, or several side by side.

  name: of the data set.
  features: `[N, D]` float32, dense or `scipy.sparse.csr_array`.
  senders, receivers: `[E]` int32 nodes; an undirected edge is there in both directions.
  labels: `[N]` int32 classes, -1 where missing, or `[N, L]` float32 zeros and ones.
  splits: "train", "val", "test" (WikiCS also "stopping") to `[num_splits, N]` bool masks; empty if
    the data set has no splits of its own.
  graph_ids: `[N]` int32, which graph a node is of; zeros for one graph.
  notes: what was found and done, by name; numbers, truths and words.
  """

  name: str
  features: Any
  senders: np.ndarray
  receivers: np.ndarray
  labels: np.ndarray
  splits: dict[str, np.ndarray]
  graph_ids: np.ndarray
  notes: dict[str, int | str]


def load(
  name_or_path: str | os.PathLike[str],
  *,
  directory: str | os.PathLike[str] = "",
  edges: str = "symmetrise",
  row_normalise: bool | None = None,
  standardise: bool | None = None,
  binarise: bool = False,
) -> Graph:
  """Returns the graph of a data set; `graph_formats` says which files are understood.

  Args:
    name_or_path: found as `<directory>/<name>/<name>.npz`, `<directory>/<name>.npz`, the folder
      `<directory>/<name>`, or as a path.
    directory: where the data sets lie.
    edges: what becomes of edges whose reverse is missing: "symmetrise" adds it, "keep" leaves
      them, "error" raises. Layouts that store each pair once get both directions whatever this is.
    row_normalise: divide each node's features by their sum; None does so for the layouts
      `repacked`, `gnn_benchmark` and `wikics`. See `build` for negative features.
    standardise: then give each feature mean 0 and variance 1 over the nodes (dense); None does so
      for `wikics`, as BGRL does.
    binarise: first replace positive features by 1 and others by 0. The Coauthor sets count words;
      PyTorch Geometric, from which BGRL's released code takes them, binarises them.

  Raises:
    ValueError: unknown name, unknown layout, damaged file, or contents that do not fit.
  """
  path = graph_formats.find(name_or_path, directory)
  raw = graph_formats.read(path)
  if row_normalise is None:
    row_normalise = raw.layout in _ROW_NORMALISED
  if standardise is None:
    standardise = raw.layout == "wikics"
  return build(
    raw,
    name=pathlib.Path(name_or_path).stem,
    edges=edges,
    row_normalise=row_normalise,
    standardise=standardise,
    binarise=binarise,
  )


def build(
  raw: graph_formats.Raw,
  *,
  name: str,
  edges: str = "symmetrise",
  row_normalise: bool = False,
  standardise: bool = False,
  binarise: bool = False,
) -> Graph:
  """Returns the checked and cleaned graph of arrays; the arguments are those of `load`.

  Duplicate edges are merged; self-loops and edges between two graphs are dropped; isolated nodes
  are kept; all are counted in the notes. Row normalisation leaves rows of zeros as they are. Where
  some feature is negative it divides by max(sum, 1), as BGRL's released code did for WikiCS: the
  sum itself may be near zero.

  Raises:
    ValueError: sizes disagree, an edge or label is out of range, a feature is not finite, no node
      is labelled, splits overlap, are empty or hold a node without a label, or an edge has no
      reverse under "error".
  """
  where = raw.where
  if edges not in EDGE_POLICIES:
    raise ValueError(f"edges is {edges!r}; choose one of {EDGE_POLICIES}")
  features = _checked_features(raw.features, where)
  num_nodes = features.shape[0]
  labels = _checked_labels(raw.labels, num_nodes, where)
  splits = _checked_splits(raw.splits, num_nodes, where)
  for split, masks in splits.items():
    if labels.ndim == 1 and (unlabelled := masks & (labels < 0)).any():
      raise ValueError(
        f"{where}: split {split} holds node {np.argwhere(unlabelled)[0, 1]}, which has no label "
        f"({unlabelled.any(axis=0).sum()} such nodes): take them out of the splits"
      )
  graph_ids = np.zeros(num_nodes, int) if raw.graph_ids is None else np.asarray(raw.graph_ids)
  if graph_ids.shape != (num_nodes,):
    raise ValueError(f"{where}: graph_ids has shape {graph_ids.shape}, expected ({num_nodes},)")
  if graph_ids.dtype.kind not in "iu" or graph_ids.min() < 0:
    raise ValueError(f"{where}: graph_ids must be whole numbers from 0, found {graph_ids.min()}")
  stored = _checked_edges(raw.edges, num_nodes, where)
  (senders, receivers), notes = _clean_edges(stored, graph_ids, raw, edges)
  if binarise:
    features = (features > 0).astype(np.float32)
  if row_normalise:
    features = _row_normalise(features)
  if standardise:
    features = _standardise(features)
  degrees = np.bincount(receivers, minlength=num_nodes)
  touched = degrees + np.bincount(senders, minlength=num_nodes)
  several = labels.ndim > 1
  notes |= {
    "isolated_nodes": int((touched == 0).sum()),
    "largest_degree": int(degrees.max()),
    "num_graphs": int(graph_ids.max()) + 1,
    "num_classes": labels.shape[1] if several else int(labels.max()) + 1,
    "unlabelled_nodes": 0 if several else int((labels < 0).sum()),
    "binarised": binarise,
    "row_normalised": row_normalise,
    "standardised": standardise,
  }
  return Graph(
    name=name,
    features=features,
    senders=senders.astype(np.int32),
    receivers=receivers.astype(np.int32),
    labels=labels,
    splits=splits,
    graph_ids=graph_ids.astype(np.int32),
    notes=notes,
  )


def part(graph: Graph, kept: np.ndarray) -> Graph:
  """Returns the nodes in a mask `[N]` bool, numbered anew, with the edges among them."""
  number = np.cumsum(kept) - 1
  edges = kept[graph.senders] & kept[graph.receivers]
  ids = graph.graph_ids[kept]
  return graph._replace(
    features=graph.features[kept],
    senders=number[graph.senders[edges]].astype(np.int32),
    receivers=number[graph.receivers[edges]].astype(np.int32),
    labels=graph.labels[kept],
    splits={name: masks[:, kept] for name, masks in graph.splits.items()},
    graph_ids=np.unique(ids, return_inverse=True)[1].astype(np.int32),
  )


def without_test_graphs(graph: Graph) -> Graph:
  """Returns what may be trained on: the only graph, or those of several without a test node."""
  if "test" not in graph.splits or not graph.graph_ids.any():
    return graph
  tested = np.unique(graph.graph_ids[graph.splits["test"].any(axis=0)])
  kept = ~np.isin(graph.graph_ids, tested)
  if not kept.any():
    raise ValueError(
      f"{graph.name}: each of its {len(tested)} graphs has test nodes, so none is left to train "
      "on: split by graphs, or give one graph"
    )
  return part(graph, kept)


def _checked_features(features: Any, where: str) -> Any:
  if not sparse.issparse(features):
    features = np.asarray(features)
  if features.ndim != 2 or 0 in features.shape:
    raise ValueError(f"{where}: features have shape {features.shape}; expected [N, D], both > 0")
  if features.dtype.kind not in "biuf":
    raise ValueError(f"{where}: features are {features.dtype}; save them as numbers")
  # Else a number too large for float32 would become infinite.
  if sparse.issparse(features):
    features = sparse.csr_array(features)
    rows, values = np.repeat(np.arange(features.shape[0]), np.diff(features.indptr)), features.data
  else:
    rows, values = np.arange(len(features))[:, None], features
  bad = ~(np.abs(values) <= np.finfo(np.float32).max)
  if bad.any():
    node = np.broadcast_to(rows, bad.shape)[bad][0]
    raise ValueError(
      f"{where}: features of node {node} hold {values[bad][0]} ({bad.sum()} such values); "
      "they must be finite in float32: repair or drop them"
    )
  return features.astype(np.float32)


def _checked_labels(labels: Any, num_nodes: int, where: str) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim not in (1, 2) or len(labels) != num_nodes or 0 in labels.shape:
    raise ValueError(
      f"{where}: labels have shape {labels.shape}, features {num_nodes} rows; give [N] or [N, L]"
    )
  if labels.dtype.kind not in "biuf":
    raise ValueError(f"{where}: labels are {labels.dtype}; number the classes from 0")
  if labels.ndim == 2:
    if not np.isin(labels, (0, 1)).all():
      bad = labels[~np.isin(labels, (0, 1))][0]
      raise ValueError(f"{where}: labels [N, L] hold {bad}; each must be 0 or 1")
    return labels.astype(np.float32)
  if labels.dtype.kind == "f":
    labels = np.where(np.isnan(labels), -1, labels)  # how OGB marks a missing label
  bad = (labels < -1) | (labels >= 2**31) | (labels % 1 != 0)
  if bad.any():
    node = np.flatnonzero(bad)[0]
    raise ValueError(
      f"{where}: label of node {node} is {labels[node]}; give a class from 0, or -1 where missing"
    )
  if (labels < 0).all():
    raise ValueError(f"{where}: every label is missing; linear evaluation needs some")
  return labels.astype(np.int32)


def _checked_edges(edges: Any, num_nodes: int, where: str) -> np.ndarray:
  edges = np.asarray(edges)
  if edges.ndim != 2 or edges.shape[0] != 2:
    raise ValueError(f"{where}: edges have shape {edges.shape}; expected one row of two nodes each")
  if edges.dtype.kind not in "iu":
    raise ValueError(f"{where}: edges are {edges.dtype}; save node numbers as integers")
  edges = edges.astype(np.int64)
  bad = ((edges < 0) | (edges >= num_nodes)).any(axis=0)
  if bad.any():
    first = np.flatnonzero(bad)[0]
    raise ValueError(
      f"{where}: edge {first} joins {edges[0, first]} and {edges[1, first]}, but the {num_nodes} "
      f"nodes are 0 to {num_nodes - 1} ({bad.sum()} such edges): number nodes from 0"
    )
  return edges


def _checked_splits(splits: dict[str, Any], num_nodes: int, where: str) -> dict[str, np.ndarray]:
  masks = {name: np.atleast_2d(np.asarray(mask)) for name, mask in splits.items()}
  num_splits = max((len(mask) for mask in masks.values()), default=0)
  for name, mask in masks.items():
    if mask.shape not in ((1, num_nodes), (num_splits, num_nodes)):
      raise ValueError(
        f"{where}: split {name} has shape {mask.shape}; expected [{num_splits}, {num_nodes}] masks"
      )
    if not np.isin(mask, (0, 1)).all():
      raise ValueError(f"{where}: split {name} must be a mask of false and true, or 0 and 1")
    if not mask.any(axis=1).all():
      raise ValueError(f"{where}: split {name} number {np.argmin(mask.any(axis=1))} has no nodes")
    masks[name] = np.repeat(mask.astype(bool), num_splits // len(mask), axis=0)
  for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
    if first in masks and second in masks and (both := masks[first] & masks[second]).any():
      node = np.argwhere(both)[0, 1]
      raise ValueError(
        f"{where}: splits {first} and {second} share node {node}: remove it from one"
      )
  return masks


def _clean_edges(
  stored: np.ndarray, graph_ids: np.ndarray, raw: graph_formats.Raw, policy: str
) -> tuple[np.ndarray, dict[str, int | str]]:
  num_nodes = len(graph_ids)
  loops = stored[0] == stored[1]
  between = graph_ids[stored[0]] != graph_ids[stored[1]]
  kept = stored[:, ~(loops | between)]
  if raw.undirected:
    kept = np.sort(kept, axis=0)
  codes = np.unique(kept[1] * num_nodes + kept[0])
  reverse = codes % num_nodes * num_nodes + codes // num_nodes
  one_way = ~np.isin(codes, reverse, assume_unique=True)
  num_one_way = 0 if raw.undirected else int(one_way.sum())
  if policy == "error" and num_one_way:
    code = int(codes[one_way][0])
    raise ValueError(
      f"{raw.where}: {num_one_way} edges have no reverse, such as {code % num_nodes} to "
      f'{code // num_nodes}; edges="symmetrise" adds it, edges="keep" leaves them'
    )
  if raw.undirected or policy == "symmetrise":
    codes = np.union1d(codes, reverse)
  return np.stack([codes % num_nodes, codes // num_nodes]), {
    "layout": raw.layout,
    "edges_stored": stored.shape[1],
    "stored_as": "pairs" if raw.undirected else "directed edges",
    "edge_policy": policy,
    "self_loops_dropped": int(loops.sum()),
    "edges_between_graphs_dropped": int(between.sum()),
    "duplicates_merged": kept.shape[1] - len(reverse),
    "one_way_edges": num_one_way,
  }


def _row_normalise(features: Any) -> Any:
  sums = np.asarray(features.sum(axis=1, dtype=np.float64))
  # The released code divides by max(sum, 1); of counts that is the sum.
  divisors = np.maximum(sums, 1) if features.min() < 0 else np.where(sums > 0, sums, 1)
  if not sparse.issparse(features):
    return (features / divisors[:, None]).astype(np.float32)
  scaled = features.data / np.repeat(divisors, np.diff(features.indptr))
  parts = scaled.astype(np.float32), features.indices, features.indptr
  return sparse.csr_array(parts, shape=features.shape)


def _standardise(features: Any) -> np.ndarray:
  dense = features.toarray() if sparse.issparse(features) else features
  scale = dense.std(axis=0, dtype=np.float64)
  centred = dense - dense.mean(axis=0, dtype=np.float64)
  return (centred / np.where(scale > 0, scale, 1)).astype(np.float32)
