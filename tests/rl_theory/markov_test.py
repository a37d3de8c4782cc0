"""Markov reward processes: exact quantities against samples, generators, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rl_theory import markov, return_distributions

pytestmark = pytest.mark.usefixtures("x64")


def _is_stochastic(transitions):
  np.testing.assert_allclose(transitions.sum(1), 1, atol=1e-12)
  assert (transitions >= 0).all()


def test_generators_are_of_their_family():
  key = jax.random.key(0)
  dense = markov.dense_transitions(key, 7, concentration=0.3)
  sparse = markov.sparse_transitions(key, 7, branching=3)
  symmetric = markov.symmetric_transitions(key, 7)
  doubly = markov.doubly_stochastic_transitions(key, 7)
  cycle = markov.cycle_transitions(7)
  for found in (dense, sparse, symmetric, doubly, cycle):
    _is_stochastic(found)
  assert (dense > 0).all()
  np.testing.assert_array_equal((sparse > 0).sum(1), 3)
  np.testing.assert_allclose(symmetric, symmetric.T, atol=1e-12)
  np.testing.assert_allclose(doubly.sum(0), 1)
  assert not np.allclose(doubly, doubly.T)
  assert np.linalg.eigvalsh(symmetric).min() < 0 < np.linalg.eigvalsh(
    markov.lazy(symmetric, 0.5)
  ).min() + 1e-12  # fmt: skip
  np.testing.assert_array_equal(jnp.linalg.matrix_power(cycle, 7), jnp.eye(7))


@pytest.mark.parametrize("transitions", [np.eye(3)[[1, 2, 0]], [[0.9, 0.1], [0.3, 0.7]]])
def test_stationary_distribution(transitions):
  found = markov.stationary_distribution(transitions)
  np.testing.assert_allclose(found @ np.array(transitions), found, atol=1e-12)
  np.testing.assert_allclose(found.sum(), 1)


def test_several_recurrent_classes_have_no_one_stationary_distribution():
  with pytest.raises(ValueError, match="one recurrent class, got 2"):
    markov.stationary_distribution([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 1.0]])


@pytest.mark.parametrize("noise", ["gaussian", "exponential", "student_t2"])
def test_samples_of_noise_have_its_distribution_function(noise):
  rewards = markov.NoisyRewards([1.0, -2.0, 0.0], [2.0, 0.5, 0.0], noise)
  mrp = markov.MarkovRewardProcess(jnp.eye(3), rewards, 0.5)
  states = jnp.repeat(jnp.arange(2)[:, None], 4000, axis=1)
  drawn = markov.sample_rewards(mrp, jax.random.key(0), states)
  for state in range(2):

    def cdf(values, state=state):
      return markov.reward_cdf(mrp, values, state)

    # A wrong law fails with certainty; a right one in one of 10^4 seeds, and the seed is fixed.
    assert scipy.stats.kstest(np.asarray(drawn[state]), cdf).pvalue > 1e-4
  laws = {"gaussian": scipy.stats.norm(), "exponential": scipy.stats.expon(-1)}
  reference = laws.get(noise, scipy.stats.t(2))
  points = np.linspace(-3, 6, 19)
  np.testing.assert_allclose(
    markov.reward_cdf(mrp, points, 0), reference.cdf((points - 1) / 2), atol=1e-12
  )
  np.testing.assert_array_equal(markov.reward_cdf(mrp, jnp.array([-0.1, 0.0, 0.1]), 2), [0, 1, 1])
  np.testing.assert_array_equal(markov.reward_cdf(mrp, jnp.zeros(1), 2, left=True), [0])
  np.testing.assert_array_equal(markov.reward_means(mrp), [1.0, -2.0, 0.0])


def test_samples_of_steps_have_the_probabilities_of_the_process():
  rewards = markov.FiniteRewards(
    [[1.0, 5.0, 7.0], [0.0, 2.0, 9.0]], [[0.2, 0.8, 0.0], [0, 0.5, 0.5]]
  )
  mrp = markov.MarkovRewardProcess([[0.0, 1.0], [0.25, 0.75]], rewards, 0.5)
  rewards, after = jax.vmap(lambda key: markov.sample_step(mrp, key))(
    jax.random.split(jax.random.key(0), 20_000)
  )
  assert set(np.unique(rewards[:, 0])) == {1.0, 5.0} and set(np.unique(rewards[:, 1])) == {2.0, 9.0}
  assert (after[:, 0] == 1).all()
  # Four standard errors of 20 000 samples.
  np.testing.assert_allclose((after[:, 1] == 0).mean(), 0.25, atol=0.013)
  np.testing.assert_allclose((rewards[:, 0] == 1).mean(), 0.2, atol=0.012)


def test_trajectories_join_up_and_visit_states_as_the_stationary_distribution_says():
  mrp = markov.two_states("dirac")
  path = markov.sample_trajectory(mrp, jax.random.key(0), 1, 20_000)
  assert path.states[0] == 1
  np.testing.assert_array_equal(path.states[1:], path.next_states[:-1])
  np.testing.assert_array_equal(path.rewards, jnp.where(path.states == 0, 2.0, -1.0))
  expected = markov.stationary_distribution(mrp.transitions)
  # The chain forgets by 0.3 a step: four standard errors are 0.02.
  np.testing.assert_allclose((path.states == 0).mean(), expected[0], atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
  "mrp", [markov.chain, markov.artefact, lambda: markov.cliff(3, 4), lambda: markov.gridworld(2, 3)]
)
def test_value_is_the_mean_of_the_returns(mrp):
  mrp = mrp()
  returns = markov.sample_returns(mrp, jax.random.key(0), 4000)
  errors = returns.std(1) / np.sqrt(4000)
  # Five standard errors, and what the horizon leaves out.
  assert (jnp.abs(returns.mean(1) - markov.value(mrp)) <= 5 * errors + 0.05).all()


def test_returns_of_the_chain_are_gaussian():
  mrp = markov.chain()
  mean = sum(0.9**j * mu for j, mu in enumerate((0.0, 1.0, -1.0, 2.0)))
  np.testing.assert_allclose(markov.value(mrp)[0], mean)
  returns = markov.sample_returns(mrp, jax.random.key(1), 4000, horizon=5)
  scale = math.sqrt(sum(0.81**j for j in range(4)))
  assert scipy.stats.kstest(returns[0], scipy.stats.norm(mean, scale).cdf).pvalue > 1e-4
  np.testing.assert_array_equal(markov.terminal_states(mrp), [False] * 4 + [True])


def test_grid_worlds_move_as_they_say():
  grid = markov.gridworld(2, 3)
  np.testing.assert_allclose(grid.transitions[0], [0.5, 0.25, 0, 0.25, 0, 0])
  cliff = markov.cliff(2, 4, slip=0.0)
  # Up from the start, right above the cliff, down into the end.
  np.testing.assert_array_equal(cliff.transitions.argmax(1), [1, 2, 3, 7, 0, 4, 4, 7])
  np.testing.assert_array_equal(cliff.rewards, [-1, -1, -1, -1, -1, -100, -100, 0])
  np.testing.assert_allclose(markov.value(cliff)[4], -(1 - 0.95**5) / 0.05)


def test_return_distribution_is_within_its_error_bound():
  """Two coins: with discount 1/2 the return of rewards 0 and 1 is uniform on [0, 2]."""
  rewards = markov.FiniteRewards([[0.0, 1.0]], [[0.5, 0.5]])
  mrp = markov.MarkovRewardProcess([[1.0]], rewards, 0.5)
  law = return_distributions.return_distribution(mrp, num_atoms=1001)
  uniform = (jnp.arange(100_000) + 0.5) / 50_000
  distance = return_distributions.wasserstein(law.atoms, uniform, first_probs=law.probs[0])
  assert 0 < distance <= law.error < 0.0021
  with pytest.raises(ValueError, match="finitely many values"):
    return_distributions.return_distribution(markov.chain())


def test_distances_agree_with_scipy():
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=5), rng.normal(size=7)
  p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(7))
  found = return_distributions.wasserstein(first, second, first_probs=p, second_probs=q)
  np.testing.assert_allclose(found, scipy.stats.wasserstein_distance(first, second, p, q))
  pairs = np.sort(rng.normal(size=(2, 3, 6)), axis=-1)
  gaps = np.abs(pairs[0] - pairs[1])
  for order, expected in ((2, np.sqrt((gaps**2).mean(-1))), (math.inf, gaps.max(-1))):
    found = return_distributions.wasserstein(pairs[0][:, ::-1], pairs[1], order=order)
    np.testing.assert_allclose(found, expected)


_EYE = np.eye(2)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
  "transitions, rewards, discount, message",
  [
    ([[0.5, 0.6], [0.5, 0.5]], [1.0, 2.0], 0.9, "transitions must sum to 1"),
    ([[1.5, -0.5], [0.5, 0.5]], [1.0, 2.0], 0.9, "transitions must lie in"),
    (np.ones((2, 3)) / 3, [1.0, 2.0], 0.9, "transitions must have shape"),
    (_EYE, [1.0, 2.0], 1.0, "discount must lie in"),
    (_EYE, [1.0, 2.0], -0.1, "discount must lie in"),
    (_EYE, [1.0, 2.0], [0.5, 0.6], "discount must be one number"),
    (_EYE, [1.0, 2.0, 3.0], 0.9, "rewards must have shape"),
    (_EYE, [[1.0, 2.0], [1.0, 2.0]], 0.9, "rewards must have shape"),
    (_EYE, [1.0, np.nan], 0.9, "rewards must be finite"),
  ],
)
def test_bad_processes_are_refused(transitions, rewards, discount, message, convert):
  with pytest.raises(ValueError, match=message):
    markov.MarkovRewardProcess(convert(transitions), convert(rewards), convert(discount))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: markov.FiniteRewards(jnp.ones((2, 2)), jnp.ones((2, 2))), "probs must sum to 1"),
    (lambda: markov.FiniteRewards(np.ones((2, 2)), np.ones((2, 1))), "shapes must be equal"),
    (lambda: markov.NoisyRewards([1.0], [-1.0]), "scales must be finite and not negative"),
    (lambda: markov.NoisyRewards([1.0], 1.0, "cauchy"), "noise must be one of"),
    (lambda: markov.SampledRewards([1.0], None), "draw must be a function"),
    (
      lambda: markov.MarkovRewardProcess(_EYE, markov.NoisyRewards([1.0], 1.0)),
      "rewards.means must have shape",
    ),
    (lambda: markov.sparse_transitions(jax.random.key(0), 3, branching=4), "branching must be"),
    (lambda: markov.lazy(_EYE, 1.5), "weight must lie in"),
    (lambda: markov.lazy(_EYE, jnp.float32(1.5)), "weight must lie in"),
    (lambda: markov.lazy(_EYE, [0.5, 0.5]), "weight must be one number"),
    (lambda: markov.MarkovRewardProcess(_EYE, [1.0, 2.0], None), "discount must be one number"),
    (lambda: markov.symmetric_transitions(jax.random.key(0), 3, num_sweeps=0), "num_sweeps must"),
    (lambda: markov.garnet(jax.random.key(0), -1, 1), "num_states must be an integer"),
    (lambda: markov.sample_trajectory(markov.chain(), jax.random.key(0), 5, 3), "start must lie"),
    (lambda: markov.sample_trajectory(markov.chain(), jax.random.key(0), 0.5, 3), "start must be"),
    (lambda: markov.sample_trajectory(markov.chain(), jax.random.key(0), [0], 3), "start must be"),
    (lambda: return_distributions.wasserstein([], [1.0]), "first must have atoms"),
    (lambda: return_distributions.wasserstein([1.0], 1.0), "second must have atoms"),
    (
      lambda: jax.jit(
        lambda discount: return_distributions.return_distribution(
          markov.MarkovRewardProcess(_EYE, [1.0, 2.0], discount)
        )
      )(0.5),
      "num_steps must be given",
    ),
    (lambda: markov.two_states("cauchy"), "kind must be one of"),
    (lambda: markov.sample_returns(markov.chain(), jax.random.key(0), 0), "num_samples must be"),
    (lambda: return_distributions.wasserstein([0.0], [1.0], order=0.5), "order must be"),
    (
      lambda: return_distributions.wasserstein(np.zeros(2), np.zeros(2), first_probs=np.ones(3)),
      "first_probs must have as many",
    ),
  ],
)
def test_bad_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_jax_rebuilds_a_process_with_tracers_and_batches():
  """Checks of the user's arrays must not run on what JAX puts in their place."""
  make = lambda key, discount: markov.garnet(key, 4, 2, noise="gaussian", discount=discount)  # noqa: E731
  batch = jax.vmap(make)(jax.random.split(jax.random.key(0), 3), jnp.array([0.5, 0.9, 0.99]))
  assert batch.transitions.shape == (3, 4, 4) and batch.rewards.noise == "gaussian"
  values = jax.jit(jax.vmap(markov.value))(batch)
  for index in range(3):
    one = jax.tree.map(lambda leaf, i=index: leaf[i], batch)
    np.testing.assert_allclose(values[index], markov.value(one))
  jax.tree.map(lambda _: object(), batch)
  assert jax.eval_shape(lambda mrp: mrp, batch).discount.shape == (3,)
