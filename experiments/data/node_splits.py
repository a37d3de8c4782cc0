"""Reproducible random splits of nodes, for data sets without published splits.

BGRL (https://arxiv.org/abs/2102.06514) fits its linear classifiers on a random fifth of the nodes
and tests them on the others. To choose the regularisation, the fifth is split at random into
halves, five times: the classifier is fitted on one half and validated on the other. With the
chosen regularisation it is fitted again on the whole fifth.

A split is defined by `numpy.random.PCG64(numpy.random.SeedSequence([seed, split]))`. NumPy
guarantees its stream of raw 64-bit integers, but not its shuffles. The M labelled nodes get the
first M integers in order, and the floor(train_fraction M) nodes with the smallest integers are the
training nodes. For each of the five splits into halves, the sorted training nodes get the next
integers, and the half with the smaller ones, rounded down, is for fitting.
"""

from typing import NamedTuple

import numpy as np

NUM_HALVES = 5


class Split(NamedTuple):
  """Sorted int64 numbers of nodes; nodes without a label are left out.

  train: `[T]` training nodes.  test: `[M - T]`, the other labelled nodes.
  fit, validation: `[5, T // 2]` and `[5, T - T // 2]`, the halves of the training nodes.
  """

  train: np.ndarray
  test: np.ndarray
  fit: np.ndarray
  validation: np.ndarray


def random_split(
  labels: np.ndarray, *, seed: int, split: int, train_fraction: float = 0.2
) -> Split:
  """Returns the split of a seed and a number, which is the same on every machine.

  Args:
    labels: `[N]` with -1 for a missing label, or `[N, L]`, where all nodes are labelled.
    seed: seed of the splits, not negative. It is not the seed of a run, so that runs are compared
      on the same splits.
    split: number of the split, not negative. The splits of a seed are independent.
    train_fraction: fraction of the labelled nodes to train on, between 0 and 1.

  Raises:
    ValueError: an argument is out of range, or fewer than two nodes are left for training or fewer
      than one for testing.
  """
  labels = np.asarray(labels)
  for name, value in (("seed", seed), ("split", split)):
    if value < 0:
      raise ValueError(f"{name} is {value}; it must not be negative")
  if not 0 < train_fraction < 1:
    raise ValueError(f"train_fraction is {train_fraction}; it must be between 0 and 1")
  labelled = np.arange(len(labels)) if labels.ndim > 1 else np.flatnonzero(labels >= 0)
  num_train = int(train_fraction * len(labelled) + 1e-6)  # 0.29 * 100 is 28.999999999999996
  if num_train < 2 or num_train == len(labelled):
    raise ValueError(
      f"train_fraction {train_fraction} of {len(labelled)} labelled nodes leaves {num_train} for "
      "training; at least 2 are needed, and 1 for testing"
    )
  stream = np.random.PCG64(np.random.SeedSequence([seed, split]))
  train, test = _lowest(stream, labelled, num_train)
  halves = [_lowest(stream, train, num_train // 2) for _ in range(NUM_HALVES)]
  fit, validation = (np.stack(nodes) for nodes in zip(*halves, strict=True))
  return Split(train, test, fit, validation)


def _lowest(
  stream: np.random.PCG64, nodes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draws an integer for each node; returns the `count` nodes with the least, and the others."""
  order = np.argsort(stream.random_raw(len(nodes)), kind="stable")
  return np.sort(nodes[order[:count]]), np.sort(nodes[order[count:]])
