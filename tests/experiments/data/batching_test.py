"""Order, epochs and exact resumption of `experiments.data.batching`."""

import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest

from experiments.data import batching

pytest.importorskip("grain")


class _Arrays(NamedTuple):
  tokens: np.ndarray
  weight: np.ndarray
  absent: None = None


def _arrays(n=10):
  return _Arrays(np.arange(2 * n).reshape(n, 2), np.arange(n, dtype=np.float32))


def _ids(iterator, count=None):
  return [ids.tolist() for ids, _ in itertools.islice(iterator, count)]


def test_batch_holds_the_rows_of_its_ids():
  ids, batch = next(batching.batches(_arrays(), batch_size=4, seed=0))
  assert isinstance(batch, _Arrays) and batch.absent is None
  np.testing.assert_array_equal(batch.weight, ids)
  np.testing.assert_array_equal(batch.tokens, np.stack([2 * ids, 2 * ids + 1], 1))
  assert batch.weight.dtype == np.float32


def test_each_epoch_visits_each_example_once_in_another_order():
  seen = np.concatenate(_ids(batching.batches(_arrays(), batch_size=4, seed=0), 15))
  epochs = seen.reshape(6, 10)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (6, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_depends_on_the_seed_alone():
  first, again, other = (
    _ids(batching.batches(_arrays(), batch_size=5, seed=seed), 4) for seed in (7, 7, 8)
  )
  assert first == again and first != other


def test_number_of_epochs_and_remainder():
  settings = {"batch_size": 4, "seed": 0, "num_epochs": 1}
  assert [len(ids) for ids in _ids(batching.batches(_arrays(), **settings))] == [4, 4]
  whole = _ids(batching.batches(_arrays(), **settings, drop_remainder=False))
  assert [len(ids) for ids in whole] == [4, 4, 2]
  assert sorted(itertools.chain(*whole)) == list(range(10))


@pytest.mark.parametrize("consumed", [0, 1, 2, 3, 7])
def test_resumes_exactly(consumed):
  iterator = batching.batches(_arrays(), batch_size=4, seed=3)
  _ids(iterator, consumed)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = _ids(iterator, 6)
  fresh = batching.batches(_arrays(), batch_size=4, seed=3)
  fresh.set_state(state)
  assert _ids(fresh, 6) == expected
  fresh.set_state(state)  # and back again
  assert _ids(fresh, 6) == expected


@pytest.mark.parametrize(
  ("n", "settings", "message"),
  [
    (11, {"batch_size": 4, "seed": 3}, "num_examples: 10, here 11"),
    (10, {"batch_size": 5, "seed": 3}, "batch_size: 4, here 5"),
    (10, {"batch_size": 4, "seed": 4}, "seed: 3, here 4"),
  ],
)
def test_state_of_other_data_is_refused(n, settings, message):
  state = batching.batches(_arrays(), batch_size=4, seed=3).get_state()
  with pytest.raises(ValueError, match=message):
    batching.batches(_arrays(n), **settings).set_state(state)


@pytest.mark.parametrize(
  ("arrays", "settings", "message"),
  [
    (_arrays(), {"batch_size": 11}, "batch_size is 11 but there are 10 examples"),
    (_arrays(), {"batch_size": 0}, "batch_size is 0"),
    (_arrays(), {"batch_size": 1, "num_epochs": 0}, "num_epochs is 0"),
    (_arrays(0), {"batch_size": 1}, "no examples"),
    ({"a": np.zeros(3), "b": np.zeros(4)}, {"batch_size": 1}, "the same leading axis"),
    ({"a": np.zeros(3), "b": 1.0}, {"batch_size": 1}, "the same leading axis"),
    ({}, {"batch_size": 1}, "the same leading axis"),
  ],
)
def test_bad_arguments(arrays, settings, message):
  with pytest.raises(ValueError, match=message):
    batching.batches(arrays, seed=0, **settings)


def test_what_is_made_of_a_batch_depends_on_its_number_only():
  def make(rows, rng):
    return rows.weight, rng.integers(0, 2**30, 3)

  def drawn(iterator, count):
    taken = itertools.islice(iterator, count)
    return [np.concatenate([ids, *made]).tolist() for ids, made in taken]

  settings = {"batch_size": 4, "seed": 3, "make": make}
  whole = drawn(batching.batches(_arrays(), **settings), 9)
  assert len({tuple(row[-3:]) for row in whole}) == 9
  first = batching.batches(_arrays(), **settings)
  assert drawn(first, 5) == whole[:5]
  resumed = batching.batches(_arrays(), **settings)
  resumed.set_state(json.loads(json.dumps(first.get_state())))
  assert drawn(resumed, 4) == whole[5:]
