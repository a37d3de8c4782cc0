"""Regret matching: a policy over legal actions only, whatever the regrets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_theory import regret_matching

_regret_matching = jax.jit(regret_matching.regret_matching)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([1e-20, 1.0, 1e20]))
def test_rows_are_policies_over_legal_actions(seed, scale):
  rng = np.random.default_rng(seed)
  legal = rng.random((6, 4)) < 0.6
  legal[:, rng.integers(4)] = True
  regrets = (scale * rng.normal(size=(6, 4))).astype(np.float32)
  policy = np.asarray(_regret_matching(regrets, legal))
  np.testing.assert_allclose(policy.sum(1), 1, rtol=1e-6)  # float32
  assert (policy >= 0).all() and not policy[~legal].any()
  positive = np.where(legal, np.maximum(regrets, 0), 0)
  for row, weights, allowed in zip(policy, positive, legal, strict=True):
    expected = weights / weights.sum() if weights.any() else allowed / allowed.sum()
    np.testing.assert_allclose(row, expected, rtol=1e-5)  # float32


def test_without_positive_regret_it_is_uniform_over_legal_actions():
  # Not an argmax, and no mass on the illegal action with the largest entry.
  regrets, legal = jnp.array([[-3.0, -1.0, 5.0]]), jnp.array([[True, True, False]])
  np.testing.assert_array_equal(regret_matching.regret_matching(regrets, legal), [[0.5, 0.5, 0.0]])


def test_shapes_are_checked():
  with pytest.raises(
    ValueError, match=r"shapes must be equal, got regrets \[2, 3\], legal \[2, 4\]"
  ):
    regret_matching.regret_matching(jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
