"""Random splits of nodes that never change: for data sets without splits of their own.

BGRL (https://arxiv.org/abs/2102.06514) fits its linear classifiers on a random fifth of the nodes
and tests on the rest. Inside that fifth, five random halves choose the regularisation: fit on one,
validate on the other; the chosen one is fitted again on the whole fifth.

The rule: `numpy.random.PCG64(numpy.random.SeedSequence([seed, split]))` gives raw 64-bit integers,
a stream that NumPy guarantees (not so its shuffles). The first M go to the M labelled nodes in
order, and the nodes with the floor(train_fraction M) least are the training nodes. The next go to
the sorted training nodes, once for each pair of halves; the lower half, rounded down, fits.
"""

from typing import NamedTuple

import numpy as np

NUM_HALVES = 5


class Split(NamedTuple):
  """Node numbers, int64, sorted; nodes without a label are in none.

  train: `[T]`.  test: `[M - T]`, the other labelled nodes.
  fit, validation: `[5, T // 2]` and `[5, T - T // 2]`, the halves of train.
  """

  train: np.ndarray
  test: np.ndarray
  fit: np.ndarray
  validation: np.ndarray


def random_split(
  labels: np.ndarray, *, seed: int, split: int, train_fraction: float = 0.2
) -> Split:
  """Returns the split of a seed and a number, the same on every machine and for ever.

  Args:
    labels: `[N]` with -1 where missing, or `[N, L]`, where all nodes count as labelled.
    seed: not negative; of the data, not of a run, so that runs are compared on the same splits.
    split: its number, 0 and up; splits of one seed are independent.
    train_fraction: between 0 and 1, of the labelled nodes.

  Raises:
    ValueError: an argument is out of range, or too few nodes are labelled to have two for training
      and one for testing.
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
      "training; at least 2 are needed, and one for testing"
    )
  stream = np.random.PCG64(np.random.SeedSequence([seed, split]))
  train, test = _lowest(stream, labelled, num_train)
  halves = [_lowest(stream, train, num_train // 2) for _ in range(NUM_HALVES)]
  fit, validation = (np.stack(nodes) for nodes in zip(*halves, strict=True))
  return Split(train, test, fit, validation)


def _lowest(
  stream: np.random.PCG64, nodes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Gives each node the next number; returns the `count` of the least and the rest, sorted."""
  order = np.argsort(stream.random_raw(len(nodes)), kind="stable")
  return np.sort(nodes[order[:count]]), np.sort(nodes[order[count:]])
