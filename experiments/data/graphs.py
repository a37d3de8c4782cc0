"""Graphs with features and labels on their nodes: loaded by name, checked and cleaned.

`load` reads a data set in any layout of `graph_formats`. `build` does the same for arrays in
memory, such as those of `csbm.sample`. `Graph.notes` records what was found and changed.

Edges are sorted by receiver, then by sender. There are no duplicates and no self-loops; encoders
add self-loops where they need them.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from experiments.data import graph_checks, graph_formats

EDGE_POLICIES = ("symmetrise", "keep", "error")
FEATURES = ("file", "identity", "degree")
_LARGEST_DEGREE = 256  # features of larger degrees are equal
# Layouts of bags of words and word vectors. BGRL divides these features by their row sums.
_ROW_NORMALISED = ("repacked", "gnn_benchmark", "wikics")


class Graph(NamedTuple):
  """A graph of N nodes and E directed edges; it may consist of several unconnected graphs.

  name: the name of the data set.
  features: `[N, D]` float32, dense or `scipy.sparse.csr_array`.
  senders, receivers: `[E]` int32 nodes; an undirected edge is stored in both directions.
  labels: `[N]` int32 classes with -1 for a missing label, or `[N, L]` float32 zeros and ones.
  splits: "train", "val", "test" (WikiCS also "stopping") to `[num_splits, N]` bool masks; empty if
    the data set has no published splits.
  graph_ids: `[N]` int32, the graph of each node; zeros for a single graph.
  notes: what was found and changed: name to number, bool or string.
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
  features: str = "file",
) -> Graph:
  """Loads a data set in one of the layouts of `graph_formats`.

  Args:
    name_or_path: a path, or the name of `<directory>/<name>/<name>.npz`, `<directory>/<name>.npz`
      or the folder `<directory>/<name>`.
    directory: the folder of the data sets.
    edges: what to do with an edge whose reverse is missing: "symmetrise" adds the reverse, "keep"
      leaves the edge as it is, "error" raises. Layouts that store each pair once always get both
      directions.
    row_normalise: whether to divide the features of each node by their sum; None does so for the
      layouts `repacked`, `gnn_benchmark` and `wikics`. See `build` for negative features.
    standardise: whether to give each feature mean 0 and variance 1 over the nodes, after row
      normalisation; the features become dense. None does so for `wikics`, as BGRL does.
    binarise: whether to replace positive features by 1 and others by 0, before all else. The
      Coauthor sets count words. BGRL's released code takes them from PyTorch Geometric, which
      binarises them.
    features: "file", or for a graph without features "identity" (each node has one of its own) or
      "degree" (the number of a node's neighbours, one-hot, up to 256).

  Raises:
    ValueError: the name or layout is unknown, a file is damaged, or the contents are inconsistent.
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
    features=features,
  )


def build(
  raw: graph_formats.Raw,
  *,
  name: str,
  edges: str = "symmetrise",
  row_normalise: bool = False,
  standardise: bool = False,
  binarise: bool = False,
  features: str = "file",
) -> Graph:
  """Checks and cleans the arrays of a graph; the arguments are those of `load`.

  Classes are numbered from 0 without gaps, and labels whose rows are one-hot become classes; the
  notes say so.

  Duplicate edges are merged, self-loops and edges between two graphs are dropped, and isolated
  nodes are kept; the notes count each of them. Row normalisation leaves rows of zeros as they are.
  If a feature is negative, it divides by max(sum, 1) as BGRL's released code did for WikiCS,
  because the sum may then be near zero.

  Raises:
    ValueError: sizes differ, an edge or label is out of range, features are missing or not finite,
      no node is labelled, a split is empty, overlaps another or holds a node without a label, or
      `edges` is "error" and an edge has no reverse.
  """
  where = raw.where
  if edges not in EDGE_POLICIES:
    raise ValueError(f"edges is {edges!r}; choose one of {EDGE_POLICIES}")
  if features not in FEATURES:
    raise ValueError(f"features is {features!r}; choose one of {FEATURES}")
  if features == "file" and raw.features is None:
    raise ValueError(f'{where} holds no features: choose features="identity" or "degree"')
  num_nodes = (np.shape(raw.labels) or (0,))[0]
  given = None
  if features == "file":
    given = graph_checks.features(raw.features, where)
    num_nodes = given.shape[0]
  labels = graph_checks.labels(raw.labels, num_nodes, where)
  labels, label_notes = _classes(labels)
  splits = graph_checks.splits(raw.splits, labels, where)
  graph_ids = graph_checks.graph_ids(raw.graph_ids, num_nodes, where)
  stored = graph_checks.edges(raw.edges, num_nodes, where)
  (senders, receivers), notes = _clean_edges(stored, graph_ids, raw, edges)
  degrees = np.bincount(receivers, minlength=num_nodes)
  array = _made_features(features, degrees) if given is None else given
  if binarise:
    array = (array > 0).astype(np.float32)
  if row_normalise:
    array = _row_normalise(array)
  if standardise:
    array = _standardise(array)
  touched = degrees + np.bincount(senders, minlength=num_nodes)
  several = labels.ndim > 1
  notes |= {
    "isolated_nodes": int((touched == 0).sum()),
    "largest_degree": int(degrees.max()),
    "num_graphs": int(graph_ids.max()) + 1,
    "num_classes": labels.shape[1] if several else int(labels.max()) + 1,
    "unlabelled_nodes": 0 if several else int((labels < 0).sum()),
    **label_notes,
    **raw.notes,
    "features": features,
    "binarised": binarise,
    "row_normalised": row_normalise,
    "standardised": standardise,
  }
  return Graph(
    name=name,
    features=array,
    senders=senders.astype(np.int32),
    receivers=receivers.astype(np.int32),
    labels=labels,
    splits=splits,
    graph_ids=graph_ids.astype(np.int32),
    notes=notes,
  )


def _classes(labels: np.ndarray) -> tuple[np.ndarray, dict[str, int | str]]:
  """Returns labels with classes from 0 without gaps, and the notes on what was changed."""
  notes: dict[str, int | str] = {}
  if labels.ndim == 2 and labels.shape[1] > 1 and (labels.sum(axis=1) == 1).all():
    labels = labels.argmax(axis=1).astype(np.int32)
    notes["labels_were_one_hot"] = True
  if labels.ndim == 2:
    return labels, notes
  known = np.unique(labels[labels >= 0])
  if not np.array_equal(known, np.arange(len(known))):
    shown = ", ".join(map(str, known[:5])) + (", ..." if len(known) > 5 else "")
    notes["labels_renumbered"] = f"classes {shown} are 0 to {len(known) - 1}"
    renumbered = np.searchsorted(known, labels).astype(np.int32)
    labels = np.where(labels < 0, labels, renumbered).astype(np.int32)
  return labels, notes


def _made_features(kind: str, degrees: np.ndarray) -> sparse.csr_array:
  """Returns features of nodes that have none, one 1 in each row."""
  if kind == "identity":
    return sparse.csr_array(sparse.eye_array(len(degrees), dtype=np.float32))
  columns = np.minimum(degrees, _LARGEST_DEGREE)
  ones, rows = np.ones(len(degrees), np.float32), np.arange(len(degrees))
  return sparse.csr_array((ones, (rows, columns)), shape=(len(degrees), int(columns.max()) + 1))


def part(graph: Graph, kept: np.ndarray) -> Graph:
  """Returns the subgraph of the nodes in a bool mask `[N]`; nodes and graphs are renumbered."""
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
  """Returns the part to train on: a single graph as it is, or those of several without test nodes.

  Raises:
    ValueError: each of several graphs has test nodes.
  """
  if "test" not in graph.splits or not graph.graph_ids.any():
    return graph
  tested = np.unique(graph.graph_ids[graph.splits["test"].any(axis=0)])
  kept = ~np.isin(graph.graph_ids, tested)
  if not kept.any():
    raise ValueError(
      f"{graph.name}: each of its {len(tested)} graphs has test nodes, so none is left to train "
      "on; put whole graphs into the test split, or give a single graph"
    )
  return part(graph, kept)


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
  # BGRL's released code divides by max(sum, 1), which for counts is the sum.
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
