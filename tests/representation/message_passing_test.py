"""Sums over neighbours equal a loop over edges, forward and backward, in any layout.

Tolerances of 1e-12 allow for rounding in float64.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from representation import message_passing


def _edges(rng, num_senders, num_receivers, num_edges):
  """Random edges: receiver 0 has most of them, some receivers have none, edges may repeat."""
  receivers = np.minimum(*rng.integers(0, num_receivers, (2, num_edges)))
  return rng.integers(0, num_senders, num_edges), receivers // 2


def _slow_sum(values, senders, receivers, weights, num_receivers):
  result = np.zeros((num_receivers, *values.shape[1:]))
  for sender, receiver, weight in zip(senders, receivers, weights, strict=True):
    result[receiver] += (
      np.reshape(weight, (*np.shape(weight), *[1] * (values.ndim - 1 - np.ndim(weight))))
      * values[sender]
    )
  return result


@pytest.mark.parametrize("implementation", ["rows", "segments", "auto"])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_sums_and_gradients_equal_a_loop_over_edges(x64, implementation, chunk_size):
  rng = np.random.default_rng(0)
  senders, receivers = _edges(rng, 9, 12, 70)
  neighbours = message_passing.layout(
    senders, receivers, num_senders=9, num_receivers=12, chunk_size=chunk_size
  )
  assert (neighbours.num_senders, neighbours.num_receivers, neighbours.num_edges) == (9, 12, 70)
  for heads in ((), (3,)):
    values, weights = rng.normal(size=(9, *heads, 4)), rng.normal(size=(70, *heads))
    cotangents = rng.normal(size=(12, *heads, 4))

    def total(values, weights, cotangents=cotangents):
      slots = message_passing.to_slots(neighbours, weights)
      found = message_passing.neighbour_sum(
        values, neighbours, slots, implementation=implementation
      )
      return jnp.sum(found * cotangents), found

    gradients, found = jax.jit(jax.grad(total, (0, 1), has_aux=True))(
      jnp.asarray(values), jnp.asarray(weights)
    )
    expected = _slow_sum(values, senders, receivers, weights, 12)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    to_values = _slow_sum(cotangents, receivers, senders, weights, 9)
    np.testing.assert_allclose(gradients[0], to_values, atol=1e-12)
    to_weights = np.sum(values[senders] * cotangents[receivers], axis=-1)
    np.testing.assert_allclose(gradients[1], to_weights, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_edges=st.integers(0, 40), multiple=st.integers(1, 5))
def test_every_edge_has_one_slot_in_both_directions(seed, num_edges, multiple):
  rng = np.random.default_rng(seed)
  senders, receivers = _edges(rng, 6, 7, num_edges)
  neighbours = message_passing.layout(
    senders, receivers, num_senders=6, num_receivers=7, num_rows_multiple=multiple
  )
  for rows in (neighbours.rows, neighbours.transposed):
    assert len(rows.receivers) % multiple == 0 and np.all(np.diff(rows.receivers) >= 0)
    assert np.count_nonzero(rows.mask) == num_edges
  mask = np.asarray(neighbours.mask)
  edges = np.asarray(neighbours.rows.edges)[mask]
  assert sorted(edges) == list(range(num_edges))
  owners = np.repeat(neighbours.receivers[:, None], mask.shape[1], axis=1)[mask]
  np.testing.assert_array_equal(np.asarray(neighbours.senders)[mask], senders[edges])
  np.testing.assert_array_equal(owners, receivers[edges])
  # The transposed slots point at the forward slot of the same edge.
  transposed = neighbours.transposed
  mask_t = np.asarray(transposed.mask)
  forward = np.asarray(neighbours.rows.edges).reshape(-1)[np.asarray(transposed.edges)[mask_t]]
  owners_t = np.repeat(transposed.receivers[:, None], mask_t.shape[1], axis=1)[mask_t]
  np.testing.assert_array_equal(owners_t, senders[forward])
  np.testing.assert_array_equal(np.asarray(transposed.senders)[mask_t], receivers[forward])


def test_a_hub_costs_no_more_than_its_edges():
  """A node with 1,000 neighbours among 1,000 nodes with one neighbour."""
  senders = np.concatenate([np.arange(1, 1001), np.zeros(1000, int)])
  receivers = np.concatenate([np.zeros(1000, int), np.arange(1, 1001)])
  neighbours = message_passing.layout(senders, receivers, num_receivers=1001)
  # Rows of 4 slots, the shortest: 250 full rows for the hub, and one row for each other node.
  assert neighbours.mask.shape == (1250, 4)
  degrees = message_passing.degrees(neighbours, neighbours.mask.astype(jnp.int32))
  np.testing.assert_array_equal(degrees, [1000] + [1] * 1000)
  weights = jnp.where(neighbours.mask, 1.0, 7.0)  # weights of empty slots are ignored
  found = message_passing.neighbour_sum(jnp.ones((1001, 1)), neighbours, weights)
  np.testing.assert_array_equal(found[:, 0], degrees)


def test_eight_devices_equal_one(x64):
  rng = np.random.default_rng(1)
  senders, receivers = _edges(rng, 16, 16, 100)
  neighbours = message_passing.layout(
    senders, receivers, num_receivers=16, num_rows_multiple=8, chunk_size=4
  )
  values, weights = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.normal(size=(100)))
  slots = message_passing.to_slots(neighbours, weights)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  placed = jax.tree.map(lambda leaf: jax.device_put(leaf, split), (values, neighbours, slots))

  def squares(values, neighbours, slots):
    return jnp.sum(message_passing.neighbour_sum(values, neighbours, slots) ** 2)

  gradient = jax.jit(jax.value_and_grad(squares, (0, 2)))
  one, many = gradient(values, neighbours, slots), gradient(*placed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), many, one)
  # Devices exchange values of nodes and weights of edges, but no vector for each edge.
  text = gradient.lower(*placed).compile().as_text()
  sizes = [
    math.prod(map(int, shape.split(",")))
    for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-(?:gather|reduce)\(", text)
  ]
  assert sizes and max(sizes) <= max(values.size, slots.size) < values.shape[1] * len(weights)


@pytest.mark.parametrize(
  ("platform", "same"), [("cpu", "rows"), ("tpu", "segments"), ("cuda", "segments")]
)
def test_the_platform_chooses_the_implementation(platform, same):
  neighbours = message_passing.layout([0, 1, 2], [1, 2, 0], num_receivers=3)
  weights = neighbours.mask.astype(jnp.float32)

  def lowered(implementation):
    function = jax.jit(
      functools.partial(message_passing.neighbour_sum, implementation=implementation)
    )
    traced = function.trace(jnp.ones((3, 2)), neighbours, weights)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  # Only the implementation by rows has an optimisation barrier.
  assert ("optimization_barrier" in lowered("auto")) == (same == "rows")
  assert "optimization_barrier" in lowered("rows")
  assert "optimization_barrier" not in lowered("segments")


def test_bad_input_is_refused():
  def layout(senders=(0, 1), receivers=(1, 0), **options):
    return message_passing.layout(senders, receivers, **{"num_receivers": 2, **options})

  with pytest.raises(ValueError, match=r"lists of equal length, got shapes \(2,\) and \(1,\)"):
    layout(receivers=(0,))
  with pytest.raises(ValueError, match=r"receivers must lie in \[0, 2\), got 2 at position 1"):
    layout(receivers=(0, 2))
  with pytest.raises(ValueError, match=r"senders must lie in \[0, 2\), got -1 at position 0"):
    layout(senders=(-1, 0))
  with pytest.raises(ValueError, match="senders must be integers, got float64"):
    layout(senders=(0.0, 1.0))
  with pytest.raises(ValueError, match="chunk_size must be an integer >= 1, got 0"):
    layout(chunk_size=0)
  with pytest.raises(ValueError, match="num_rows_multiple must be an integer >= 1, got True"):
    layout(num_rows_multiple=True)
  neighbours = layout()
  with pytest.raises(ValueError, match="values must have one row for each of 2 edges"):
    message_passing.to_slots(neighbours, jnp.ones(3))
  mask = neighbours.mask
  with pytest.raises(ValueError, match=r"weights must have shape \[R, K, ...\]"):
    message_passing.neighbour_sum(jnp.ones((2, 1)), neighbours, mask[0])
  with pytest.raises(ValueError, match="one row for each of 2 senders"):
    message_passing.neighbour_sum(jnp.ones((3, 1)), neighbours, mask)
  with pytest.raises(ValueError, match="values must be floating, got int32"):
    message_passing.neighbour_sum(jnp.ones((2, 1), jnp.int32), neighbours, mask / 2)
  with pytest.raises(ValueError, match="do not fit values of shape"):
    message_passing.neighbour_sum(jnp.ones((2, 4)), neighbours, jnp.ones((*mask.shape, 3)))
  with pytest.raises(ValueError, match="implementation must be"):
    message_passing.neighbour_sum(jnp.ones((2, 1)), neighbours, mask, implementation="scatter")
