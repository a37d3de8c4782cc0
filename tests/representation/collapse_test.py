"""Collapse: against slow loops and SciPy, by hand, with sharded rows and with bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import sharding
from representation import collapse


def _slow(embeddings):
  """Cosine and spread by their definition, pair by pair; ranks from the singular values."""
  cosines, squares = [], []
  for i, one in enumerate(embeddings):
    for j, other in enumerate(embeddings):
      if i != j:
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        cosines.append(one @ other / norms if norms else 0.0)
        squares.append(np.sum((one - other) ** 2))
  values = np.linalg.svd(embeddings, compute_uv=False)
  values = np.where(values > 1e-9 * values[0], values, 0)
  shares = values[values > 0] / values.sum()
  columns = [
    abs(one @ other) / (np.linalg.norm(one) * np.linalg.norm(other))
    for i, one in enumerate(embeddings.T)
    for j, other in enumerate(embeddings.T)
    if i != j
  ]
  return {
    "collapse/mean_cosine": np.mean(cosines),
    "collapse/spread": np.sqrt(np.mean(squares)),
    "collapse/mean_norm": np.mean(np.linalg.norm(embeddings, axis=1)),
    "collapse/rank": np.linalg.matrix_rank(embeddings),
    "collapse/effective_rank": np.exp(-np.sum(shares * np.log(shares))),
    "collapse/column_cosine": np.mean(columns),
    "collapse/largest_singular_value": values[0],
    "collapse/smallest_singular_value": values[-1],
  }


def _embeddings(num_rows, num_features, rank=None):
  rng = np.random.default_rng(num_rows)
  rank = rank or num_features
  made = rng.normal(size=(num_rows, rank)) @ rng.normal(size=(rank, num_features)) + 0.3
  made[1] = 0
  return made


@pytest.mark.parametrize("num_rows, num_features, rank", [(40, 6, None), (40, 6, 3), (5, 12, None)])
def test_numbers_equal_the_slow_ones_over_all_pairs(x64, num_rows, num_features, rank):
  embeddings = _embeddings(num_rows, num_features, rank)
  expected = _slow(embeddings)
  found = collapse.metrics(jnp.asarray(embeddings), spectrum=True)
  assert set(found) == set(expected)
  for key, value in expected.items():
    # The ranks come from a Gram matrix, in which float64 rounding grows with the condition number.
    np.testing.assert_allclose(found[key], value, rtol=1e-9, err_msg=key)
  assert set(collapse.metrics(embeddings)) < set(found)
  assert found["collapse/rank"] == collapse.rank(embeddings)
  assert found["collapse/effective_rank"] == collapse.effective_rank(embeddings)


@pytest.mark.parametrize("num_rows", [1, 2, 1000])
@pytest.mark.parametrize("row", [[0.1, 0.7, -0.3], [1e-30, 3e-30, 0], [1e30, 2e30, 0]])
def test_equal_rows_have_collapsed_fully(num_rows, row):
  found = collapse.metrics(jnp.tile(jnp.array(row), (num_rows, 1)), spectrum=True)
  # 1e-5: float32 sums over 1,000 rows.
  np.testing.assert_allclose(found["collapse/mean_cosine"], 1, atol=1e-5)
  np.testing.assert_allclose(found["collapse/effective_rank"], 1, atol=1e-5)
  assert found["collapse/spread"] == 0
  assert found["collapse/rank"] == 1


def test_a_cloud_far_from_the_origin_shows_in_the_cosine_and_not_in_the_spread():
  rows = jax.random.normal(jax.random.key(0), (500, 16))
  near, far = (collapse.metrics(rows + shift) for shift in (0, 100))
  assert abs(near["collapse/mean_cosine"]) < 0.01 and far["collapse/mean_cosine"] > 0.99
  # 1e-4: float32 numbers near 100 are 8e-6 apart.
  np.testing.assert_allclose(far["collapse/spread"], near["collapse/spread"], rtol=1e-4)


@pytest.mark.parametrize("num_rows", [20, 3_000])
def test_clusters_have_the_rank_of_their_centres(num_rows):
  centres = jax.random.normal(jax.random.key(2), (3, 64)) + 5
  rows = centres[jnp.arange(num_rows) % 3]
  found = collapse.metrics(rows, spectrum=True)
  assert found["collapse/rank"] == 3 and 1 < found["collapse/effective_rank"] < 3


def test_cases_by_hand():
  # Opposite rows: cosine -1 and distance 2. An orthonormal basis: cosine 0, distance sqrt 2.
  pair, basis = jnp.array([[1.0, 0], [-1, 0]]), jnp.eye(4)
  np.testing.assert_allclose(collapse.mean_cosine(pair), -1)
  np.testing.assert_allclose(collapse.spread(pair), 2)
  np.testing.assert_allclose(collapse.mean_cosine(basis), 0, atol=1e-7)
  np.testing.assert_allclose(collapse.spread(basis), np.sqrt(2), rtol=1e-6)
  np.testing.assert_allclose(collapse.effective_rank(basis), 4, rtol=1e-6)
  # Singular values 3 and 1: the entropy of (3/4, 1/4).
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  np.testing.assert_allclose(
    collapse.effective_rank(jnp.diag(jnp.array([3.0, 1, 0]))), np.exp(entropy), rtol=1e-6
  )


def test_parallel_columns_show_in_the_cosine_and_not_in_the_norms():
  column = jax.random.normal(jax.random.key(4), (50, 1))
  found = collapse.metrics(jnp.concatenate([column, -2 * column], axis=1), spectrum=True)
  np.testing.assert_allclose(found["collapse/column_cosine"], 1, rtol=1e-6)
  assert found["collapse/smallest_singular_value"] == 0 and found["collapse/mean_norm"] > 1
  assert collapse.column_cosine(column) == 0


@pytest.mark.parametrize("size, scale", [(2, 1.0), (2, 1e-6), (4, 1e-6)])
def test_subspace_angles_are_those_of_scipy(size, scale):
  rng = np.random.default_rng(5)
  first = rng.normal(size=(9, 3))
  second = (first @ rng.normal(size=(3, 4)))[:, :size] + scale * rng.normal(size=(9, size))
  second = second.astype(np.float32)
  found = collapse.subspace_angles(first.astype(np.float32), second)
  expected = scipy.linalg.subspace_angles(first, second.astype(float))
  # 1e-6: float32. From cosines alone an angle of 1e-6 would come out as 0 or 3e-4. The second
  # matrix of size 4 is almost of rank 3, so its largest angle is not determined.
  np.testing.assert_allclose(found[size // 4 :], expected[size // 4 :], atol=1e-6)


def test_subspace_angles_refuse_another_number_of_rows():
  with pytest.raises(ValueError, match="same number of rows, got 3 and 4"):
    collapse.subspace_angles(jnp.eye(3), jnp.eye(4))
  with pytest.raises(ValueError, match=r"second must have shape \[N, D\]"):
    collapse.subspace_angles(jnp.eye(3), jnp.ones(3))


def test_zeros_give_zero_and_nan_gives_nan():
  zeros = collapse.metrics(jnp.zeros((3, 2)), spectrum=True)
  assert all(value == 0 for value in zeros.values())
  broken = collapse.metrics(jnp.array([[1.0, jnp.nan], [1, 2]]), spectrum=True)
  assert all(np.isnan(value) for key, value in broken.items() if key != "collapse/rank")


def test_bfloat16_is_summed_in_float32():
  rows = jax.random.normal(jax.random.key(1), (1000, 8)).astype(jnp.bfloat16)
  found, exact = collapse.metrics(rows), collapse.metrics(rows.astype(jnp.float32))
  assert found == exact


def test_rows_over_eight_devices_give_one_global_number():
  embeddings = _embeddings(64, 6, 3)
  rows = sharding.shard_batch(embeddings.astype(np.float32), sharding.make_mesh({"data": 8}))
  assert len(rows.addressable_shards) == 8
  found, expected = collapse.metrics(rows, spectrum=True), _slow(_embeddings(64, 6, 3))
  for key, value in expected.items():
    # float32: small singular values come from squares.
    np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (3, 0)])
def test_bad_shapes_are_named(shape):
  for measure in (
    collapse.metrics, collapse.mean_cosine, collapse.spread, collapse.rank, collapse.effective_rank,
    collapse.singular_values, collapse.column_cosine,
  ):  # fmt: skip
    with pytest.raises(
      ValueError, match=r"embeddings must (have shape \[N, D\]|not be empty).*got"
    ):
      measure(jnp.zeros(shape))


@pytest.mark.parametrize("mask", [np.ones(1, bool), np.ones((3, 1), bool), np.ones(3)], ids=str)
def test_masks_that_would_broadcast_are_refused(mask):
  for measure in (collapse.metrics, collapse.mean_cosine, collapse.spread):
    with pytest.raises(ValueError, match=r"mask must have shape \[3\], one bool for each row, got"):
      measure(jnp.ones((3, 2)), mask=mask)


def test_rows_that_do_not_count_change_nothing(x64):
  rng = np.random.default_rng(3)
  rows = jnp.asarray(rng.normal(size=(9, 4)))
  padded = jnp.concatenate([jnp.full((2, 4), jnp.nan), rows, 1e3 * jnp.ones((3, 4))])
  mask = jnp.arange(14)
  mask = (mask >= 2) & (mask < 11)
  found = collapse.metrics(padded, mask=mask, spectrum=True)
  for name, value in collapse.metrics(rows, spectrum=True).items():
    # 1e-10: float64 sums in another order.
    np.testing.assert_allclose(found[name], value, atol=1e-10, err_msg=name)
