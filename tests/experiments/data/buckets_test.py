"""Batches of similar length: no row and no token is lost, fewer are padding, and runs resume."""

import collections
import itertools
import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments.data import batching, pretrained
from experiments.loop import presets

pytest.importorskip("grain")
N, B = 320, 4  # five windows of 16 batches


class _Rows(NamedTuple):
  tokens: Any
  mask: Any
  prompt_tokens: Any
  prompt_mask: Any
  row: Any
  absent: Any = None


def _arrays():
  """Two completions padded on the right, a prompt padded on the left; few rows are long."""
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(2.5, 0.7, (N, 2)), 1, 64).astype(int)
  prompts = np.clip(rng.lognormal(2.5, 0.7, N), 1, 40).astype(int)
  mask = (np.arange(64) < lengths[..., None]).astype(np.float32)
  prompt_mask = (np.arange(40) >= 40 - prompts[:, None]).astype(np.float32)
  tokens = (rng.integers(1, 9, mask.shape) * mask).astype(np.int32)
  prompt_tokens = (rng.integers(1, 9, prompt_mask.shape) * prompt_mask).astype(np.int32)
  return _Rows(tokens, mask, prompt_tokens, prompt_mask, np.arange(N))


def _batches(arrays, num_buckets=4, seed=0):
  return batching.batches(arrays, batch_size=B, seed=seed, length_buckets=num_buckets)


def test_batches_keep_every_token_of_their_rows():
  arrays = _arrays()
  for ids, batch in itertools.islice(_batches(arrays), 80):
    np.testing.assert_array_equal(batch.row, ids)
    assert batch.absent is None
    for name, side in (("", 0), ("prompt_", -1)):
      for kind in ("tokens", "mask"):
        whole, cut = (getattr(x, name + kind) for x in (arrays, batch))
        width = cut.shape[-1]
        # Left-padded rows keep their right end, the others their left one.
        kept = whole[ids][..., -width:] if side else whole[ids][..., :width]
        np.testing.assert_array_equal(cut, kept)
        assert cut.sum() == whole[ids].sum()


def test_each_epoch_visits_each_row_once_in_another_order():
  seen = np.concatenate([ids for ids, _ in itertools.islice(_batches(_arrays()), 160)])
  for epoch in seen.reshape(2, N):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
  assert (seen[:N] != seen[N:]).any()
  other = np.concatenate([ids for ids, _ in itertools.islice(_batches(_arrays(), seed=1), 80)])
  assert (seen[:N] != other).any()


def test_no_row_comes_twice_in_an_epoch_that_batches_do_not_divide():
  """Sorted by length, two copies of a row would share a batch."""
  arrays = jax.tree.map(lambda x: x[:30], _arrays())
  seen = np.concatenate([ids for ids, _ in itertools.islice(_batches(arrays, 2), 70)])
  for epoch in seen.reshape(10, 28):
    assert len(set(epoch.tolist())) == 28
  assert set(seen.tolist()) == set(range(30))  # others are left over in each epoch


def test_few_shapes_hold_less_padding():
  arrays = _arrays()
  padding = [1 - (arrays.mask.mean() * 128 + arrays.prompt_mask.mean() * 40) / 168]
  for num_buckets in (2, 4, 8):
    iterator = _batches(arrays, num_buckets)
    shapes, used, size = collections.Counter(), 0, 0
    for _, batch in itertools.islice(iterator, 80):
      shapes[batch.mask.shape + batch.prompt_mask.shape] += 1
      used += batch.mask.sum() + batch.prompt_mask.sum()
      size += batch.mask.size + batch.prompt_mask.size
    assert 1 < len(shapes) <= num_buckets
    np.testing.assert_allclose(iterator.padding, 1 - used / size)  # of the first epoch
    padding.append(iterator.padding)
  assert padding == sorted(padding, reverse=True)
  assert padding[2] < padding[0] - 0.1
  assert batching.batches(arrays, batch_size=B, seed=0).padding is None


def test_the_order_of_lengths_is_shuffled():
  """Batches of one length do not follow each other, as they would in a sorted epoch."""
  widths = [batch.mask.shape[-1] for _, batch in itertools.islice(_batches(_arrays()), 16)]
  assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@pytest.mark.parametrize("consumed", [0, 5, 90])
def test_resumes_exactly(consumed):
  iterator = _batches(_arrays())
  for _ in range(consumed):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [ids.tolist() for ids, _ in itertools.islice(iterator, 20)]
  fresh = _batches(_arrays())
  fresh.set_state(state)
  assert [ids.tolist() for ids, _ in itertools.islice(fresh, 20)] == expected
  with pytest.raises(ValueError, match="length_buckets: 4, here 3"):
    _batches(_arrays(), 3).set_state(state)


def test_what_cannot_be_grouped_is_refused():
  with pytest.raises(ValueError, match="length_buckets=2 is for endless batches"):
    batching.batches(_arrays(), batch_size=B, seed=0, num_epochs=1, length_buckets=2)
  with pytest.raises(ValueError, match=r"data\.length_buckets must be an integer >= 1, got 0"):
    _batches(_arrays(), 0)
  with pytest.raises(ValueError, match="the training examples are not tokens: set it to 1"):
    _batches(_Rows(None, None, None, None, np.arange(N)), 2)


@pytest.mark.parametrize("paper", ["ipo", "rloo", "reward_model"])
def test_a_bad_number_of_buckets_is_refused_before_the_model_is_read(paper, monkeypatch):
  monkeypatch.setattr(pretrained, "load", lambda name: pytest.fail("the model was read"))
  with pytest.raises(ValueError, match=r"data\.length_buckets must be an integer >= 1, got 0"):
    _experiment(paper, 0)


def _experiment(paper, num_buckets):
  config = presets.override(
    presets.resolve(f"{paper}:tiny"), [("data.length_buckets", str(num_buckets))]
  )
  return presets.module_of(config).build(config)


@pytest.mark.parametrize(
  "paper",
  ["ipo"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("copg", "kto", "srpo", "dro")],
)
def test_a_step_on_a_cut_batch_is_that_on_the_whole_rows(paper):
  """The tiny run's update, on rows with their padding and without."""
  experiment, plain = (_experiment(paper, num_buckets) for num_buckets in (3, 1))
  whole = plain.batches()
  rows = {}
  for ids, batch in itertools.islice(whole, 16):
    rows |= {int(i): jax.tree.map(lambda x, n=n: x[n], batch) for n, i in enumerate(ids)}
  state = experiment.init(jax.random.key(0), *experiment.init_args)
  iterator = experiment.batches()
  ids, cut = min((next(iterator) for _ in range(16)), key=lambda one: one[1].prompt_mask.size)
  padded = jax.tree.map(lambda *x: np.stack(x), *[rows[int(i)] for i in ids])
  assert cut.prompt_mask.size < padded.prompt_mask.size
  key = jax.random.key(1)
  found, want = (experiment.update(state, batch, key)[1]["loss"] for batch in (cut, padded))
  np.testing.assert_allclose(found, want, rtol=1e-5)  # float32 sums in another order
