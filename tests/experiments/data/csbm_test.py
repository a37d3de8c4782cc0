"""The contextual block model: the statistics of its paper, and memory linear in its edges."""

import math

import numpy as np
import pytest

from experiments.data import csbm

ARGUMENTS = {"mean_degree": 9.0, "edge_signal": 2.0, "feature_signal": 3.0, "seed": 0}


@pytest.fixture(scope="module")
def graph():
  return csbm.sample(20_000, 200, **ARGUMENTS)


def test_edges_are_pairs_and_the_degree_is_the_mean_degree(graph):
  assert graph.name == "csbm" and graph.notes["num_classes"] == 2
  assert not (graph.senders == graph.receivers).any()
  codes = graph.senders.astype(np.int64) * 20_000 + graph.receivers
  reverse = graph.receivers.astype(np.int64) * 20_000 + graph.senders
  np.testing.assert_array_equal(np.sort(codes), np.sort(reverse))
  assert len(np.unique(codes)) == len(codes)
  # 90,000 pairs with a standard deviation of 300: five of them are a sixtieth.
  np.testing.assert_allclose(len(codes) / 20_000, 9, rtol=1 / 60)
  # Degrees are Poisson: their variance is 9 (1 + small), estimated to 1 %; five errors.
  degrees = np.bincount(graph.receivers, minlength=20_000)
  np.testing.assert_allclose(degrees.var(), 9, rtol=0.05)
  assert graph.notes["duplicates_merged"] == graph.notes["self_loops_dropped"] == 0


def test_within_and_between_classes(graph):
  labels = graph.labels
  np.testing.assert_allclose(labels.mean(), 0.5, atol=5 * 0.5 / math.sqrt(20_000))
  within = (labels[graph.senders] == labels[graph.receivers]).mean()
  # (d + lambda sqrt(d)) / 2d = 15 / 18; five errors of a share of 90,000 pairs.
  np.testing.assert_allclose(within, 15 / 18, atol=5 * math.sqrt(15 / 18 * 3 / 18 / 90_000))
  # Both classes alike inside, so the numbering of pairs leaves out none and doubles none.
  for label in (0, 1):
    inside = (labels[graph.senders] == label) & (labels[graph.receivers] == label)
    count = (labels == label).sum()
    np.testing.assert_allclose(inside.sum() / count, 15 / 20_000 * count, rtol=0.03)


def test_features_have_the_signal_along_one_direction(graph):
  features, signs = graph.features.astype(np.float64), 2 * graph.labels - 1
  # The mean of v_i b_i is sqrt(mu / n) u with noise of variance 1 / (n p): the squared length is
  # (mu |u|^2 + 1) / n, and |u|^2 is 1 to sqrt(2 / p) = 0.1. Five errors.
  mean = (signs[:, None] * features).mean(0)
  np.testing.assert_allclose(20_000 * (mean**2).sum(), 3 + 1, atol=5 * 0.1 * 3)
  # Noise of variance 1 / p, of which 4,000,000 values tell 0.07 %; five errors.
  np.testing.assert_allclose(200 * features.var(), 1, rtol=0.0036)


def test_every_pair_can_be_drawn_and_none_twice():
  # Two nodes have the same class or not; here every pair is joined with probability 1.
  graph = csbm.sample(7, 1, mean_degree=7, edge_signal=0, feature_signal=0, seed=3)
  assert len(graph.senders) == 7 * 6
  alone = csbm.sample(60, 1, mean_degree=30, edge_signal=math.sqrt(30), feature_signal=0, seed=0)
  same = alone.labels[:, None] == alone.labels
  assert len(alone.senders) == same.sum() - 60, "all pairs within, none between"
  other = csbm.sample(60, 1, mean_degree=30, edge_signal=-math.sqrt(30), feature_signal=0, seed=0)
  assert len(other.senders) == (~same).sum()


def test_a_seed_gives_the_same_sample():
  first, same, other = (csbm.sample(50, 3, **{**ARGUMENTS, "seed": s}) for s in (1, 1, 2))
  for name in ("features", "senders", "receivers", "labels"):
    np.testing.assert_array_equal(getattr(first, name), getattr(same, name))
  assert (first.features != other.features).all()


def test_memory_follows_the_edges_not_the_pairs():
  graph = csbm.sample(300_000, 1, **{**ARGUMENTS, "mean_degree": 4.0})  # 4.5e10 pairs
  np.testing.assert_allclose(len(graph.senders) / 300_000, 4, rtol=0.01)


def test_threshold():
  assert csbm.threshold(1000, 500, feature_signal=0) == 1
  np.testing.assert_allclose(csbm.threshold(1000, 500, feature_signal=1), math.sqrt(0.5))
  assert csbm.threshold(1000, 500, feature_signal=2) == 0


@pytest.mark.parametrize(
  ("sizes", "changes", "message"),
  [
    ((1, 5), {}, "num_nodes is 1, num_features 5"),
    ((5, 0), {}, "num_features 0"),
    ((100, 5), {"mean_degree": 0.0}, "mean_degree is 0.0; it must be positive"),
    ((100, 5), {"mean_degree": math.nan}, "mean_degree is nan"),
    ((100, 5), {"edge_signal": 3.1}, "edge_signal is 3.1: .* between classes; .* = 3"),
    ((100, 5), {"mean_degree": 99.0}, "well below num_nodes"),
    ((100, 5), {"feature_signal": -1.0}, "feature_signal is -1.0"),
  ],
)
def test_bad_arguments_are_named(sizes, changes, message):
  with pytest.raises(ValueError, match=message):
    csbm.sample(*sizes, **{**ARGUMENTS, **changes})


def test_several_graphs_have_several_labels_and_no_edges_between_them():
  graph = csbm.sample_several(
    5, 3, 400, 30, mean_degree=6.0, edge_signal=2.0, feature_signal=4.0, seed=0
  )
  assert graph.labels.shape == (2000, 3) and graph.features.shape == (2000, 30)
  np.testing.assert_array_equal(graph.graph_ids, np.repeat(np.arange(5), 400))
  np.testing.assert_array_equal(graph.graph_ids[graph.senders], graph.graph_ids[graph.receivers])
  for name, ids in (("train", [0, 1, 2]), ("val", [3]), ("test", [4])):
    np.testing.assert_array_equal(graph.splits[name][0], np.isin(graph.graph_ids, ids))
  # Three labels of mean degree 6 each; 18,000 pairs, so five errors are 4 %.
  np.testing.assert_allclose(len(graph.senders) / 2000, 18, rtol=0.04)
  for label in range(3):
    same = graph.labels[graph.senders, label] == graph.labels[graph.receivers, label]
    # (1 + lambda / sqrt(d)) / 2 of this label's third, half of the others'; five errors of 18,000.
    expected = (1 + 2 / math.sqrt(6)) / 6 + 1 / 3
    np.testing.assert_allclose(same.mean(), expected, atol=5 * 0.5 / math.sqrt(18_000))
    # One direction for all graphs, so that a linear layer carries over.
    signs = 2 * graph.labels[:, label] - 1
    signal = signs[:, None] * graph.features
    first, last = signal[:1200].mean(0), signal[1200:].mean(0)
    assert first @ last > 0.5 * np.linalg.norm(first) * np.linalg.norm(last)
  with pytest.raises(ValueError, match="num_graphs is 2; at least 3"):
    csbm.sample_several(2, 3, 9, 3, mean_degree=2.0, edge_signal=0.0, feature_signal=0.0, seed=0)
