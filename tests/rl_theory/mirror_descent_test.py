"""Mirror descent: its equilibria by independent solvers, its rates by their theorems."""

import copy

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from rl_theory import games, mirror_descent, policy_arrays

Config = mirror_descent.Config


def _matrix(shape=(3, 4), seed=0):
  payoffs = np.random.default_rng(seed).uniform(-1, 1, shape)
  return payoffs, games.compile_game(payoffs, dtype=jnp.float64)


def _matrix_qre(payoffs, temperature):
  """Returns the logit equilibrium of a matrix game from SciPy's root finder."""
  rows = len(payoffs)

  def residual(logits):
    x, y = scipy.special.softmax(logits[:rows]), scipy.special.softmax(logits[rows:])
    return logits - np.concatenate([payoffs @ y, -payoffs.T @ x]) / temperature

  found = scipy.optimize.root(residual, np.zeros(sum(payoffs.shape)), tol=1e-13)
  assert found.success
  return scipy.special.softmax(found.x[:rows]), scipy.special.softmax(found.x[rows:])


def test_the_distance_from_the_equilibrium_shrinks_as_the_theorem_says(x64):
  payoffs, game = _matrix()
  temperature = 0.4
  rate = temperature / np.abs(payoffs).max() ** 2  # the largest that theorem 3.4 allows
  qre = _matrix_qre(payoffs, temperature)
  config = Config(rate, temperature)

  @jax.jit
  def trace(state):
    def body(state, _):
      return mirror_descent.update(state, game, config=config)[0], state.log_policy

    return jax.lax.scan(body, state, length=60)[1]

  logps = np.asarray(trace(mirror_descent.init(game, config)))
  distance = sum(
    scipy.special.rel_entr(own, np.exp(logps[:, player, : len(own)])).sum(1)
    for player, own in enumerate(qre)
  )
  bound = distance[0] * (1 + rate * temperature) ** -np.arange(60.0)
  # Rounding keeps a divergence of 1e-16 above the bound at the end.
  assert np.all(distance <= bound + 1e-15)
  assert distance[0] > 0.1 and distance[-1] < 1e-6


@pytest.mark.parametrize("form", mirror_descent.FORMS)
def test_both_forms_reach_the_equilibrium_of_a_matrix_game(x64, form):
  payoffs, game = _matrix(seed=1)
  config = Config(0.4, 0.3, form=form)
  state = mirror_descent.solve(game, num_iterations=400, config=config)
  x, y = _matrix_qre(payoffs, 0.3)
  # (1 + 0.12)^-400 is 1e-20; what remains is the tolerance of the root finder.
  np.testing.assert_allclose(state.log_policy[0, :3], np.log(x), atol=1e-9)
  np.testing.assert_allclose(state.log_policy[1], np.log(y), atol=1e-9)


def test_kuhn_poker_ends_at_gambits_equilibrium(x64):
  """OpenSpiel's own test holds the logit equilibrium that Gambit computes, to eight digits."""
  theirs = pytest.importorskip("open_spiel.python.algorithms.mmd_dilated_test")
  case = theirs._DATA[0]
  temperature = 1 / case["inverse_alpha"]
  solver = theirs.mmd_dilated.MMDDilatedEnt(case["game"], temperature)
  solver.sequences = copy.deepcopy(case["gambit_qre_sol"])
  game = compiled_games.compile_game(compiled_games.KUHN)
  published = policy_arrays.from_openspiel(game, solver.get_policies())
  response = mirror_descent.quantal_response(game, published, temperature=temperature)
  np.testing.assert_allclose(response, published, atol=1e-6)  # eight digits of reach, divided
  state = mirror_descent.solve(game, num_iterations=1000, config=Config(1.0, temperature))
  found = mirror_descent.current_policy(game, state)
  np.testing.assert_allclose(found, published, atol=1e-6)
  assert games.nash_conv(game, found) > 0.1  # it is no equilibrium of the game itself
  np.testing.assert_allclose(
    mirror_descent.quantal_response(game, found, temperature=temperature), found, atol=1e-12
  )


def _agent_qre(game, temperature):
  """Returns an agent QRE from SciPy's root finder and a walk over histories, in NumPy."""
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  players, states = np.asarray(game.players), np.asarray(game.info_states)
  chance, utilities = np.asarray(game.chance_probs), np.asarray(game.utilities)

  def policy_of(logits):
    return scipy.special.softmax(np.stack([np.zeros_like(logits), logits], 1), axis=1)

  def residual(logits):
    policy = policy_of(logits)
    edges = np.ones(len(parents))
    reach = np.ones((len(parents), 3))
    for node in range(1, len(parents)):
      mover = players[parents[node]]
      edges[node] = policy[states[parents[node]], actions[node]] if mover >= 0 else chance[node]
      reach[node] = reach[parents[node]]
      reach[node, mover] *= edges[node]
    values, sums = utilities.copy(), np.zeros((len(logits), 2))
    weights = np.zeros(len(logits))
    for node in range(len(parents) - 1, 0, -1):
      parent, mover = parents[node], players[parents[node]]
      values[parent] += edges[node] * values[node]
      if mover >= 0:
        others = np.delete(reach[parent], mover).prod()
        sums[states[parent], actions[node]] += others * values[node, mover]
        weights[states[parent]] += others / 2  # two actions
    gain = (sums[:, 1] - sums[:, 0]) / weights
    return logits - gain / temperature

  found = scipy.optimize.root(residual, np.zeros(len(game.legal)), tol=1e-13)
  assert found.success
  return policy_of(found.x)


def test_the_behavioural_form_ends_at_the_agent_equilibrium(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  expected = _agent_qre(game, 0.5)
  config = Config(0.3, 0.5, form="behavioural")
  state = mirror_descent.solve(game, num_iterations=600, config=config)
  found = mirror_descent.current_policy(game, state)
  np.testing.assert_allclose(found, expected, atol=1e-9)
  response = mirror_descent.quantal_response(game, found, temperature=0.5, form="behavioural")
  np.testing.assert_allclose(response, found, atol=1e-9)


def test_a_step_equals_openspiels(x64):
  theirs = pytest.importorskip("open_spiel.python.algorithms.mmd_dilated")
  game = compiled_games.compile_game(compiled_games.KUHN)
  solver = theirs.MMDDilatedEnt(compiled_games.pyspiel.load_game(compiled_games.KUHN), 0.2)
  config = Config(solver.stepsize, 0.2)
  uniform = jnp.log(jnp.full(game.legal.shape, 0.5))  # they start there
  state = mirror_descent.init(game, config)._replace(log_policy=uniform)
  for _ in range(3):
    solver.update_sequences()
    state, _ = mirror_descent.update(state, game, config=config)
  np.testing.assert_allclose(
    mirror_descent.current_policy(game, state),
    policy_arrays.from_openspiel(game, solver.get_policies()),
    atol=1e-12,
  )


def test_the_optimistic_average_keeps_its_bound(x64):
  payoffs, game = _matrix((4, 5), seed=2)
  largest = np.abs(payoffs).max()
  rate = 1 / (2 * largest)
  config = Config(rate, temperature=0.0, optimistic=True)
  state = mirror_descent.init(game, config)
  gaps = []
  for _ in range(3):
    for _ in range(40):
      state, _ = mirror_descent.update(state, game, config=config)
    gaps.append(float(games.nash_conv(game, mirror_descent.average_policy(game, state))))
  # Regrets sum to at most log A / eta + eta sum |g_t - g_{t-1}|^2 - sum |x_t - x_{t-1}|^2 / 4 eta
  # (Syrgkanis et al., proposition 7). At this step the last two cancel between the players,
  # except for the first gradients, of size `largest` each.
  constant = (np.log(4) + np.log(5)) / rate + 2 * rate * largest**2
  for count, gap in zip((40, 80, 120), gaps, strict=True):
    assert 0 < gap <= constant / count
  plain = Config(rate, temperature=0.0)
  last = [
    games.nash_conv(
      game,
      mirror_descent.current_policy(
        game, mirror_descent.solve(game, num_iterations=1000, config=each)
      ),
    )
    for each in (config, plain)
  ]
  assert last[0] < 0.1 * last[1]  # without optimism the last policy cycles


def test_a_falling_temperature_leads_to_an_equilibrium(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  config = Config(1.0, 1.0, learning_rate_decay=0.5, temperature_decay=0.5, form="behavioural")
  gaps = [
    games.nash_conv(
      game,
      mirror_descent.current_policy(
        game, mirror_descent.solve(game, num_iterations=count, config=config)
      ),
    )
    for count in (100, 1000)
  ]
  assert gaps[1] < 0.5 * gaps[0] and gaps[1] < 0.1


def test_a_policy_of_your_own_can_be_the_magnet(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  magnet = 0.9 * compiled_games.random_policy(game) + 0.1 * policy_arrays.uniform(game)
  for form in mirror_descent.FORMS:
    config = Config(0.5, 1000.0, form=form)
    state = mirror_descent.solve(game, num_iterations=50, config=config, magnet=magnet)
    # A player that pays 1,000 for a nat stays within 2 / 1,000 nats, a few thousandths.
    np.testing.assert_allclose(mirror_descent.current_policy(game, state), magnet, atol=5e-3)


def test_updates_compile_once_and_bad_input_is_refused(x64):
  _, game = _matrix()
  config = Config()
  state, _ = mirror_descent.update(mirror_descent.init(game, config), game, config=config)
  before = mirror_descent.update._cache_size()
  mirror_descent.update(state, game, config=Config(0.3, 0.0, 0.5))
  assert mirror_descent.update._cache_size() == before
  with pytest.raises(ValueError, match="form must be one of 'dilated', 'behavioural', got 'q'"):
    Config(form="q")
  with pytest.raises(ValueError, match="learning_rate must be positive and finite, got 0"):
    Config(learning_rate=0)
  with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
    mirror_descent.quantal_response(game, policy_arrays.uniform(game), temperature=0)
  with pytest.raises(ValueError, match="init with optimistic=True, got last_gradient=None"):
    mirror_descent.update(state, game, config=Config(optimistic=True))
