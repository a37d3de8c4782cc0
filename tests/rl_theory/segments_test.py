"""Sums over segments against NumPy's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_theory import segments


@pytest.mark.parametrize(("size", "num_segments"), [(1, 1), (200, 400)])
def test_sums_equal_numpy(x64, size, num_segments):
  rng = np.random.default_rng(size)
  ids = rng.integers(0, num_segments, size) ** 2 // num_segments  # of very different sizes
  values = rng.normal(size=(3, size))
  parts = segments.make(ids, num_segments)
  mapped = jax.jit(jax.vmap(lambda row: segments.segment_sum(row, parts)))(jnp.asarray(values))
  for row, sums in zip(values, mapped, strict=True):
    expected = np.bincount(ids, weights=row, minlength=num_segments)
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_padding_at_most_doubles():
  ids = np.repeat(np.arange(40), np.arange(40))
  parts = segments.make(ids, 40)
  assert sum(table.size for table in parts.rows) <= 2 * len(ids)
