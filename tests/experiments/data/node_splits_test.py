"""Random splits: disjoint, of the right sizes, and reproducible."""

import numpy as np
import pytest

from experiments.data import node_splits

LABELS = np.where(np.arange(1000) % 10 == 0, -1, np.arange(1000) % 3)  # 900 are labelled


def test_parts_are_disjoint_and_cover_the_labelled_nodes():
  found = node_splits.random_split(LABELS, seed=0, split=0)
  assert found.train.shape == (180,) and found.test.shape == (720,)
  both = np.concatenate([found.train, found.test])
  np.testing.assert_array_equal(np.sort(both), np.flatnonzero(LABELS >= 0))
  assert found.fit.shape == found.validation.shape == (node_splits.NUM_HALVES, 90)
  for fit, validation in zip(found.fit, found.validation, strict=True):
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, validation])), found.train)
  assert len({tuple(fit) for fit in found.fit}) == node_splits.NUM_HALVES
  for part in (found.train, found.test, *found.fit, *found.validation):
    assert part.dtype == np.int64 and (np.diff(part) > 0).all()


def test_splits_are_frozen():
  found = node_splits.random_split(np.zeros(20, np.int64), seed=5, split=2, train_fraction=0.4)
  np.testing.assert_array_equal(found.train, [0, 4, 6, 7, 8, 9, 16, 19])
  fit = [[0, 4, 7, 9], [4, 9, 16, 19], [4, 8, 16, 19], [0, 6, 7, 19], [4, 8, 9, 16]]
  np.testing.assert_array_equal(found.fit, fit)


def test_the_rule_in_words():
  stream = np.random.PCG64(np.random.SeedSequence([7, 3]))
  numbers = [(stream.random_raw(), node) for node in np.flatnonzero(LABELS >= 0)]
  train = sorted(node for _, node in sorted(numbers)[:180])
  halves = []
  for _ in range(5):
    numbers = [(stream.random_raw(), node) for node in train]
    halves.append(sorted(node for _, node in sorted(numbers)[:90]))
  found = node_splits.random_split(LABELS, seed=7, split=3)
  np.testing.assert_array_equal(found.train, train)
  np.testing.assert_array_equal(found.fit, halves)


def test_seeds_and_numbers_give_other_splits():
  trains = [
    tuple(node_splits.random_split(LABELS, seed=seed, split=split).train)
    for seed in (0, 1)
    for split in (0, 1)
  ]
  assert len(set(trains)) == 4


def test_every_node_trains_equally_often():
  counts = np.zeros(1000)
  for split in range(200):
    counts[node_splits.random_split(LABELS, seed=0, split=split).train] += 1
  assert (counts[LABELS < 0] == 0).all()
  # Binomial(200, 0.2) has a standard deviation of 5.7; of 900 the farthest is within five.
  assert np.abs(counts[LABELS >= 0] - 40).max() < 28


def test_multi_label_nodes_are_all_labelled_and_odd_sizes_round_down():
  found = node_splits.random_split(np.zeros((35, 4)), seed=0, split=0)
  assert (len(found.train), len(found.test)) == (7, 28)
  assert found.fit.shape == (5, 3) and found.validation.shape == (5, 4)
  whole = node_splits.random_split(np.zeros(100), seed=0, split=0, train_fraction=0.29)
  assert len(whole.train) == 29


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": -1}, "seed is -1"),
    ({"split": -1}, "split is -1"),
    ({"train_fraction": 0}, "train_fraction is 0"),
    ({"train_fraction": 1.0}, "train_fraction is 1.0"),
    ({"labels": np.full(9, -1)}, "of 0 labelled nodes leaves 0 for"),
    ({"labels": np.zeros(9)}, "of 9 labelled nodes leaves 1 for"),
  ],
)
def test_bad_arguments_are_named(changes, message):
  arguments = {"labels": LABELS, "seed": 0, "split": 0, **changes}
  with pytest.raises(ValueError, match=message):
    node_splits.random_split(arguments.pop("labels"), **arguments)
