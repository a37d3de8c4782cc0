"""How embeddings of nodes are judged: a linear layer on them, beside the same layer on less.

A score without its rows beside it says little, since an untrained encoder already averages over
neighbours. The rows: the features themselves, the same after two rounds of averaging (SGC, without
a parameter), the encoder before training, and the trained one. What counts is the gain.

Protocols, by what the data set has: 20 frozen random splits (20 % train), each with five halves
that choose C; the data set's own splits, C chosen by their validation nodes; several labels a node,
micro-F1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from experiments import evaluation, report
from experiments.data import graphs, node_splits
from representation import probes

MAX_COLUMNS = 1024  # wider features are judged by their main directions
NUM_DIRECTIONS = 512


class Judge:
  """Scores embeddings of one data set; the rows that need no encoder are computed once.

  Attributes:
    metric: "accuracy" or "micro_f1".
    num_splits: how many scores `score` returns.
  """

  def __init__(self, data: graphs.Graph, *, num_splits: int, split_seed: int):
    self._data = data
    self.metric = "micro_f1" if data.labels.ndim > 1 else "accuracy"
    self._splits = _make_splits(data, num_splits, split_seed)
    self.num_splits = len(self._splits.train_rows)

  def score(self, embeddings: Any) -> np.ndarray:
    """Returns the test score of each split, from embeddings `[N, K]`."""
    labels = self._data.labels
    if labels.ndim > 1:
      found = probes.evaluate_multilabel(
        jnp.asarray(embeddings), jnp.asarray(labels), self._splits.train_rows[0],
        self._splits.validation_rows[0, 0], self._splits.test_rows[0],
      )  # fmt: skip
      return np.atleast_1d(np.asarray(found.score, float))
    found = probes.evaluate_nodes(
      embeddings, np.maximum(labels, 0), self._splits, num_classes=int(labels.max()) + 1
    )
    return np.asarray(found.score, float)

  @functools.cached_property
  def baselines(self) -> dict[str, np.ndarray]:
    """Scores of the features alone, and averaged twice over neighbours."""
    features, note = _narrow(self._data.features)
    averaged = features
    adjacency = _normalised_adjacency(self._data)
    for _ in range(2):
      averaged = adjacency @ averaged
    return {f"features{note}": self.score(features), f"SGC-2{note}": self.score(averaged)}

  def result(
    self, trained: Any, untrained: Any, extra: Callable[[], dict[str, Any]] = dict
  ) -> evaluation.Result:
    """Returns the scores of an encoder before and after training, with all rows beside them."""
    scores = {
      **self.baselines,
      "encoder, untrained": self.score(untrained),
      "encoder, trained": self.score(trained),
    }
    before, after = scores["encoder, untrained"], scores["encoder, trained"]
    rows = [
      [name, f"{100 * x.mean():.2f}", f"{100 * x.std():.2f}", f"{100 * x.min():.2f}",
       f"{100 * x.max():.2f}"]
      for name, x in scores.items()
    ]  # fmt: skip
    title = f"Test {self.metric.replace('_', ' ')} in percent, {self.num_splits} splits"
    notes = [[name.replace("_", " "), str(value)] for name, value in self._data.notes.items()]
    return evaluation.Result(
      metrics={
        self.metric: _estimate(after),
        f"{self.metric}_untrained": _estimate(before),
        "gain": _estimate(after - before),
        **extra(),
      },
      tables=[
        report.Table(title, ["of", "mean", "standard deviation", "worst", "best"], rows),
        report.Table("Data", ["what", "value"], notes),
      ],
      arrays={"embeddings": np.asarray(trained), "labels": self._data.labels},
    )


def _estimate(scores: np.ndarray) -> evaluation.Estimate:
  # No interval: the test sets of the splits overlap.
  return evaluation.Estimate(
    float(scores.mean()), note=f"+- {scores.std():.4f} over {len(scores)} splits"
  )


def _make_splits(data: graphs.Graph, num_splits: int, split_seed: int) -> probes.Splits:
  if data.splits:
    train, validation, test = (
      _rows_of(data.splits[name], data.name, name) for name in ("train", "val", "test")
    )
    return probes.Splits(train, test, train[:, None], validation[:, None])
  if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
    raise ValueError(f"num_splits must be an integer >= 1, got {num_splits!r}")
  drawn = [
    node_splits.random_split(data.labels, seed=split_seed, split=k) for k in range(num_splits)
  ]
  return probes.Splits(
    *(np.stack([getattr(one, name) for one in drawn])
      for name in ("train", "test", "fit", "validation"))
  )  # fmt: skip


def _rows_of(masks: np.ndarray, data_name: str, name: str) -> np.ndarray:
  """Masks `[S, N]` as row numbers `[S, n]`."""
  counts = masks.sum(1)
  if np.ptp(counts):
    raise ValueError(
      f"{data_name}: its splits have {counts.min()} to {counts.max()} nodes in {name!r}; equal "
      "numbers are needed: cut them to the smallest"
    )
  return np.stack([np.flatnonzero(mask) for mask in masks])


def _narrow(features: Any) -> tuple[np.ndarray, str]:
  """Returns dense features, wide ones by their main directions, and what to call that."""
  if features.shape[1] <= MAX_COLUMNS:
    return features.toarray() if sparse.issparse(features) else np.asarray(features), ""
  left, values, _ = sparse.linalg.svds(features.astype(np.float32), k=NUM_DIRECTIONS, rng=0)
  return left * values, f", {NUM_DIRECTIONS} main directions"


def _normalised_adjacency(data: graphs.Graph) -> Any:
  size = len(data.labels)
  ones = np.ones(len(data.senders), np.float32)
  adjacency = sparse.csr_array((ones, (data.receivers, data.senders)), shape=(size, size))
  adjacency = adjacency + sparse.eye_array(size, dtype=np.float32)
  scale = sparse.dia_array((1 / np.sqrt(adjacency.sum(1))[None], [0]), shape=(size, size))
  return scale @ adjacency @ scale


def embedding_map(result: evaluation.Result, *, max_points: int = 4000) -> report.Figure:
  """Draws embeddings by their two main directions, a colour for each class."""
  embeddings, labels = result.arrays["embeddings"], result.arrays["labels"]
  order = np.random.default_rng(0).permutation(len(embeddings))[:max_points]
  rows = embeddings[order] / np.maximum(
    np.linalg.norm(embeddings[order], axis=1, keepdims=True), 1e-12
  )
  centred = rows - rows.mean(0)
  _, _, directions = np.linalg.svd(centred, full_matrices=False)
  flat = centred @ directions[:2].T
  figure, axes = report.subplots(1, 1)
  colours = labels[order] if labels.ndim == 1 else labels[order].sum(1)
  cmap = "tab10" if colours.max() < 10 else "tab20"
  axes[0][0].scatter(*flat.T, c=colours, cmap=cmap, s=4, linewidths=0)
  axes[0][0].set(xticks=[], yticks=[], xlabel="first direction", ylabel="second direction")
  caption = "Embeddings of unit length, by their two main directions; colours are " + (
    "classes." if labels.ndim == 1 else "numbers of labels."
  )
  return report.Figure("embeddings", caption, figure)
