"""Buffers: the replay holds the newest items, the reservoir a uniform sample of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rl_theory import buffers


def _empty(capacity):
  return buffers.empty(jnp.int32, (capacity,))._replace(items=jnp.full(capacity, -1))


@pytest.mark.parametrize("capacity", [7, 20])  # calls add up to 12 items
def test_the_replay_holds_the_newest_in_a_circle(capacity):
  buffer, rng, seen = _empty(capacity), np.random.default_rng(0), []
  add = jax.jit(buffers.add_to_replay)
  for call in range(6):
    items, mask = 12 * call + np.arange(12), rng.random(12) < (0.2, 0.9)[call % 2]
    buffer = add(buffer, jnp.asarray(items), jnp.asarray(mask))
    seen += items[mask].tolist()
    expected = np.full(capacity, -1)
    for number, item in enumerate(seen):
      expected[number % capacity] = item
    np.testing.assert_array_equal(buffer.items, expected)
  assert int(buffer.seen) == len(seen)


MASKS = np.random.default_rng(0).permutation(48).reshape(3, 16) < 24  # 24 items in three calls


def _fill(capacity, num_runs, seed=0):
  """Reservoirs of independent runs that saw the same 24 items."""

  def run(key):
    buffer = _empty(capacity)
    for call, mask in enumerate(jnp.asarray(MASKS)):
      items, key_of_call = 16 * call + jnp.arange(16), jax.random.fold_in(key, call)
      buffer = buffers.add_to_reservoir(buffer, items, mask, key_of_call)
    return buffer

  return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(seed), num_runs))


# Full after the first call, which is larger than the buffer; full in the middle of the last call.
@pytest.mark.parametrize("capacity", [3, 20])
def test_the_reservoir_is_a_uniform_sample_of_everything_seen(capacity):
  num_runs, num_items = 4000, 24
  full = _fill(capacity, num_runs)
  held = np.asarray(full.items)
  assert np.all(held >= 0) and np.all(np.asarray(full.seen) == num_items)
  assert all(len(set(row)) == capacity for row in held.tolist())  # without replacement
  counts = np.bincount(held.ravel(), minlength=MASKS.size)
  assert not counts[~MASKS.ravel()].any()
  # With p = C / N an item's indicator has variance p (1 - p), and two have covariance
  # -p (1 - p) / (N - 1), so this sum has a chi-square distribution with N - 1 degrees of freedom.
  share = capacity / num_items
  deviations = counts[MASKS.ravel()] - num_runs * share
  variance = num_runs * share * (1 - share) * num_items / (num_items - 1)
  statistic = np.sum(deviations**2) / variance
  assert 1e-4 < scipy.stats.chi2.sf(statistic, num_items - 1) < 1 - 1e-4  # of one fixed seed


def test_the_reservoir_keeps_everything_while_there_is_room():
  held = np.asarray(_fill(30, 1).items)[0]
  np.testing.assert_array_equal(held[:24], np.flatnonzero(MASKS))
  np.testing.assert_array_equal(held[24:], -1)


def test_of_two_items_for_one_place_the_later_stays():
  full = jnp.ones(2, bool)
  keys = jax.random.split(jax.random.key(1), 2000)
  held = jax.vmap(lambda key: buffers.add_to_reservoir(_empty(1), jnp.arange(2), full, key).items)(
    keys
  )
  # The second item replaces the first with probability 1/2; five standard errors are 0.056.
  assert abs(np.mean(np.asarray(held)) - 0.5) < 0.056


def test_an_empty_mask_changes_nothing():
  none = jnp.zeros(4, bool)
  before = buffers.add_to_replay(_empty(3), jnp.arange(4), ~none)
  for after in (
    buffers.add_to_replay(before, jnp.arange(9, 13), none),
    buffers.add_to_reservoir(before, jnp.arange(9, 13), none, jax.random.key(0)),
  ):
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_buffers_side_by_side_are_those_of_a_loop():
  rng = np.random.default_rng(1)
  items = {"state": jnp.asarray(rng.integers(0, 99, (3, 16))), "reward": rng.normal(size=(3, 16))}
  items = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), items)
  masks, keys = jnp.asarray(MASKS), jax.random.split(jax.random.key(2), 3)
  start = buffers.empty({"state": jnp.float32, "reward": jnp.float32}, (3, 5))
  many = (
    jax.vmap(buffers.add_to_replay)(start, items, masks),
    jax.vmap(buffers.add_to_reservoir)(start, items, masks, keys),
  )
  for row in range(3):
    own, given = (jax.tree.map(lambda leaf, k=row: leaf[k], tree) for tree in (start, items))
    alone = (
      buffers.add_to_replay(own, given, masks[row]),
      buffers.add_to_reservoir(own, given, masks[row], keys[row]),
    )
    found = jax.tree.map(lambda leaf, k=row: leaf[k], many)
    jax.tree.map(np.testing.assert_array_equal, found, alone)


def test_draws_are_uniform_over_what_a_buffer_holds():
  held = np.array([3, 8])  # of eight places
  two = buffers.empty(jnp.int32, (2, 8))._replace(seen=jnp.asarray([3, 50]))
  two = two._replace(items=jnp.stack([jnp.arange(8), 10 + jnp.arange(8)]))
  found = np.asarray(buffers.draw(two, jax.random.key(0), 4000))
  assert found.shape == (4000, 2)
  for column, (first, size) in enumerate(zip((0, 10), held, strict=True)):
    counts = np.bincount(found[:, column] - first, minlength=size)
    assert len(counts) == size  # no place that is not in use, and none of the other buffer
    assert scipy.stats.chisquare(counts).pvalue > 1e-4  # of one fixed seed
