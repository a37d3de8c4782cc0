"""The equilibria of preference games: two solvers, saddle points by perturbation, bad input."""

import autoregressive as ar
import jax
import numpy as np
import pytest
import scipy.special

from alignment import nash_md, oracles, preference_games

CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
REFERENCE = np.log([0.6, 0.3, 0.1])
ROBUST = np.array([[0.5, 0.99, 0.3], [0.01, 0.5, 0.25], [0.7, 0.75, 0.5]])


# --- the regularised game of Nash-MD ---


def test_the_equilibrium_of_a_cycle_to_six_digits():
  nash = np.exp(preference_games.regularised_nash(CYCLE, REFERENCE, 0.1))
  np.testing.assert_allclose(nash, [0.492747, 0.154147, 0.353106], atol=1e-6)


def test_two_solvers_agree_on_random_games_down_to_small_tau():
  rng = np.random.default_rng(0)
  for _ in range(20):
    preferences, ref_logps = ar.random_game(rng, rng.integers(2, 8))
    tau = 10 ** rng.uniform(-2, 0.5)
    newton, prox = (
      preference_games.regularised_nash(preferences, ref_logps, tau, solver=solver)
      for solver in ("newton", "mirror_prox")
    )
    np.testing.assert_allclose(np.exp(newton), np.exp(prox), atol=1e-10)
    # ... and on the equation itself, in the logarithm.
    implied = ref_logps + preferences @ np.exp(newton) / tau
    implied -= np.log(np.sum(np.exp(implied - implied.max()))) + implied.max()
    np.testing.assert_allclose(newton, implied, atol=1e-9)
    exploitability = preference_games.regularised_exploitability(
      newton, preferences, ref_logps, tau
    )
    np.testing.assert_allclose(exploitability, 0, atol=1e-12)


def test_exploitability_is_what_the_best_response_gains():
  rng = np.random.default_rng(1)
  preferences, ref_logps = ar.random_game(rng, 5)
  logps, tau = np.log(rng.dirichlet(np.ones(5))), 0.2
  best = np.asarray(nash_md.best_response(logps, preferences, ref_logps, tau=tau), float)

  def payoff(own, other):
    return (
      np.exp(own) @ preferences @ np.exp(other)
      - tau * oracles.kl(own, ref_logps)
      + tau * oracles.kl(other, ref_logps)
    )

  got = preference_games.regularised_exploitability(logps, preferences, ref_logps, tau)
  np.testing.assert_allclose(got, payoff(best, logps) - 0.5, atol=1e-6)  # a float32 best response
  for _ in range(100):
    assert payoff(np.log(rng.dirichlet(np.ones(5))), logps) - 0.5 <= got + 1e-12


def test_outside_the_support_of_the_reference_nobody_plays():
  ref_logps = np.log([0.6, 0.4, 1e-300]) + np.array([0, 0, -np.inf])
  nash = preference_games.regularised_nash(CYCLE, ref_logps, 0.5)
  inner = preference_games.regularised_nash(CYCLE[:2, :2], np.log([0.6, 0.4]), 0.5)
  np.testing.assert_allclose(nash[:2], inner, atol=1e-12)
  assert nash[2] == -np.inf


def test_rater_types_have_the_worked_equilibrium():
  """Three kinds of raters, worked by hand: as tau -> 0, P @ pi = 1/2 for every action."""
  eps = 0.1
  shares = np.array([1 / 3 - eps, 1 / 3 + eps / 2, 1 / 3 + eps / 2])
  beats = [(1, 0), (0, 2), (2, 1)]  # type k says that the first is better; ties elsewhere
  preferences = np.full((3, 3), 0.5)
  for share, (winner, loser) in zip(shares, beats, strict=True):
    preferences[winner, loser] += share / 2
    preferences[loser, winner] -= share / 2
  nash = np.array([1 / 3 + eps / 2, 1 / 3 + eps / 2, 1 / 3 - eps])
  np.testing.assert_allclose(preferences @ nash, 0.5, atol=1e-12)
  found = np.exp(preference_games.regularised_nash(preferences, np.log(np.ones(3) / 3), 1e-4))
  np.testing.assert_allclose(found, nash, atol=1e-2)  # tau is small, not zero


def test_the_mixture_of_the_fixed_point_is_the_equilibrium_of_a_larger_tau(x64):
  preferences, ref_logps = ar.random_game(np.random.default_rng(3), 5)
  tau, beta = 0.2, 0.4
  fixed = preference_games.nash_md_pg_fixed_point(preferences, ref_logps, tau, beta)
  mixture = jax.nn.log_softmax(nash_md.geometric_mixture_logits(fixed, ref_logps, beta=beta))
  nash = preference_games.regularised_nash(preferences, ref_logps, tau / (1 - beta))
  np.testing.assert_allclose(mixture, nash, atol=1e-10)
  best = nash_md.best_response(ref_logps, preferences, ref_logps, tau=tau)
  np.testing.assert_allclose(
    best, preference_games.nash_md_pg_fixed_point(preferences, ref_logps, tau, 1.0), atol=1e-12
  )


# --- the saddle point of SRPO ---


def random_problem(rng, num_actions):
  preferences = ar.preferences(rng, num_actions)
  ref_logps = np.log(rng.dirichlet(np.ones(num_actions)))
  revision = np.log(rng.dirichlet(np.ones(num_actions), num_actions))
  return preferences, ref_logps, revision


def test_no_perturbation_improves_either_player():
  """Perturbing the revision lowers the objective, perturbing the answer raises it."""
  rng = np.random.default_rng(1)
  preferences, ref_logps, revision = random_problem(rng, 4)
  beta = 0.3
  logps, revised = preference_games.srpo_optimum(preferences, ref_logps, revision, beta)

  def objective(logps, revised):
    gains = np.sum(np.exp(revised) * preferences.T, -1) - beta * oracles.kl(revised, revision)
    return np.exp(logps) @ gains + beta * oracles.kl(logps, ref_logps)

  def perturb(logps):
    logits = logps + 0.1 * rng.normal(size=logps.shape)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  value = objective(logps, revised)
  normalisers = np.exp(revision + preferences.T / beta).sum(-1)
  np.testing.assert_allclose(value, -beta * np.log(np.sum(np.exp(ref_logps) / normalisers)))
  for _ in range(200):
    assert objective(logps, perturb(revised)) < value < objective(perturb(logps), revised)


def test_weak_coupling_is_ipo_against_the_reference():
  """beta -> infinity with a revision that ignores what it sees: IPO with mu = ref, O(beta^-2)."""
  rng = np.random.default_rng(2)
  preferences, ref_logps, _ = random_problem(rng, 5)
  revision = np.broadcast_to(ref_logps, (5, 5))
  gaps = []
  for beta in (10.0, 100.0):
    srpo_logps, _ = preference_games.srpo_optimum(preferences, ref_logps, revision, beta)
    ipo_logps = oracles.psi_po_optimum(preferences, np.exp(ref_logps), ref_logps, beta)
    gaps.append(np.abs(srpo_logps - ipo_logps).max())
  assert gaps[1] < gaps[0] / 90, gaps  # a hundredth, and a little for the next order


def test_ipo_moves_with_the_data_and_srpo_does_not():
  """A bandit on which IPO's best arm changes with the data."""
  uniform = np.log(np.ones(3) / 3)
  robust = np.exp(
    preference_games.srpo_optimum(ROBUST, uniform, np.broadcast_to(uniform, (3, 3)), 0.1)[0]
  )
  np.testing.assert_allclose(robust, [0.126, 0.007, 0.867], atol=5e-4)
  best = [
    int(np.argmax(oracles.psi_po_optimum(ROBUST, np.array(mu), uniform, 0.1)))
    for mu in ((1 / 3, 1 / 3, 1 / 3), (0.15, 0.70, 0.15))
  ]
  assert best == [2, 0]  # IPO's best arm depends on the policy that drew the data


# --- bad input ---


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: preference_games.regularised_nash(CYCLE, REFERENCE, -1.0), "tau must be positive"),
    (
      lambda: preference_games.regularised_nash(CYCLE + 0.1, REFERENCE, 1.0),
      "preferences must be antisymmetric",
    ),
    (
      lambda: preference_games.regularised_nash(CYCLE, REFERENCE, 1.0, solver="magic"),
      "solver must be one of 'newton', 'mirror_prox'",
    ),
    (
      lambda: preference_games.nash_md_pg_fixed_point(CYCLE, REFERENCE, 0.1, 1.2),
      r"beta must lie in \[0, 1\], got 1.2",
    ),
    (
      lambda: preference_games.regularised_exploitability(REFERENCE, CYCLE[:2, :2], REFERENCE, 0.1),
      r"preferences \[2, 2\], ref_logps \[3\]",
    ),
    (
      lambda: preference_games.srpo_optimum(ROBUST, np.log(np.ones(3) / 3), np.zeros(3), 0.1),
      r"revision_ref_logps must have shape \[..., A, A\]",
    ),
    (
      lambda: preference_games.srpo_optimum(ROBUST, np.log(np.ones(3) / 3), np.zeros((3, 3)), 0.1),
      r"exp\(revision_ref_logps\) must sum to 1",
    ),
    (
      lambda: preference_games.srpo_optimum(
        ROBUST, np.log(np.ones(3) / 2), np.log(np.ones((3, 3)) / 3), 0.1
      ),
      r"exp\(ref_logps\) must sum to 1",
    ),
  ],
)
def test_bad_input_names_the_argument(call, match):
  with pytest.raises(ValueError, match=match):
    call()


@pytest.mark.parametrize("seed", [0, 25, 434, 698, 886, 1321])
def test_newton_reaches_the_equilibrium_where_the_reference_is_nearly_pure(seed):
  """Masses down to 1e-300. A fixed schedule of tau stops far from the solution but for seed 0."""
  rng = np.random.default_rng(seed)
  num_actions = rng.integers(2, 8)
  upper = np.triu(rng.uniform(size=(num_actions, num_actions)), 1)
  matrix = upper + np.tril(1 - upper.T, -1) + np.eye(num_actions) / 2
  reference = np.maximum(rng.dirichlet(np.full(num_actions, 0.02)), 1e-300)
  ref_logps, tau = np.log(reference / reference.sum()), 10 ** rng.uniform(-2.5, 0)
  logps = preference_games.regularised_nash(matrix, ref_logps, tau)
  fixed = scipy.special.log_softmax(ref_logps + matrix @ np.exp(logps) / tau)
  # Log-probabilities as low as -690 are rounded to 1e-13 of themselves.
  np.testing.assert_allclose(logps, fixed, rtol=1e-9, atol=1e-9)


def test_a_solver_that_stops_early_raises(monkeypatch):
  matrix = np.array([[0.5, 0.9], [0.1, 0.5]])
  monkeypatch.setitem(preference_games._SOLVERS, "newton", lambda matrix, ref_logps, tau: ref_logps)
  with pytest.raises(ValueError, match=r"'newton' did not converge at tau 0\.1"):
    preference_games.regularised_nash(matrix, np.log([0.5, 0.5]), 0.1)


def test_temperatures_of_the_games_are_batched():
  matrix, ref_logps = np.array([[0.5, 0.9], [0.1, 0.5]]), np.log([0.3, 0.7])
  taus = np.array([0.1, 1.0])
  both = preference_games.regularised_nash(matrix, ref_logps, taus)
  revisions = np.log(np.full((2, 2), 0.5))
  saddle, _ = preference_games.srpo_optimum(matrix, ref_logps, revisions, taus)
  for i, tau in enumerate(taus):
    one = preference_games.regularised_nash(matrix, ref_logps, float(tau))
    np.testing.assert_allclose(both[i], one, rtol=1e-12)
    alone, _ = preference_games.srpo_optimum(matrix, ref_logps, revisions, float(tau))
    np.testing.assert_allclose(saddle[i], alone, rtol=1e-12)
  gaps = preference_games.regularised_exploitability(both, matrix, ref_logps, taus)
  np.testing.assert_allclose(gaps, 0, atol=1e-12)
  with pytest.raises(ValueError, match="beta must have shape"):
    preference_games.nash_md_pg_fixed_point(matrix, ref_logps, 0.1, np.array([0.1, 0.2]))
