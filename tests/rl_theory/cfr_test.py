"""CFR and its variants: the published numbers, OpenSpiel's solvers, and the theorem."""

import dataclasses
import math

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_games import pyspiel

from rl_theory import cfr, games, policy_arrays

KUHN, LEDUC = compiled_games.KUHN, compiled_games.LEDUC
NASH_CONV = {
  (KUHN, "cfr", False): {1: 0.916667, 10: 0.192417, 100: 0.051349, 1000: 0.014538},
  (KUHN, "cfr", True): {1: 0.916667, 10: 0.137398, 100: 0.016452, 1000: 0.001875},
  (KUHN, "cfr+", True): {1: 0.916667, 10: 0.065374, 100: 0.002389, 1000: 0.000175},
  (LEDUC, "cfr", False): {1: 4.747222, 10: 1.854037, 100: 0.346069},
  (LEDUC, "cfr", True): {1: 4.747222, 10: 1.777158, 100: 0.191433},
  (LEDUC, "cfr+", True): {1: 4.747222, 10: 1.220878, 100: 0.026832},
}


@pytest.mark.parametrize(
  ("name", "variant", "alternating"),
  [pytest.param(*case, marks=pytest.mark.slow if case[0] == LEDUC else ()) for case in NASH_CONV],
)
def test_nash_conv_of_the_average_policy(x64, name, variant, alternating):
  game = compiled_games.compile_game(name)
  config = cfr.make_config(variant, alternating=alternating)
  state, done = cfr.init(game), 0
  for num_iterations, expected in NASH_CONV[name, variant, alternating].items():
    state, done = _several(state, game, config, num_iterations - done), num_iterations
    # Half of the last of six digits.
    found = games.nash_conv(game, cfr.average_policy(game, state))
    np.testing.assert_allclose(found, expected, atol=5.1e-7)


@jax.jit
def _several(state, game, config, count):
  """Compiled once for all counts and variants."""
  return jax.lax.fori_loop(
    0, count, lambda _, state: cfr.update(state, game, config=config)[0], state
  )


@pytest.mark.parametrize("variant", list(cfr.VARIANTS))
def test_the_value_of_kuhn_poker(x64, variant):
  game = compiled_games.compile_game(KUHN)
  config = cfr.make_config(variant)
  state = _several(cfr.init(game, config), game, config, 1000)
  policy = cfr.average_policy(game, state)
  assert games.nash_conv(game, policy) < 0.002
  value = games.expected_values(game, policy)[0]
  # Each player loses at most what a best response gains.
  np.testing.assert_allclose(value, -1 / 18, atol=float(games.nash_conv(game, policy)))


@pytest.mark.parametrize(
  ("name", "counts"),
  [
    (KUHN, (1, 10, 100)),
    (compiled_games.KUHN3, (1, 10)),
    pytest.param(compiled_games.HANABI, (10, 100), marks=pytest.mark.slow),
    pytest.param(LEDUC, (1, 10, 100), marks=pytest.mark.slow),
    pytest.param(compiled_games.GOOFSPIEL, (10, 100), marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("variant", ["cfr", "cfr+"])
def test_policies_equal_openspiels(x64, name, counts, variant):
  game = compiled_games.compile_game(name)
  theirs = pyspiel.load_game(game.layout.name)
  solver = (pyspiel.CFRSolver if variant == "cfr" else pyspiel.CFRPlusSolver)(theirs)
  state, done = cfr.init(game), 0
  for count in counts:
    for _ in range(count - done):
      solver.evaluate_and_update_policy()
    state, done = _several(state, game, cfr.make_config(variant), count - done), count
    # The order of sums differs; regrets near zero turn that into small differences of policies.
    np.testing.assert_allclose(
      cfr.average_policy(game, state),
      policy_arrays.from_openspiel(game, solver.average_policy()),
      atol=1e-6,
    )
    np.testing.assert_allclose(
      cfr.current_policy(game, state),
      policy_arrays.from_openspiel(game, solver.current_policy()),
      atol=1e-6,
    )


@pytest.mark.parametrize(
  "name", [compiled_games.TIES3, pytest.param(compiled_games.TIES4, marks=pytest.mark.slow)]
)
def test_exact_ties_stay_ties_in_float32(name):
  # Where rounding decides which of two equal actions is played, policies are 0.26 and 0.48 off.
  game = compiled_games.compile_game(name)
  solver = pyspiel.CFRSolver(pyspiel.load_game(game.layout.name))
  for _ in range(10):
    solver.evaluate_and_update_policy()
  np.testing.assert_allclose(
    cfr.solve(game, num_iterations=10).average_policy,
    policy_arrays.from_openspiel(game, solver.average_policy()),
    atol=1e-4,  # ten iterations in float32
  )


@pytest.mark.parametrize(
  ("variant", "solver"), [("discounted", "DCFRSolver"), ("linear", "LCFRSolver")]
)
def test_discounted_policies_equal_openspiels(x64, variant, solver):
  discounted_cfr = pytest.importorskip("open_spiel.python.algorithms.discounted_cfr")
  game = compiled_games.compile_game(KUHN)
  theirs = getattr(discounted_cfr, solver)(pyspiel.load_game(KUHN))
  for _ in range(10):
    theirs.evaluate_and_update_policy()
  state = _several(cfr.init(game), game, cfr.make_config(variant), 10)
  np.testing.assert_allclose(
    cfr.average_policy(game, state),
    policy_arrays.from_openspiel(game, theirs.average_policy()),
    atol=1e-9,
  )


def test_the_regret_bound_holds(x64):
  game = compiled_games.compile_game(KUHN)
  config = cfr.make_config("cfr", alternating=False)
  state = _several(cfr.init(game), game, config, 50)
  state, metrics = cfr.update(state, game, config=config)
  found = games.nash_conv(game, cfr.average_policy(game, state))
  assert 0 < found <= metrics["cfr/regret_bound"]


def test_updates_are_pure_and_equal_the_scan(x64):
  game = compiled_games.compile_game(KUHN)
  config = cfr.make_config("discounted")
  first = state = cfr.init(game)
  for _ in range(5):
    state, metrics = cfr.update(state, game, None, config=config)
  assert first.step == 0 and not np.any(first.regrets) and metrics.keys() == {"cfr/regret_bound"}
  scanned = cfr.solve(game, num_iterations=5, variant="discounted").state
  for ours, theirs in zip(state[:3], scanned[:3], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
  assert not np.any(np.where(game.legal, 0, state.regrets))
  before = cfr.update._cache_size()
  cfr.update(state, game, None, config=cfr.Config(1.25, -2.0, 3.0))  # numbers do not compile
  assert cfr.update._cache_size() == before
  shapes = jax.eval_shape(lambda: cfr.init(game))
  assert shapes.regrets.shape == game.legal.shape


def test_maps_over_payoffs_and_hyper_parameters(x64):
  game = compiled_games.compile_game(KUHN)
  powers = jnp.array([0.0, 1.0, 2.0])
  discounts = jnp.array([math.inf, 1.0, 1.5])

  def measure(power, discount, scale):
    changed = dataclasses.replace(game, utilities=scale * game.utilities)
    config = cfr.Config(discount, discount, power)
    return cfr.solve(changed, num_iterations=20, config=config).average_policy

  mapped = jax.jit(jax.vmap(measure))(powers, discounts, jnp.array([1.0, 3.0, 0.5]))
  for row, power, discount in zip(mapped, [0.0, 1.0, 2.0], [math.inf, 1.0, 1.5], strict=True):
    config = cfr.Config(discount, discount, power)
    # Regret matching does not see the scale of the payoffs.
    alone = cfr.solve(game, num_iterations=20, config=config).average_policy
    np.testing.assert_allclose(row, alone, atol=1e-9)


def test_bad_input_is_refused():
  game = compiled_games.compile_game(KUHN)
  with pytest.raises(ValueError, match=r"variant must be one of 'cfr', .*, got 'cfrr'"):
    cfr.solve(game, num_iterations=1, variant="cfrr")
  with pytest.raises(ValueError, match="num_iterations must be an integer >= 1, got 0"):
    cfr.solve(game, num_iterations=0)
  with pytest.raises(ValueError, match="averaging_power must be finite and not negative, got -1"):
    cfr.Config(averaging_power=-1)
  with pytest.raises(ValueError, match="positive_discount must be a number"):
    cfr.Config(positive_discount=math.nan)


def test_predictive_cfr_keeps_its_regret_bound(x64):
  """Farina et al., theorem 3, with regret matching+ written out in NumPy."""
  payoffs = np.random.default_rng(0).uniform(-1, 1, (3, 4))
  game = games.compile_game(payoffs, dtype=jnp.float64)
  config = cfr.Config(math.inf, -math.inf, 0.0, alternating=False, predictive=True)
  state, num_iterations = cfr.init(game, config), 60
  sums = [np.zeros(3), np.zeros(4)]
  last = [np.zeros(3), np.zeros(4)]
  total, changes = [np.zeros(3), np.zeros(4)], [0.0, 0.0]
  for _ in range(num_iterations):
    played = []
    for player in range(2):
      weights = np.maximum(sums[player] + last[player], 0)
      uniform = np.full(len(weights), 1 / len(weights))
      played.append(weights / weights.sum() if weights.sum() > 0 else uniform)
    found = np.asarray(cfr.current_policy(game, state))
    np.testing.assert_allclose(found[0, :3], played[0], atol=1e-9)
    np.testing.assert_allclose(found[1], played[1], atol=1e-9)
    for player, values in enumerate((payoffs @ played[1], -payoffs.T @ played[0])):
      regrets = values - played[player] @ values
      changes[player] += np.sum((regrets - last[player]) ** 2)
      sums[player] = np.maximum(sums[player] + regrets, 0)
      total[player] += regrets
      last[player] = regrets
    state, _ = cfr.update(state, game, config=config)
  bounds = [math.sqrt(2 * change) for change in changes]
  assert all(own.max() <= bound for own, bound in zip(total, bounds, strict=True))
  found = float(games.nash_conv(game, cfr.average_policy(game, state)))
  np.testing.assert_allclose(found, sum(own.max() for own in total) / num_iterations, atol=1e-9)
  assert 0 < found <= sum(bounds) / num_iterations


def test_predictions_speed_up_kuhn_poker(x64):
  game = compiled_games.compile_game(compiled_games.KUHN)
  config = cfr.make_config("predictive")
  state, done, gaps = cfr.init(game, config), 0, []
  for count in (100, 1000):
    state, done = _several(state, game, config, count - done), count
    gaps.append(float(games.nash_conv(game, cfr.average_policy(game, state))))
  assert gaps[1] < gaps[0] / 100  # CFR+ gains a factor of 14 here
  assert gaps[1] < NASH_CONV[KUHN, "cfr+", True][1000] / 100
  with pytest.raises(ValueError, match=r"init\(game, config\) with predictive=True"):
    cfr.update(cfr.init(game), game, config=config)
