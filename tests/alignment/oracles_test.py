"""The oracles against numerical optimisation, identities and bad input.

Written without the losses: a mistake shared by a loss and its oracle must not pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from alignment import oracles


def _problem(num_actions, seed=0):
  rng = np.random.default_rng(seed)
  return np.log(rng.dirichlet(np.ones(num_actions))), rng.normal(size=num_actions)


def _maximise(value, num_actions):
  """The policy that maximises `value(probs)`, by a general-purpose optimiser."""
  result = scipy.optimize.minimize(
    lambda logits: -value(scipy.special.softmax(logits)), np.zeros(num_actions), tol=1e-14
  )
  return scipy.special.softmax(result.x)


def test_kl_regularised_optimum_maximises_the_objective():
  ref_logps, scores = _problem(4)
  ref = np.exp(ref_logps)

  def value(probs):
    return probs @ scores - 0.7 * (probs @ np.log(probs / ref))

  optimum = oracles.kl_regularised_optimum(ref_logps, scores, 0.7)
  np.testing.assert_allclose(np.exp(optimum).sum(), 1, rtol=1e-12)
  # BFGS with numerical derivatives ends at 1e-7 or so.
  np.testing.assert_allclose(np.exp(optimum), _maximise(value, 4), atol=1e-5)
  np.testing.assert_allclose(value(np.exp(optimum)), oracles.optimal_value(ref_logps, scores, 0.7))
  np.testing.assert_allclose(
    oracles.objective(optimum, ref_logps, scores, 0.7), value(np.exp(optimum)), rtol=1e-12
  )


def test_psi_po_optimum_maximises_the_total_preference():
  ref_logps, _ = _problem(3)
  rng = np.random.default_rng(1)
  mu, p = rng.dirichlet(np.ones(3)), 0.9
  preferences = np.array([[0.5, p, 0.2], [1 - p, 0.5, 0.7], [0.8, 0.3, 0.5]])
  for psi in (lambda q: q, lambda q: np.log(q / (1 - q)), np.square):

    def value(probs, psi=psi):
      total = sum(probs[i] * mu[j] * psi(preferences[i, j]) for i in range(3) for j in range(3))
      return total - 0.4 * (probs @ (np.log(probs) - ref_logps))

    optimum = oracles.psi_po_optimum(preferences, mu, ref_logps, 0.4, psi=psi)
    np.testing.assert_allclose(np.exp(optimum), _maximise(value, 3), atol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_two_actions_of_which_one_always_wins(tau):
  optimum = oracles.psi_po_optimum(
    np.array([[0.5, 1.0], [0.0, 0.5]]), np.ones(2) / 2, np.log(np.ones(2) / 2), tau
  )
  np.testing.assert_allclose(np.exp(optimum[0]), 1 / (1 + np.exp(-1 / (2 * tau))), rtol=1e-12)


def test_infinite_psi_counts_nothing_where_mu_is_zero():
  optimum = oracles.psi_po_optimum(
    np.array([[0.5, 1.0], [0.0, 0.5]]), [1.0, 0.0], np.log([0.5, 0.5]), 1.0,
    psi=scipy.special.logit,
  )  # fmt: skip
  np.testing.assert_array_equal(np.exp(optimum), [1, 0])


def _dataset_loss(logits, chosen, rejected, ref_logps, tau):
  ratios = scipy.special.log_softmax(logits) - ref_logps
  return np.mean((ratios[chosen] - ratios[rejected] - 1 / (2 * tau)) ** 2)


def test_ipo_dataset_optimum_minimises_the_regression():
  rng = np.random.default_rng(2)
  ref_logps, _ = _problem(5)
  chosen, rejected = rng.integers(0, 5, (2, 30))
  optimum = oracles.ipo_dataset_optimum(chosen, rejected, ref_logps, 0.6)
  least = scipy.optimize.minimize(
    _dataset_loss, ref_logps, (chosen, rejected, ref_logps, 0.6), tol=1e-14
  )
  np.testing.assert_allclose(
    optimum, scipy.special.log_softmax(least.x), atol=1e-5
  )  # BFGS with numerical derivatives
  assert _dataset_loss(optimum, chosen, rejected, ref_logps, 0.6) <= least.fun + 1e-12


def test_ipo_dataset_optimum_agrees_with_the_pseudo_inverse_and_keeps_components_apart():
  ref_logps, _ = _problem(6)
  chosen, rejected = np.array([0, 1, 0, 3, 5]), np.array([1, 2, 1, 4, 5])
  laplacian, balance = np.zeros((6, 6)), np.zeros(6)
  for winner, loser in zip(chosen, rejected, strict=True):
    edge = np.eye(6)[winner] - np.eye(6)[loser]
    laplacian += np.outer(edge, edge)
    balance += edge
  shift = np.linalg.pinv(laplacian) @ balance / (2 * 0.3)
  for component in ([0, 1, 2], [3, 4], [5]):
    np.testing.assert_allclose(shift[component].sum(), 0, atol=1e-12)
  np.testing.assert_allclose(
    oracles.ipo_dataset_optimum(chosen, rejected, ref_logps, 0.3),
    scipy.special.log_softmax(ref_logps + shift), atol=1e-12,
  )  # fmt: skip


def test_ipo_dataset_optimum_of_a_cycle_is_the_reference_and_of_no_data_too():
  ref_logps, _ = _problem(3)
  for chosen, rejected in (([0, 1, 2], [1, 2, 0]), ([], []), ([1], [1])):
    np.testing.assert_allclose(
      oracles.ipo_dataset_optimum(chosen, rejected, ref_logps, 0.1), ref_logps, atol=1e-12
    )


def test_regret_is_the_value_lost():
  ref_logps, rewards = _problem(5)
  other, _ = _problem(5, seed=9)
  lost = oracles.optimal_value(ref_logps, rewards, 0.3) - oracles.objective(
    other, ref_logps, rewards, 0.3
  )
  np.testing.assert_allclose(oracles.regret(other, ref_logps, rewards, 0.3), lost, rtol=1e-12)
  optimum = oracles.copg_optimum(ref_logps, rewards, 0.3)
  assert 0 <= oracles.regret(optimum, ref_logps, rewards, 0.3) < 1e-14


def test_kl_by_hand_and_at_the_edges_of_the_support():
  np.testing.assert_allclose(
    oracles.kl(np.log([0.5, 0.5]), np.log([0.25, 0.75])), 0.5 * np.log(4 / 3), rtol=1e-12
  )
  with np.errstate(divide="ignore"):
    inside, outside = np.log([1.0, 0.0]), np.log([0.0, 1.0])
  assert oracles.kl(inside, inside) == 0
  assert oracles.kl(inside, outside) == np.inf
  assert oracles.objective(inside, outside, np.ones(2), 1.0) == -np.inf
  optimum = oracles.kl_regularised_optimum(inside, np.array([0.0, 100.0]), 0.1)
  np.testing.assert_array_equal(np.exp(optimum), [1, 0])  # never leaves the reference's support


def test_batches_dtypes_and_both_array_libraries():
  rng = np.random.default_rng(3)
  ref_logps = np.log(rng.dirichlet(np.ones(4), (2, 3)))
  scores = rng.normal(size=(2, 3, 4))
  batched = oracles.kl_regularised_optimum(ref_logps, scores, temperature=0.5)
  assert batched.dtype == np.float64  # without JAX's x64 flag
  np.testing.assert_allclose(
    batched[1, 2], oracles.kl_regularised_optimum(ref_logps[1, 2], scores[1, 2], 0.5)
  )
  chosen, rejected = rng.integers(0, 4, (2, 2, 3, 10))
  many = oracles.ipo_dataset_optimum(chosen, rejected, ref_logps, 0.5)
  np.testing.assert_allclose(
    many[0, 1], oracles.ipo_dataset_optimum(chosen[0, 1], rejected[0, 1], ref_logps[0, 1], 0.5)
  )
  single = jnp.asarray(ref_logps, jnp.float32)
  on_device = jax.jit(oracles.regret)(single, single, jnp.asarray(scores, jnp.float32), 0.5)
  assert on_device.dtype == jnp.float32
  np.testing.assert_allclose(
    on_device, oracles.regret(ref_logps, ref_logps, scores, 0.5), rtol=1e-4, atol=1e-5
  )
  for array in (ref_logps.astype(np.float32), single):
    for result in (
      oracles.kl_regularised_optimum(array, scores, 0.5),
      oracles.ipo_dataset_optimum(chosen, rejected, array, 0.5),
      oracles.psi_po_optimum(np.full((4, 4), 0.5), np.ones(4) / 4, array, 0.5),
      oracles.kl(array, array),
    ):
      assert result.dtype == jnp.float32 and isinstance(result, type(array))


def test_bradley_terry_scores_have_the_least_log_loss_and_give_back_rewards():
  rng = np.random.default_rng(0)
  rewards, skew = rng.normal(size=(2, 4)), np.triu(rng.normal(size=(2, 4, 4)), 1)
  log_odds = rewards[:, :, None] - rewards[:, None, :]
  weights = rng.integers(0, 4, (2, 4, 4)) + 1.0
  straight = oracles.bradley_terry_scores(scipy.special.expit(log_odds), weights)
  np.testing.assert_allclose(straight, rewards - rewards.mean(1, keepdims=True), atol=1e-10)

  preferences = scipy.special.expit(log_odds + skew - np.swapaxes(skew, 1, 2))
  for found, probs, counts in zip(
    oracles.bradley_terry_scores(preferences, weights), preferences, weights, strict=True
  ):

    def log_loss(scores, probs=probs, counts=counts):
      gaps = scores[:, None] - scores[None, :]
      losses = probs * np.logaddexp(0, -gaps) + (1 - probs) * np.logaddexp(0, gaps)
      return (counts * losses).sum()

    least = scipy.optimize.minimize(log_loss, np.zeros(4), tol=1e-12).x
    # BFGS with numerical derivatives ends at 1e-6 or so.
    np.testing.assert_allclose(found, least - least.mean(), atol=1e-5)


def test_scores_that_would_grow_for_ever_are_refused():
  never_loses = np.array([[0.5, 1.0, 1.0], [0.0, 0.5, 0.6], [0.0, 0.4, 0.5]])
  with pytest.raises(ValueError, match="no finite scores"):
    oracles.bradley_terry_scores(never_loses, np.ones((3, 3)))
  apart = np.diag([1.0, 1.0], 1)[:3, :3] * np.array([[1.0], [0.0], [0.0]])  # c is never compared
  with pytest.raises(ValueError, match="no finite scores"):
    oracles.bradley_terry_scores(np.full((3, 3), 0.5), apart)
  with pytest.raises(ValueError, match="weights must be non-negative"):
    oracles.bradley_terry_scores(np.full((3, 3), 0.5), -np.ones((3, 3)))


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), np.array([0.1, 0.0])])
def test_bad_temperatures_raise(bad):
  ref_logps, scores = _problem(2)
  preferences, mu = np.full((2, 2), 0.5), np.ones(2) / 2
  for name, call in {
    "temperature": lambda: oracles.kl_regularised_optimum(ref_logps, scores, bad),
    "tau": lambda: oracles.psi_po_optimum(preferences, mu, ref_logps, bad),
    "tau ": lambda: oracles.ipo_dataset_optimum([0], [1], ref_logps, bad),
    "beta": lambda: oracles.copg_optimum(ref_logps, scores, bad),
    "temperature ": lambda: oracles.objective(ref_logps, ref_logps, scores, bad),
    " temperature": lambda: oracles.regret(ref_logps, ref_logps, scores, bad),
    "  temperature": lambda: oracles.optimal_value(ref_logps, scores, bad),
  }.items():
    with pytest.raises(ValueError, match=f"{name.strip()} must be positive"):
      call()


def test_bad_arrays_raise():
  ref_logps, scores = _problem(3)
  fair, mu = np.full((3, 3), 0.5), np.ones(3) / 3
  unfair = fair + np.triu(np.full((3, 3), 0.1), 1)
  for message, call in (
    (r"the last axes must be equal.*ref_logps \[3\], scores \[2\]",
     lambda: oracles.kl_regularised_optimum(ref_logps, scores[:2], 1)),
    ("must not contain NaN", lambda: oracles.kl_regularised_optimum([np.nan, 0.0], [0, 1], 1)),
    ("got a scalar", lambda: oracles.kl(0.0, ref_logps)),
    (r"preferences \[2, 3\], behaviour_probs \[3\]",
     lambda: oracles.psi_po_optimum(fair[:2], mu, ref_logps, 1)),
    ("antisymmetric", lambda: oracles.psi_po_optimum(unfair, mu, ref_logps, 1)),
    ("preferences must lie in", lambda: oracles.psi_po_optimum(4 * fair, mu, ref_logps, 1)),
    ("must sum to 1", lambda: oracles.psi_po_optimum(fair, mu / 2, ref_logps, 1)),
    ("last axes must be equal", lambda: oracles.psi_po_optimum(fair, mu, ref_logps[:2], 1)),
    (r"rejected_ids must lie in \[0, 3\), got 3",
     lambda: oracles.ipo_dataset_optimum([0], [3], ref_logps, 1)),
    (r"chosen_ids must lie in", lambda: oracles.ipo_dataset_optimum([-1], [0], ref_logps, 1)),
    ("must be integers", lambda: oracles.ipo_dataset_optimum([0.5], [1.0], ref_logps, 1)),
    ("shapes must be equal", lambda: oracles.ipo_dataset_optimum([0, 1], [1], ref_logps, 1)),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_temperatures_are_batched_like_problems(kind):
  """A vector of temperatures, one for each problem, is not broadcast over the actions."""
  rng = np.random.default_rng(0)
  temperatures = np.array([0.3, 1.0, 2.0])
  ref_logps = np.log(rng.dirichlet(np.ones(3), 3))
  scores = rng.normal(size=(3, 3))
  chosen, rejected = rng.integers(0, 3, (2, 6))
  preferences = np.full((3, 3), 0.5) + np.triu(rng.uniform(-0.4, 0.4, (3, 3)), 1)
  preferences = np.triu(preferences) + np.tril(1 - preferences.T, -1)
  mu = np.ones(3) / 3
  for function in (
    oracles.kl_regularised_optimum,
    oracles.optimal_value,
    oracles.copg_optimum,
    lambda ref, r, tau: oracles.dro_optimum(ref, r, tau)[1],
    lambda ref, r, tau: oracles.psi_po_optimum(preferences, mu, ref, tau),
    lambda ref, r, tau: oracles.ipo_dataset_optimum(chosen, rejected, ref, tau),
    lambda ref, r, tau: oracles.objective(ref, ref, r, tau),
    lambda ref, r, tau: oracles.regret(ref, ref, r, tau),
  ):
    each = [function(ref_logps[i], scores[i], float(temperatures[i])) for i in range(3)]
    together = function(kind(ref_logps), kind(scores), kind(temperatures))
    np.testing.assert_allclose(together, np.stack(each), rtol=2e-5)  # float32 for JAX arrays
    swept = function(ref_logps[0], scores[0], temperatures)  # one problem, three temperatures
    np.testing.assert_allclose(swept[0], each[0], rtol=1e-12)
    assert np.shape(swept) == np.shape(together)
  with pytest.raises(ValueError, match=r"temperature must be one number.*\[3\].*got shape \[2\]"):
    oracles.kl_regularised_optimum(ref_logps, scores, np.ones(2))


def test_an_infinite_psi_gives_the_limit_or_is_refused():
  uniform = np.log(np.ones(3) / 3)
  logit = scipy.special.logit
  wins = np.array([[0.5, 1.0, 0.6], [0.0, 0.5, 0.3], [0.4, 0.7, 0.5]])
  optimum = np.exp(oracles.psi_po_optimum(wins, np.ones(3) / 3, uniform, 1.0, psi=logit))
  np.testing.assert_array_equal(optimum, [1, 0, 0])
  clipped = np.clip(wins, 1e-12, 1 - 1e-12)
  near = np.exp(oracles.psi_po_optimum(clipped, np.ones(3) / 3, uniform, 1.0, psi=logit))
  np.testing.assert_allclose(near, optimum, atol=1e-3)  # (1e-12)^(1/3), the weight of the pair
  # -inf alone: the action that always loses to one that is out of the support keeps nothing.
  half = np.array([-np.inf, np.log(0.5), np.log(0.5)])
  out = oracles.psi_po_optimum(wins, np.ones(3) / 3, half, 1.0, psi=logit)
  np.testing.assert_array_equal(np.exp(out), [0, 0, 1])
  both = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
  two = np.array([[0.5, 0.5, 1.0], [0.5, 0.5, 1.0], [0.0, 0.0, 0.5]])
  for preferences in (both, two):
    with pytest.raises(ValueError, match="clip preferences"):
      oracles.psi_po_optimum(preferences, np.ones(3) / 3, uniform, 1.0, psi=logit)


def test_values_need_a_normalised_reference():
  for function in (oracles.optimal_value, oracles.dro_optimum):
    with pytest.raises(ValueError, match=r"exp\(ref_logps\) must sum to 1"):
      function(np.log([0.5, 0.6]), np.zeros(2), 1.0)
