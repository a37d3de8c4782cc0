"""Quantile dynamic programming in float32, and with input that once made it loop for ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_theory import markov, quantile_dynamics


def test_many_quantiles_have_levels_below_one_in_float32():
  """The tolerance of ties must stay below the distance of levels, 1 / 1100 here."""
  rewards = markov.FiniteRewards([[0.0, 1.0]], [[1.0, 0.0]])  # a value of probability 0
  finite, gaussian = (
    markov.MarkovRewardProcess([[1.0]], rewards, 0.5)
    for rewards in (rewards, markov.NoisyRewards([2.0], 1.0))
  )
  theta = jnp.zeros((1, 1100))
  found = quantile_dynamics.quantile_dynamic_programming(finite, theta, 1.0)
  np.testing.assert_array_equal(found, 0)
  found = quantile_dynamics.quantile_dynamic_programming(gaussian, theta, 1.0)
  expected = 2 + jax.scipy.stats.norm.ppf((np.arange(1100) + 0.5) / 1100)
  # The tolerance 1 / (64 m) over the density at the last level, 0.0015.
  np.testing.assert_allclose(found[0], expected, atol=0.011)


def test_rows_that_miss_one_by_rounding_reach_all_levels():
  rounded, exact = (
    markov.MarkovRewardProcess(
      [[total / 2, total / 2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [2.0, 0.0, 1.0], 0.5
    )
    for total in (0.99995, 1.0)
  )
  theta = jnp.broadcast_to(jnp.array([[1.0], [2.0], [3.0]]), (3, 20_000))
  found, expected = (
    quantile_dynamics.quantile_dynamic_programming(process, theta) for process in (rounded, exact)
  )
  np.testing.assert_array_equal(found, expected)


def test_theta_that_is_not_finite_is_refused_and_does_not_hang_under_jit():
  process, theta = markov.two_states(), jnp.full((2, 1), jnp.nan)
  for function in (
    quantile_dynamics.quantile_dynamic_programming,
    quantile_dynamics.inclusion,
    quantile_dynamics.lyapunov,
  ):
    with pytest.raises(ValueError, match="theta must be finite, got nan"):
      function(process, theta)
  step = jax.jit(lambda theta: quantile_dynamics.quantile_dynamic_programming(process, theta))
  assert not jnp.any(jnp.isfinite(step(theta)))


def test_lambda_on_the_device_is_looked_at():
  with pytest.raises(ValueError, match="lam must lie in"):
    quantile_dynamics.fixed_point(markov.two_states(), num_quantiles=1, lam=jnp.float32(2))
