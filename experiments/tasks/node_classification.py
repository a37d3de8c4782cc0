"""How embeddings of nodes are judged: a linear layer on them, beside the same layer on less.

A score without its rows beside it says little, since an untrained encoder already averages over
neighbours. The rows: the features themselves, the same after two rounds of averaging (SGC, without
a parameter), the encoder before training, and the trained one. What counts is the gain.

Protocols, by what the data set has: 20 frozen random splits (20 % train), each with five halves
that choose C; the data set's own splits, C chosen by their validation nodes; several labels a node,
micro-F1. Or "softmax" (ogbn-arxiv), a layer of all classes together, its weight decay chosen.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from experiments.data import graphs, node_splits
from experiments.report import plots, results
from representation import adamw_probes, probes
from sharding import checks

PROTOCOLS = ("", "softmax")
MAX_COLUMNS = 1024  # wider features are judged by their main directions
NUM_DIRECTIONS = 512
SOFTMAX_STEPS = 100  # of AdamW, as published
MAX_POINTS = 4000  # of the map of embeddings
COLUMNS = ("of", "mean", "standard deviation", "worst", "best")


class Evaluator:
  """Scores embeddings of one data set; the rows that need no encoder are computed once.

  Attributes:
    metric: "accuracy" or "micro_f1".
    num_splits: how many scores `score` returns.
  """

  def __init__(self, data: graphs.Graph, *, num_splits: int, split_seed: int, protocol: str = ""):
    several = data.labels.ndim > 1
    if protocol not in PROTOCOLS or (protocol and several):
      listed = " or ".join(map(repr, PROTOCOLS))
      raise ValueError(
        f"protocol={protocol!r}: give {listed} (by what the data set has), and '' where nodes have "
        "several labels"
      )
    self._data = data
    self.metric = "micro_f1" if several else "accuracy"
    self._splits = _make_splits(data, num_splits, split_seed)
    self.num_splits = len(self._splits.train_rows)
    # What counts first: gains of a layer that is far from fitted are the layer's.
    self._ways: dict[str, Callable[[Any], np.ndarray]] = {"": self._logistic}
    if several:
      self._ways = {"": self._multilabel}
    elif protocol:
      self._ways = {
        "": functools.partial(self._softmax, num_steps=None),
        f"_{SOFTMAX_STEPS}_steps": functools.partial(self._softmax, num_steps=SOFTMAX_STEPS),
      }

  def score(self, embeddings: Any, way: str = "") -> np.ndarray:
    """Returns the test score of each split, from embeddings `[N, K]`."""
    return np.asarray(self._ways[way](jnp.asarray(embeddings)), float)

  def _logistic(self, embeddings: jnp.ndarray) -> Any:
    labels = self._data.labels
    return probes.evaluate_nodes(
      embeddings, np.maximum(labels, 0), self._splits, num_classes=int(labels.max()) + 1
    ).score

  def _multilabel(self, embeddings: jnp.ndarray) -> Any:
    labels = jnp.asarray(self._data.labels)
    return [
      adamw_probes.evaluate_multilabel(embeddings, labels, *rows).score for rows in self._rows()
    ]

  def _softmax(self, embeddings: jnp.ndarray, *, num_steps: int | None) -> Any:
    labels = self._data.labels
    return [
      adamw_probes.evaluate_softmax(
        embeddings, np.maximum(labels, 0), *rows, num_classes=int(labels.max()) + 1,
        num_steps=num_steps,
      ).score
      for rows in self._rows()
    ]  # fmt: skip

  def _rows(self) -> Any:
    """Training, validation and test rows of each split, for protocols that fit once."""
    splits = self._splits
    return zip(splits.fit_rows[:, 0], splits.validation_rows[:, 0], splits.test_rows, strict=True)

  @functools.cached_property
  def baselines(self) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the features alone, and averaged twice over neighbours, by way and row."""
    features, note = _narrow(self._data.features)
    averaged = features
    adjacency = _normalised_adjacency(self._data)
    for _ in range(2):
      averaged = adjacency @ averaged
    rows = {f"features{note}": features, f"SGC-2{note}": averaged}
    return {way: {name: self.score(row, way) for name, row in rows.items()} for way in self._ways}

  def result(
    self, trained: Any, untrained: Any, extra: Callable[[], dict[str, Any]] = dict
  ) -> results.Result:
    """Returns the scores of an encoder before and after training, with all rows beside them."""
    metrics: dict[str, Any] = {}
    tables = []
    for way, rows in self.baselines.items():
      before, after = self.score(untrained, way), self.score(trained, way)
      rows = {**rows, "encoder, untrained": before, "encoder, trained": after}
      metrics |= {
        f"{self.metric}{way}": _estimate(after),
        f"{self.metric}_untrained{way}": _estimate(before),
        f"gain{way}": _estimate(after - before),
      }
      tables.append(
        results.Table(
          f"Test {self.metric.replace('_', ' ')} in percent, {self.num_splits} splits"
          + way.replace("_", " "),
          COLUMNS,
          [
            [name, *(100 * float(x) for x in (s.mean(), s.std(), s.min(), s.max()))]
            for name, s in rows.items()
          ],
          caption="The untrained encoder has another initialisation than the trained one.",
          digits=2,
        )
      )
    notes = [[name.replace("_", " "), str(value)] for name, value in self._data.notes.items()]
    shown = np.random.default_rng(0).permutation(len(trained))[:MAX_POINTS]
    return results.Result(
      metrics={**metrics, **extra()},
      tables=[*tables, results.Table("Data", ["what", "value"], notes)],
      arrays={"embeddings": np.asarray(trained)[shown], "labels": self._data.labels[shown]},
    )


def _estimate(scores: np.ndarray) -> results.Estimate:
  # No interval: the test sets of the splits overlap.
  return results.Estimate(
    float(scores.mean()), note=f"+- {scores.std():.4f} over {len(scores)} splits"
  )


def _make_splits(data: graphs.Graph, num_splits: int, split_seed: int) -> probes.Splits:
  if data.splits:
    if missing := {"train", "val", "test"} - set(data.splits):
      raise ValueError(
        f"{data.name}: its splits lack {sorted(missing)}, which embeddings are judged by: add "
        "them, or leave all out for random ones"
      )
    train, validation, test = (
      _rows_of(data.splits[name], data.name, name) for name in ("train", "val", "test")
    )
    return probes.Splits(train, test, train[:, None], validation[:, None])
  checks.count("num_splits", num_splits)
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
  num_nodes, num_columns = features.shape
  if num_columns <= MAX_COLUMNS or num_nodes <= NUM_DIRECTIONS:
    dense = features.toarray() if sparse.issparse(features) else np.asarray(features)
    if num_columns <= MAX_COLUMNS:
      return dense, ""
    left, values, _ = np.linalg.svd(dense, full_matrices=False)
    return left * values, ""  # in all directions: the same to a linear layer
  left, values, _ = sparse.linalg.svds(features.astype(np.float32), k=NUM_DIRECTIONS, rng=0)
  return left * values, f", {NUM_DIRECTIONS} main directions"


def _normalised_adjacency(data: graphs.Graph) -> Any:
  size = len(data.labels)
  ones = np.ones(len(data.senders), np.float32)
  adjacency = sparse.csr_array((ones, (data.receivers, data.senders)), shape=(size, size))
  adjacency = adjacency + sparse.eye_array(size, dtype=np.float32)
  scale = sparse.dia_array((1 / np.sqrt(adjacency.sum(1))[None], [0]), shape=(size, size))
  return scale @ adjacency @ scale


def embedding_map(result: results.Result) -> results.Figure:
  """Draws embeddings by their two main directions, a colour for each class."""
  embeddings, labels = result.arrays["embeddings"], result.arrays["labels"]
  rows = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
  centred = rows - rows.mean(0)
  _, _, directions = np.linalg.svd(centred, full_matrices=False)
  flat = centred @ directions[:2].T
  figure, axes = plots.subplots(1, 1)
  colours = labels if labels.ndim == 1 else labels.sum(1)
  cmap = "tab10" if colours.max() < 10 else "tab20"
  axes[0][0].scatter(*flat.T, c=colours, cmap=cmap, s=4, linewidths=0)
  axes[0][0].set(xticks=[], yticks=[], xlabel="first direction", ylabel="second direction")
  caption = "Embeddings of unit length, by their two main directions; colours are " + (
    "classes." if labels.ndim == 1 else "numbers of labels."
  )
  return results.Figure("embeddings", caption, figure)
