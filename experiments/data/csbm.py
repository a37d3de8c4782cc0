"""The contextual stochastic block model: both edges and features carry information on two classes.

| paper  | here             | meaning                                                            |
|--------|------------------|--------------------------------------------------------------------|
| v      | 2 `labels` - 1   | -1 or 1 with equal probability, independent                        |
| n, p   | `num_nodes`, `num_features` | gamma = n / p                                           |
| d      | `mean_degree`    | over both classes                                                  |
| lambda | `edge_signal`    | i and j are joined with prob. (d + lambda sqrt(d) v_i v_j) / n     |
| mu     | `feature_signal` | features are sqrt(mu / n) v_i u + z_i / sqrt(p), with u ~ N(0, I/p) |
|        |                  | and noise z_i ~ N(0, I)                                            |

As n and p, and then d, go to infinity, the classes can be recovered better than by chance if
lambda^2 + mu^2 / gamma > 1, and cannot if it is below 1. Edges and features that are each too weak
alone can therefore suffice together. Runs without data files use this data set.

Reference: Deshpande et al. 2018, https://arxiv.org/abs/1807.08479.
"""

import math
from collections.abc import Sequence

import numpy as np

from experiments.data import graph_formats, graphs


def sample(
  num_nodes: int,
  num_features: int,
  *,
  mean_degree: float,
  edge_signal: float,
  feature_signal: float,
  seed: int | Sequence[int],
) -> graphs.Graph:
  """Draws a graph with dense features `[N, D]` and labels 0 and 1, in time linear in its edges.

  Args:
    num_nodes: n, at least 2.
    num_features: p, positive.
    mean_degree: d, positive; both edge probabilities must lie in [0, 1].
    edge_signal: lambda; if negative, nodes of different classes are joined more often.
    feature_signal: mu, not negative.
    seed: not negative; the sample is reproducible as long as NumPy's generators do not change.

  Raises:
    ValueError: an argument is out of range.
  """
  _check_sizes(num_nodes, num_features, feature_signal)
  if not 0 < mean_degree < math.inf:
    raise ValueError(f"mean_degree is {mean_degree}; it must be positive and finite")
  probs = [
    (mean_degree + sign * edge_signal * math.sqrt(mean_degree)) / num_nodes for sign in (1, -1)
  ]
  if not all(0 <= prob <= 1 for prob in probs):
    raise ValueError(
      f"edge_signal is {edge_signal}: edge probabilities {probs[0]:.3g} within and {probs[1]:.3g} "
      f"between classes; |edge_signal| must be at most sqrt(mean_degree) = "
      f"{math.sqrt(mean_degree):.3g}, and mean_degree well below num_nodes"
    )
  draw = np.random.default_rng(seed)
  labels = draw.integers(0, 2, num_nodes)
  zeros, ones = (np.flatnonzero(labels == label) for label in (0, 1))
  edges = [_within(draw, nodes, probs[0]) for nodes in (zeros, ones)]
  edges.append(_between(draw, zeros, ones, probs[1]))
  direction = draw.normal(size=num_features) / math.sqrt(num_features)
  noise = draw.normal(size=(num_nodes, num_features)) / math.sqrt(num_features)
  signal = math.sqrt(feature_signal / num_nodes) * (2 * labels - 1)
  features = signal[:, None] * direction + noise
  raw = graph_formats.Raw(
    "csbm", "csbm", features, np.concatenate(edges, axis=1), labels, {}, undirected=True
  )
  return graphs.build(raw, name="csbm")


def sample_several(
  num_graphs: int,
  num_labels: int,
  num_nodes: int,
  num_features: int,
  *,
  mean_degree: float,
  edge_signal: float,
  feature_signal: float,
  seed: int,
) -> graphs.Graph:
  """Draws several graphs whose nodes have several binary labels, like the protein graphs of PPI.

  Each label has a block model of its own over the same nodes. The direction of its features is the
  same in all graphs. The edges are the union over labels, and the features are the sum over labels
  divided by sqrt(num_labels). The last quarter of the graphs (at least one) is the test set, and
  the same number before them is the validation set. Edges between graphs are drawn and then
  dropped, so the time is `num_graphs` times that of drawing the edges that remain.

  Args:
    num_graphs: number of graphs, at least 3.
    num_labels: number of independent labels, at least 2.
    num_nodes: number of nodes in each graph.
    num_features: number of features of each node.
    mean_degree: mean degree within a graph from the edges of one label.
    edge_signal: as in `sample`, for each label.
    feature_signal: as in `sample`, for each label.
    seed: as in `sample`.

  Raises:
    ValueError: an argument is out of range.
  """
  for name, count, least in (("num_graphs", num_graphs, 3), ("num_labels", num_labels, 2)):
    if count < least:
      raise ValueError(f"{name} is {count}; at least {least} are needed")
  # Scaled so that probabilities within a graph are those of `sample` with `num_nodes` nodes.
  parts = [
    sample(
      num_graphs * num_nodes,
      num_features,
      mean_degree=num_graphs * mean_degree,
      edge_signal=math.sqrt(num_graphs) * edge_signal,
      feature_signal=num_graphs * feature_signal,
      seed=(seed, label),
    )
    for label in range(num_labels)
  ]
  graph_ids = np.repeat(np.arange(num_graphs), num_nodes)
  held_out = max(1, num_graphs // 4)
  first_test = num_graphs - held_out
  raw = graph_formats.Raw(
    "csbm_several",
    "csbm",
    sum(part.features for part in parts) / math.sqrt(num_labels),
    np.concatenate([[part.senders, part.receivers] for part in parts], axis=1),
    np.stack([part.labels for part in parts], axis=1),
    {
      "train": graph_ids < first_test - held_out,
      "val": (graph_ids >= first_test - held_out) & (graph_ids < first_test),
      "test": graph_ids >= first_test,
    },
    graph_ids,
    undirected=True,
  )
  return graphs.build(raw, name="csbm_several")


def threshold(num_nodes: int, num_features: int, *, feature_signal: float) -> float:
  """Returns the |edge_signal| above which classes can be recovered: sqrt(1 - mu^2 / gamma), or 0.

  Example:
    >>> threshold(1000, 500, feature_signal=1.0) ** 2  # gamma = 2
    0.5000000000000001
  """
  _check_sizes(num_nodes, num_features, feature_signal)
  return math.sqrt(max(0.0, 1 - feature_signal**2 * num_features / num_nodes))


def _check_sizes(num_nodes: int, num_features: int, feature_signal: float) -> None:
  if num_nodes < 2 or num_features < 1:
    raise ValueError(
      f"num_nodes is {num_nodes}, num_features {num_features}; at least 2 and 1 are needed"
    )
  if not 0 <= feature_signal < math.inf:
    raise ValueError(f"feature_signal is {feature_signal}; it must be finite and not negative")


def _distinct(draw: np.random.Generator, num_pairs: int, prob: float) -> np.ndarray:
  """Draws which of `num_pairs` pairs are joined, each with probability `prob`."""
  # Without replacement, NumPy's memory is at most 20 times the number of pairs that are drawn.
  return draw.choice(num_pairs, draw.binomial(num_pairs, prob), replace=False, shuffle=False)


def _within(draw: np.random.Generator, nodes: np.ndarray, prob: float) -> np.ndarray:
  """Draws edges `[2, E]` among `nodes`."""
  count = len(nodes)
  if count < 2:
    return np.zeros((2, 0), np.int64)
  pairs = _distinct(draw, count * (count - 1) // 2, prob)
  # Pair k is (i, k - i (i - 1) / 2), where i is the largest integer with i (i - 1) / 2 <= k. In
  # float64 this is exact up to 6e7 nodes.
  larger = ((1 + np.sqrt(1 + 8 * pairs)) / 2).astype(np.int64)
  return np.stack([nodes[larger], nodes[pairs - larger * (larger - 1) // 2]])


def _between(
  draw: np.random.Generator, first: np.ndarray, second: np.ndarray, prob: float
) -> np.ndarray:
  """Draws edges `[2, E]` between the nodes of `first` and those of `second`."""
  if not (len(first) and len(second)):
    return np.zeros((2, 0), np.int64)
  pairs = _distinct(draw, len(first) * len(second), prob)
  return np.stack([first[pairs // len(second)], second[pairs % len(second)]])
