"""Quantile TD against hand-worked steps, its theorems and its fixed points."""

import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import markov, qtd, quantile_dynamics, return_distributions

pytestmark = pytest.mark.usefixtures("x64")


def _slow_error(quantiles, targets):
  m, error = len(quantiles), np.zeros(len(quantiles))
  for i in range(m):
    below = sum(target < quantiles[i] for target in targets)
    error[i] = (2 * i + 1) / (2 * m) - below / len(targets)
  return error


def _finite(key, num_states=4, num_values=3, discount=0.9):
  keys = jax.random.split(key, 3)
  rewards = markov.FiniteRewards(
    jax.random.uniform(keys[0], (num_states, num_values), minval=-1),
    jax.random.dirichlet(keys[1], jnp.ones(num_values), (num_states,)),
  )
  transitions = markov.dense_transitions(keys[2], num_states)
  return markov.MarkovRewardProcess(transitions, rewards, discount)


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", qtd.METHODS)
def test_error_equals_a_slow_version_with_ties_and_other_sizes(method):
  """Batch, quantiles and targets differ in size, so a mean over a wrong axis shows."""
  rng = np.random.default_rng(0)
  quantiles = rng.integers(0, 4, (3, 2, 5)).astype(float)  # many ties
  targets = rng.integers(0, 4, (3, 2, 7)).astype(float)
  found = qtd.quantile_td_error(quantiles, targets, method=method)
  for index in np.ndindex(3, 2):
    np.testing.assert_allclose(found[index], _slow_error(quantiles[index], targets[index]))


@pytest.mark.parametrize("method", qtd.METHODS)
def test_integers_lists_and_mixed_dtypes_are_floats(method):
  """Levels of the dtype of integers would all be 0."""
  for dtype, other in ((int, int), (int, float), (jnp.bfloat16, jnp.float32)):
    quantiles, targets = jnp.array([0, 2], dtype), jnp.array([0, 1], other)
    error = qtd.quantile_td_error(quantiles, targets, method=method)
    np.testing.assert_array_equal(error, [0.25, -0.25])
    loss = qtd.pinball_loss(quantiles, targets, method=method)
    np.testing.assert_array_equal(loss, [0.125, 0.375])
  error = qtd.quantile_td_error([0, 2], [0, 1], method=method)
  np.testing.assert_array_equal(error, [0.25, -0.25])


@pytest.mark.parametrize("method", qtd.METHODS)
def test_comparison_is_strict(method):
  error = qtd.quantile_td_error(jnp.zeros(2), jnp.zeros(3), method=method)
  np.testing.assert_array_equal(error, [0.25, 0.75])
  gradient = jax.grad(lambda q: qtd.pinball_loss(q, jnp.zeros(3), method=method).sum())
  np.testing.assert_array_equal(gradient(jnp.zeros(2)), [-0.25, -0.75])


@pytest.mark.parametrize("method", qtd.METHODS)
def test_gradient_of_the_pinball_loss_is_minus_the_error(method):
  quantiles = jax.random.normal(jax.random.key(0), (3, 5))
  targets = jax.random.normal(jax.random.key(1), (3, 7))

  def total(quantiles, targets):
    return qtd.pinball_loss(quantiles, targets, method=method).sum()

  gradient, constant = jax.grad(total, (0, 1))(quantiles, targets)
  np.testing.assert_allclose(gradient, -qtd.quantile_td_error(quantiles, targets), atol=1e-15)
  np.testing.assert_array_equal(constant, 0)
  gaps = np.asarray(targets)[:, None, :] - np.asarray(quantiles)[:, :, None]
  slow = ((np.arange(5)[:, None] + 0.5) / 5 - (gaps < 0)) * gaps
  np.testing.assert_allclose(
    qtd.pinball_loss(quantiles, targets, method=method), slow.mean(-1), atol=1e-14
  )


def test_loss_is_least_at_the_quantiles_of_the_targets():
  """The sign: with m = 4 and targets 0, 1, ..., 99 the quantiles at 1/8, 3/8, ... are best."""
  targets = jnp.arange(100.0)
  best = jnp.array([12.0, 37.0, 62.0, 87.0])
  least = qtd.pinball_loss(best, targets)
  for change in (-5.0, 5.0):
    assert (qtd.pinball_loss(best + change, targets) > least).all()
  assert (qtd.quantile_td_error(best - 5, targets) > 0).all()
  assert (qtd.quantile_td_error(best + 5, targets) < 0).all()


def _step(theta, batch, config, *, optimizer=None, key=None):
  optimizer = optimizer or optax.sgd(0.1)
  state = qtd.init(theta, optimizer=optimizer, config=config)
  return qtd.update(
    state, batch, key, apply_fn=qtd.lookup, optimizer=optimizer, config=config
  )[0]  # fmt: skip


@pytest.mark.parametrize("states", [[0, 1, 2], [1]])
def test_update_is_the_step_of_the_paper(states):
  rng = np.random.default_rng(1)
  theta = rng.normal(size=(3, 4))
  rewards, following = rng.normal(size=len(states)), rng.integers(0, 3, len(states))
  batch = qtd.Batch(jnp.asarray(states), jnp.asarray(rewards), jnp.asarray(following))
  expected = theta.copy()
  for state, reward, after in zip(states, rewards, following, strict=True):
    expected[state] += 0.1 * _slow_error(theta[state], reward + 0.8 * theta[after])
  moved = _step(jnp.asarray(theta), batch, qtd.Config(discount=0.8)).params
  np.testing.assert_allclose(moved, expected, atol=1e-15)


def test_asynchronous_steps_count_the_visits_of_a_state():
  config = qtd.Config(discount=0.0, step_sizes=qtd.StepSizes(1.0, 1.0))
  optimizer = optax.sgd(1.0)
  state = qtd.init(jnp.zeros((2, 1)), optimizer=optimizer, config=config)
  for visited in (0, 0, 1, 0):
    batch = qtd.Batch(jnp.array([visited]), jnp.array([100.0]), jnp.array([0]))
    state, _ = qtd.update(
      state, batch, None, apply_fn=qtd.lookup, optimizer=optimizer, config=config
    )
  np.testing.assert_array_equal(state.visits, [3, 1])
  # Every step is half a step size, since each target is above: 1/2 (1 + 1/2 + 1/3) and 1/2.
  np.testing.assert_allclose(state.params[:, 0], [11 / 12, 1 / 2])


def test_random_index_has_the_mean_of_all_targets():
  theta = jnp.array([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0]])
  batch = qtd.Batch(jnp.array([0]), jnp.array([0.3]), jnp.array([1]))
  config = qtd.Config(discount=0.5, random_index=True)
  keys = jax.random.split(jax.random.key(1), 6000)
  moved = jax.vmap(lambda key: _step(theta, batch, config, key=key).params)(keys)
  expected = _step(theta, batch, qtd.Config(discount=0.5)).params
  # Steps of 0.1 with a spread of at most 0.05: three standard errors of 6000 are 0.002.
  np.testing.assert_allclose(moved.mean(0), expected, atol=0.002)
  assert np.ptp(np.asarray(moved), axis=0).max() > 0.05


# --- quantile dynamic programming -----------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_quantile_dynamic_programming_contracts_by_the_discount(lam):
  mrp = _finite(jax.random.key(0))
  pairs = jnp.sort(3 * jax.random.normal(jax.random.key(1), (200, 2, 4, 5)), axis=-1)
  step = jax.jit(
    jax.vmap(jax.vmap(lambda t: quantile_dynamics.quantile_dynamic_programming(mrp, t, lam)))
  )
  before = jnp.abs(pairs[:, 0] - pairs[:, 1]).max((1, 2))
  after = jnp.abs(jnp.diff(step(pairs), axis=1)).max((1, 2, 3))
  assert (after <= 0.9 * before + 1e-12).all()  # rounding
  assert (after >= 0.45 * before).any()  # the bound is not trivially loose


def test_fixed_points_of_the_mixing_process_are_the_corners_of_its_quadrilateral():
  mrp = markov.two_states("mixing")
  corners = {(0, 0): (1, -2), (0, 1): (2, 0), (1, 0): (4, -2), (1, 1): (4, 1)}
  for lam, corner in corners.items():
    found = quantile_dynamics.fixed_point(mrp, num_quantiles=1, lam=jnp.array(lam, float)[:, None])
    np.testing.assert_allclose(found[:, 0], corner, atol=1e-12)
  centre = quantile_dynamics.fixed_point(mrp, num_quantiles=1, lam=0.5)
  np.testing.assert_allclose(centre[:, 0], (2.5, -0.5), atol=1e-12)


def _violation(theta):
  """How far `[..., 2]` is outside the quadrilateral, in the largest difference, near its edges."""
  first, second = theta[..., 0], theta[..., 1]
  sides = (first - 4, -2 - second, (2 + second / 2 - first) / 1.5, (second + 1 - first / 2) / 1.5)
  return jnp.max(jnp.stack([*sides, jnp.zeros_like(first)]), axis=0)


def test_points_inside_the_quadrilateral_are_fixed_points_and_those_outside_are_not():
  mrp = markov.two_states("mixing")
  points = jax.random.uniform(jax.random.key(0), (300, 2), minval=-3, maxval=5)
  low, high = jax.jit(jax.vmap(lambda p: quantile_dynamics.inclusion(mrp, p[:, None])))(points)
  still = ((low <= 1e-12) & (high >= -1e-12)).all((1, 2))
  inside = _violation(points) == 0
  assert 20 < inside.sum() < 280
  np.testing.assert_array_equal(still, inside)
  distance = jax.jit(jax.vmap(lambda p: quantile_dynamics.lyapunov(mrp, p[:, None])))(points)
  assert (distance[inside] < 1e-12).all()  # rounding
  assert (distance[~inside] >= _violation(points)[~inside] - 1e-12).all()


def test_fixed_points_with_gaussian_rewards():
  expected = {
    1: [[2.6344], [-1.0708]],
    2: [[1.5919, 3.5921], [-1.9283, -0.0295]],
    5: [[0.6395, 1.7936, 2.6149, 3.4123, 4.4843], [-2.7625, -1.7542, -1.0033, -0.2090, 0.9746]],
  }
  mrp = markov.two_states("gaussian")
  for num_quantiles, values in expected.items():
    found = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles)
    np.testing.assert_allclose(found, values, atol=1e-3)
  # The laws have no gaps, so lambda does not matter.
  other = quantile_dynamics.fixed_point(mrp, num_quantiles=5, lam=0.5)
  np.testing.assert_allclose(other, found, atol=1e-9)
  low, high = quantile_dynamics.inclusion(mrp, found)
  np.testing.assert_allclose(low, 0, atol=1e-9)
  np.testing.assert_allclose(high, low, atol=1e-12)


def test_fixed_point_in_float32_has_no_bias():
  dense = markov.dense_transitions(jax.random.key(0), 10)
  makers = {
    # Levels are met within 20 eps = 2e-6; the density is at least 0.1, and four states add up.
    1e-4: lambda: (markov.chain(), 5),
    # The slack on the levels can skip an atom of little mass.
    1e-2: lambda: (markov.MarkovRewardProcess(dense, jnp.linspace(-1.0, 1.0, 10), 0.9), 32),
  }
  for tolerance, make in makers.items():
    mrp, num_quantiles = make()
    exact = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles).mean(1)
    with jax.enable_x64(False):
      mrp = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), mrp)
      found = np.asarray(quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles)).mean(1)
    np.testing.assert_allclose(found, exact, atol=tolerance)


@pytest.mark.parametrize(
  "transitions, expected",
  [
    (
      ((0.6, 0.4), (0.6, 0.4)),
      {
        1: [[20], [17]],
        2: [[17.3, 20], [14.3, 17]],
        5: [[10.7147, 12.683, 14.87, 17.3, 20], [7.7147, 9.683, 11.87, 14.3, 17]],
      },
    ),
    (
      ((0.6, 0.4), (0.4, 0.6)),
      {
        2: [[5.7895, 20], [-10, 4.2105]],
        5: [[3.6966, 5.327, 6.7943, 8.1148, 20], [-10, 1.8852, 3.2057, 4.673, 6.3034]],
      },
    ),
  ],
)
def test_fixed_points_of_the_artefact(transitions, expected):
  mrp = markov.artefact(transitions)
  for num_quantiles, values in expected.items():
    found = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles)
    np.testing.assert_allclose(found, values, atol=1e-4)


def test_error_of_the_artefact_falls_with_the_number_of_quantiles():
  mrp = markov.artefact()
  law = return_distributions.return_distribution(mrp, num_atoms=1001)
  for num_quantiles, expected in ((1, 10.8), (5, 5.91), (20, 1.26)):
    found = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles)
    distance = return_distributions.wasserstein(found, law.atoms, second_probs=law.probs).max()
    # The grid's own error, and the two digits of the expected numbers.
    assert abs(distance - expected) < law.error + 0.005
    assert distance <= 150 / num_quantiles


@pytest.mark.parametrize("num_quantiles", [1, 2, 3, 5, 8])
def test_deterministic_processes_are_exact_for_every_number_of_quantiles(num_quantiles):
  mrp = markov.MarkovRewardProcess(markov.cycle_transitions(3), [1.0, -2.0, 0.5], 0.9)
  for lam in (0.0, 1.0):
    found = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles, lam=lam)
    # Sums of about 300 discounted rewards, rounded.
    expected = np.broadcast_to(markov.value(mrp)[:, None], found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("num_quantiles", [1, 4, 16])
def test_fixed_points_are_within_the_bound_of_the_law_of_the_return(num_quantiles):
  for seed in range(3):
    mrp = _finite(jax.random.key(seed), discount=0.7)
    law = return_distributions.return_distribution(mrp, num_atoms=1001)
    width = float(law.atoms[-1] - law.atoms[0])
    bound = width / (2 * num_quantiles * (1 - 0.7))
    for lam in (0.0, 0.4):
      found = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles, lam=lam)
      distance = return_distributions.wasserstein(found, law.atoms, second_probs=law.probs)
      assert (distance <= bound + law.error).all()
      assert (jnp.abs(found.mean(1) - markov.value(mrp)) <= distance + law.error).all()


@pytest.mark.parametrize("random_steps", [0, 1, 2, 3])
def test_error_is_within_the_bound_of_processes_that_become_deterministic(random_steps):
  """Rewards are random in the first k states of a chain; after them all is certain."""
  size, discount, num_quantiles = 6, 0.9, 3
  values = np.stack([np.full(size, -1.0), np.full(size, 1.0)], axis=1)
  probs = np.tile([0.3, 0.7], (size, 1))
  probs[random_steps:] = [0, 1]
  values[-1] = 0
  transitions = np.eye(size, k=1)
  transitions[-1, -1] = 1
  mrp = markov.MarkovRewardProcess(transitions, markov.FiniteRewards(values, probs), discount)
  returns = {size - 1: ([0.0], [1.0])}
  for state in reversed(range(size - 1)):  # exact laws, atom by atom
    after, mass = returns[state + 1]
    pairs = [
      (value + discount * atom, prob * weight)
      for value, prob in zip(values[state], probs[state], strict=True)
      for atom, weight in zip(after, mass, strict=True)
    ]
    returns[state] = tuple(map(list, zip(*pairs, strict=True)))
  found = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles)
  atoms, mass = map(jnp.array, returns[0])  # the first state has the most random steps before it
  worst = float(return_distributions.wasserstein(found[0], atoms, second_probs=mass))
  width = 2 / (1 - discount)
  bound = width * (1 - discount**random_steps) / (2 * num_quantiles * (1 - discount))
  assert worst <= bound + 1e-12
  assert (worst > 1e-3) == (random_steps > 0)


@pytest.mark.parametrize("kind", ["gaussian", "dirac", "mixing"])
def test_distance_to_every_fixed_point_never_grows_along_the_flow(kind):
  mrp, num_quantiles = markov.two_states(kind), 1 if kind == "mixing" else 3
  starts = jax.random.uniform(jax.random.key(0), (10, 2, num_quantiles), minval=-6, maxval=8)
  paths = jax.jit(jax.vmap(lambda t: quantile_dynamics.integrate(mrp, t, step=0.5, num_steps=250)))(
    starts
  )
  lams = [
    jnp.broadcast_to(jnp.array(pair)[:, None], (2, num_quantiles))
    for pair in itertools.product((0.0, 0.3, 1.0), repeat=2)
  ]
  for lam in lams:
    fixed = quantile_dynamics.fixed_point(mrp, num_quantiles=num_quantiles, lam=lam)
    distances = jnp.abs(paths - fixed).max((2, 3))
    assert (jnp.diff(distances, axis=1) <= 1e-12).all()  # rounding
  # The distance from the set itself, which the same bound makes fall to 0.
  some = paths[:, ::25].reshape(-1, 2, num_quantiles)
  to_set = jax.jit(jax.vmap(lambda theta: quantile_dynamics.lyapunov(mrp, theta)))(some)
  to_set = to_set.reshape(10, -1)
  assert (jnp.diff(to_set, axis=1) <= 1e-12).all()
  assert to_set[:, -1].max() < 1e-3 * to_set[:, 0].max()


def test_the_implicit_steps_follow_the_ode():
  """Halving the step halves the difference from explicit steps that are a hundred times finer."""
  mrp = markov.two_states("gaussian")
  levels = qtd.quantile_levels(2)
  start = jnp.array([[0.0, 1.0], [1.0, 3.0]])

  def explicit(_, theta):
    return theta + 5e-4 * (levels - quantile_dynamics.target_cdf(mrp, theta, theta))

  exact = jax.jit(lambda: jax.lax.fori_loop(0, 4000, explicit, start))()
  errors = [
    float(
      jnp.abs(quantile_dynamics.integrate(mrp, start, step=2 / n, num_steps=n)[-1] - exact).max()
    )
    for n in (20, 40)
  ]
  assert 1.7 < errors[0] / errors[1] < 2.3  # first order
  assert errors[1] < 0.05


# --- convergence ----------------------------------------------------------------------------------


def _learn(mrp, steps, *, num_quantiles, num_seeds, lengths, start=0.0):
  """Returns theta after each of the numbers of synchronous updates, and its mean since the last."""
  config, optimizer = qtd.Config(discount=mrp.discount, method="pairs"), optax.sgd(steps)
  states = jnp.arange(2)

  def body(carry, key):
    state, total = carry
    state, _ = qtd.update(
      state, qtd.Batch(states, *markov.sample_step(mrp, key)), None,
      apply_fn=qtd.lookup, optimizer=optimizer, config=config,
    )  # fmt: skip
    return (state, total + state.params), None

  def run(key):
    state = qtd.init(jnp.full((2, num_quantiles), start), optimizer=optimizer, config=config)
    found, done = [], 0
    for length in lengths:
      keys = jax.random.split(jax.random.fold_in(key, length), length - done)
      (state, total), _ = jax.lax.scan(body, (state, jnp.zeros_like(state.params)), keys)
      found.append((state.params, total / (length - done)))
      done = length
    return found

  return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), num_seeds))


@pytest.mark.slow  # 100 seeds, 10^5 updates
def test_synchronous_updates_converge_on_all_seeds_without_square_summable_steps():
  mrp = markov.two_states("gaussian")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    steps = qtd.step_sizes("polynomial", scale=0.5, power=0.4)
  fixed = quantile_dynamics.fixed_point(mrp, num_quantiles=3)
  (early, _), (late, mean) = _learn(
    mrp, steps, num_quantiles=3, num_seeds=100, lengths=(1000, 100_000)
  )
  errors = [np.asarray(jnp.abs(theta - fixed).max((1, 2))) for theta in (early, late)]
  # The spread is of the order of the square root of the step size, which falls by 100^0.2 = 2.5.
  assert 2 < errors[0].mean() / errors[1].mean() < 3.2
  assert errors[1].max() < 0.3
  np.testing.assert_allclose(mean.mean(0), fixed, atol=0.01)


@pytest.mark.slow  # 100 seeds, 10^5 updates
def test_updates_reach_the_set_of_fixed_points_and_move_inside_it():
  mrp = markov.two_states("mixing")
  steps = qtd.step_sizes("polynomial", scale=0.5, power=0.4)
  (early, _), (late, _) = _learn(
    mrp, steps, num_quantiles=1, num_seeds=100, lengths=(2000, 100_000), start=8.0
  )
  # Outside the set the drift is at least 1/4, so that it leaves by a few step sizes (0.005) only.
  assert _violation(late[..., 0]).max() < 0.05
  assert (jnp.abs(late - early).max((1, 2)) > 0.1).mean() > 0.5


@pytest.mark.slow  # 100 seeds
def test_updates_do_not_converge_where_the_condition_fails():
  mrp = markov.two_states("gaussian")
  fixed = quantile_dynamics.fixed_point(mrp, num_quantiles=3)
  with pytest.warns(UserWarning, match="o\\(1 / log k\\)"):
    constant = qtd.step_sizes("constant", scale=0.3)
  (early, _), (late, _) = _learn(
    mrp, constant, num_quantiles=3, num_seeds=100, lengths=(1000, 20_000)
  )
  errors = [float(jnp.abs(theta - fixed).max((1, 2)).mean()) for theta in (early, late)]
  assert abs(errors[1] / errors[0] - 1) < 0.2  # two samples of one stationary law
  assert errors[1] > 0.1
  with pytest.warns(UserWarning, match="sum of alpha_k is finite"):
    summable = qtd.step_sizes("polynomial", scale=0.3, power=1.5)
  ((stopped, _),) = _learn(
    mrp, summable, num_quantiles=3, num_seeds=100, lengths=(20_000,), start=20.0
  )
  # zeta(1.5) = 2.61: no component moves further than 0.3 times it.
  assert (stopped > 20 - 0.3 * 2.62).all()


def test_mean_iterate_is_near_the_fixed_point():
  mrp = markov.two_states("gaussian")
  steps = qtd.step_sizes("polynomial", scale=0.5, power=0.6)
  _, (_, mean) = _learn(mrp, steps, num_quantiles=2, num_seeds=64, lengths=(2000, 20_000))
  fixed = quantile_dynamics.fixed_point(mrp, num_quantiles=2)
  np.testing.assert_allclose(mean.mean(0), fixed, atol=0.01)


# --- step sizes and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, power, asynchronous, broken",
  [
    ("constant", None, False, "o(1 / log k)"),
    ("polynomial", 0.1, False, None),
    ("polynomial", 1.0, False, None),
    ("polynomial", 1.01, False, "the sum of alpha_k is finite"),
    ("logarithmic", 2.0, False, None),
    ("logarithmic", 1.0, False, "o(1 / log k)"),
    ("polynomial", 0.5, True, "alpha_k^2 is infinite"),
    ("polynomial", 0.6, True, None),
  ],
)
def test_step_sizes_say_which_condition_they_break(name, power, asynchronous, broken):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    steps = qtd.step_sizes(name, scale=0.5, power=power, asynchronous=asynchronous)
  assert [broken in str(one.message) for one in caught] == ([True] if broken else [])
  assert bool(caught) == (broken is not None)
  values = np.asarray(steps(jnp.arange(4)))
  k = np.arange(4)
  log = math.e + k
  exponent = power or 0.0
  expected = 0.5 * (np.log(log) ** -exponent if name == "logarithmic" else (k + 1.0) ** -exponent)
  np.testing.assert_allclose(values, expected)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: qtd.Config(discount=1.0), "discount must lie in"),
    (lambda: qtd.Config(discount=-0.1), "discount must lie in"),
    (lambda: qtd.Config(method="fast"), "method must be one of"),
    (lambda: qtd.Config(discount=np.float32(1)), "discount must lie in"),
    (lambda: qtd.Config(step_sizes=0.1), "step_sizes must be StepSizes or None"),
    (lambda: qtd.quantile_td_error(0.0, [1.0]), "same leading axes"),
    (lambda: qtd.quantile_levels(0), "num_quantiles must be an integer >= 1"),
    (lambda: qtd.quantile_td_error(np.zeros((2, 3)), np.zeros(3)), "same leading axes"),
    (lambda: qtd.step_sizes("linear", scale=1.0), "name must be one of"),
    (lambda: qtd.step_sizes("constant", scale=0.0), "scale must be positive"),
    (lambda: quantile_dynamics.fixed_point(markov.chain(), num_quantiles=0), "num_quantiles must"),
    (
      lambda: quantile_dynamics.quantile_dynamic_programming(markov.chain(), np.zeros((4, 2))),
      "theta must have shape",
    ),
    (
      lambda: quantile_dynamics.fixed_point(markov.chain(), num_quantiles=1, lam=1.5),
      "lam must lie in",
    ),
    (
      lambda: qtd.init(
        {"table": np.zeros(2)}, optimizer=optax.sgd(1.0),
        config=qtd.Config(step_sizes=qtd.StepSizes(1.0)),
      ),
      "params must be a table",
    ),
  ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  "states, rewards, following, message",
  [
    ([0, 1], [1.0], [0, 1], "rewards must have shape"),
    ([0, 1], [1.0, 2.0], [0], "shapes must be equal"),
    ([], [], [], "not be empty"),
  ],
)
def test_batches_that_would_broadcast_or_are_empty_are_refused(states, rewards, following, message):
  states, following = np.array(states, int), np.array(following, int)
  batch = qtd.Batch(states, np.array(rewards), following)
  with pytest.raises(ValueError, match=message):
    _step(jnp.zeros((2, 3)), batch, qtd.Config())
