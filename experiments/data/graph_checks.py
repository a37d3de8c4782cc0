"""Checks of the arrays of a graph before they are cleaned.

Each function raises `ValueError` with `where`, the file of the array, the first wrong entry and the
remedy.
"""

from typing import Any

import numpy as np
from scipy import sparse


def features(values: Any, where: str) -> Any:
  """Returns features `[N, D]` as float32, dense or CSR."""
  features = values if sparse.issparse(values) else np.asarray(values)
  if features.ndim != 2 or 0 in features.shape:
    raise ValueError(f"{where}: features have shape {features.shape}; expected [N, D], both > 0")
  if features.dtype.kind not in "biuf":
    raise ValueError(f"{where}: features are {features.dtype}; save them as numbers")
  # Checked before the cast: a number that is too large for float32 would become infinite.
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


def labels(values: Any, num_nodes: int, where: str) -> np.ndarray:
  """Returns labels as `[N]` int32 with -1 for a missing one, or as `[N, L]` float32."""
  labels = np.asarray(values)
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
    labels = np.where(np.isnan(labels), -1, labels)  # OGB marks missing labels by NaN
  bad = (labels < -1) | (labels >= 2**31) | (labels % 1 != 0)
  if bad.any():
    node = np.flatnonzero(bad)[0]
    raise ValueError(
      f"{where}: label of node {node} is {labels[node]}; give a class from 0, or -1 where missing"
    )
  if (labels < 0).all():
    raise ValueError(f"{where}: every label is missing; linear evaluation needs some")
  return labels.astype(np.int32)


def edges(values: Any, num_nodes: int, where: str) -> np.ndarray:
  """Returns edges `[2, E]` as int64 nodes."""
  edges = np.asarray(values)
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


def splits(values: dict[str, Any], labels: np.ndarray, where: str) -> dict[str, np.ndarray]:
  """Returns bool masks `[num_splits, N]` of labelled nodes, by the name of the split."""
  num_nodes = len(labels)
  masks = {name: np.atleast_2d(np.asarray(mask)) for name, mask in values.items()}
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
  for name, mask in masks.items():
    if labels.ndim == 1 and (unlabelled := mask & (labels < 0)).any():
      raise ValueError(
        f"{where}: split {name} holds node {np.argwhere(unlabelled)[0, 1]}, which has no label "
        f"({unlabelled.any(axis=0).sum()} such nodes): remove them from the splits"
      )
  return masks


def graph_ids(values: Any, num_nodes: int, where: str) -> np.ndarray:
  """Returns the graph `[N]` of each node; zeros for None."""
  graph_ids = np.zeros(num_nodes, int) if values is None else np.asarray(values)
  if graph_ids.shape != (num_nodes,):
    raise ValueError(f"{where}: graph_ids has shape {graph_ids.shape}, expected ({num_nodes},)")
  if graph_ids.dtype.kind not in "iu" or graph_ids.min() < 0:
    raise ValueError(f"{where}: graph_ids must be integers from 0, found {graph_ids.min()}")
  return graph_ids
