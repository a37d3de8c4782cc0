"""Episodes from OpenSpiel itself are those of the compiled game; bounds are bounds."""

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import (
  armac,
  armac_epochs,
  armac_play,
  cfr,
  games,
  large_games,
  local_best_response,
  policy_arrays,
)
from rl_theory.networks import actor_critic

OPTIMIZER = optax.adam(1e-3)


def _start(num_players, num_actions, size, config):
  actor = actor_critic.Actor(num_actions, 16, 16)
  critic = actor_critic.Critic(num_players, num_actions, 16, 16)
  keys = jax.random.split(jax.random.key(0))
  params = armac.Params(
    actor.init(keys[0], jnp.zeros((1, size))), critic.init(keys[1], jnp.zeros((1, 2, size)))
  )
  # Regrets that differ between states and places in the past, so that policies do.
  params = jax.tree.map(
    lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params
  )
  state = armac.init(params, optimizer=OPTIMIZER, config=config)
  noise = jnp.arange(1.0, config.capacity + 1)
  past = jax.tree.map(
    lambda leaf: leaf * noise.reshape(-1, *(1,) * (leaf.ndim - 1)), state.past.actor
  )
  state = state._replace(past=state.past._replace(actor=past), epoch=jnp.asarray(3, jnp.int32))
  return state, armac.Networks(actor.apply, critic.apply)


@pytest.mark.slow
def test_hidden_moves_are_observed_as_in_the_compiled_game():
  name = "goofspiel(num_cards=3,imp_info=True,points_order=descending)"
  game = compiled_games.compile_game(name)
  known = np.asarray(games.information_state_tensors(game))
  config = armac.Config(num_episodes=64, num_groups=4, batch_size=64, capacity=4)
  state, apply_fn = _start(2, 3, known.shape[-1], config)
  batch = large_games.play_episodes(
    name, state, jax.random.key(0), apply_fn=apply_fn, config=config, max_decisions=4
  )
  seen = np.asarray(batch.observations)[np.asarray(batch.mask)]
  known = {row.tobytes() for row in known[np.asarray(game.players) >= 0]}
  assert {row.tobytes() for row in seen} <= known
  assert seen[..., -3:].any()


@pytest.mark.slow
def test_episodes_are_drawn_like_those_of_the_compiled_game():
  game = compiled_games.compile_game(compiled_games.KUHN)
  observations = games.information_state_tensors(game)
  config = armac.Config(num_episodes=4096, num_groups=64, capacity=4)
  state, apply_fn = _start(2, 2, 11, config)
  one = large_games.play_episodes(
    "kuhn_poker", state, jax.random.key(0), apply_fn=apply_fn, config=config, max_decisions=3
  )
  two = armac_play.sample(
    state, game, observations, jax.random.key(1), apply_fn=apply_fn, config=config
  )
  summaries = []
  for batch in (one, two):
    mask = np.asarray(batch.mask)
    seen = np.asarray(batch.observations)[mask]
    rows = np.concatenate(
      [
        seen.reshape(len(seen), -1),
        np.asarray(batch.legal)[mask],
        np.asarray(batch.past_policies)[mask],
        np.asarray(batch.policies)[mask],
        np.eye(2)[np.asarray(batch.actions)[mask]],
        np.eye(2)[np.asarray(batch.players)[mask]],
      ],
      axis=1,
    )
    summaries.append((rows.mean(0), rows.std(0) / len(rows) ** 0.5, mask.sum(1).mean()))
  (first, error, length), (second, _, other) = summaries
  # Two independent samples; decisions of one episode, and of one group, go together: twice as wide.
  assert np.all(np.abs(first - second) < 10 * error + 0.01)
  assert abs(length - other) < 0.1
  assert one.observations.shape == two.observations.shape
  learned, metrics = armac_epochs.learn(
    state, one, jax.random.key(2), apply_fn=apply_fn, optimizer=OPTIMIZER, config=config
  )
  assert int(learned.epoch) == 4 and np.isfinite(metrics["armac/critic_loss"])


def _looked_up(game, policy):
  """A policy of observations from one of rows."""
  observations = games.information_state_tensors(game)
  seen = np.asarray(games.state_observations(game, observations))
  rows = {row.tobytes(): probs for row, probs in zip(seen, np.asarray(policy), strict=True)}
  return lambda observations, legal: np.stack([rows[row.tobytes()] for row in observations])


@pytest.mark.slow
def test_a_local_best_response_wins_less_than_an_exact_one_and_more_than_nothing():
  game = compiled_games.compile_game(compiled_games.LEDUC)
  policy = compiled_games.random_policy(game)
  bound = local_best_response.evaluate(
    "leduc_poker", _looked_up(game, policy), num_hands=400, num_particles=30
  )
  exact, own = games.best_response_values(game, policy), games.expected_values(game, policy)
  assert np.all(bound.values < exact + 4 * bound.standard_errors)
  assert np.sum(bound.values) > np.sum(own) + 2 * np.linalg.norm(bound.standard_errors)


@pytest.mark.slow
def test_the_belief_never_learns_what_is_hidden():
  """One particle that turns out impossible: Leduc's board shows the card that it believed in."""
  game = compiled_games.pyspiel.load_game("leduc_poker")
  rng, told, redealt = np.random.default_rng(0), 0, 0
  for _ in range(400):
    real, believed, moves = game.new_initial_state(), [game.new_initial_state()], []
    weights = np.ones(1)
    for _ in range(2):
      believed, weights = local_best_response._deal(real, believed, weights, moves, 0, rng)
    assert [hidden for _, hidden in moves] == [False, True]
    held = believed[0].history()[1]
    for action in (1, 1):  # both call; the board follows
      moves.append((action, False))
      for state in (real, *believed):
        state.apply_action(action)
    believed, weights = local_best_response._deal(real, believed, weights, moves, 0, rng)
    seen, now = real.history(), believed[0].history()
    assert now[0] == seen[0] and now[2:] == seen[2:] and now[1] not in (seen[0], seen[4])
    if held == seen[4]:
      redealt += 1
      told += now[1] == seen[1]
  # Four cards are possible: a quarter of some 80 cases, within four standard errors.
  assert redealt > 40 and abs(told / redealt - 0.25) < 4 * (0.1875 / redealt) ** 0.5


@pytest.mark.slow
def test_nothing_is_won_against_an_equilibrium():
  game = compiled_games.compile_game(compiled_games.LEDUC)
  policy = cfr.solve(game, num_iterations=1000, variant="cfr+").average_policy
  bound = local_best_response.evaluate(
    "leduc_poker", _looked_up(game, policy), num_hands=400, num_particles=30
  )
  value = games.expected_values(game, policy)
  assert np.all(bound.values < value + 4 * bound.standard_errors)


@pytest.mark.slow
def test_no_limit_holdem_runs_from_end_to_end():
  config = armac.Config(
    num_episodes=16, num_groups=4, batch_size=8, num_critic_steps=2, num_actor_steps=2, capacity=4
  )
  state, apply_fn = _start(2, 4, 169, config)
  batch = large_games.play_episodes(
    large_games.NO_LIMIT_HOLDEM,
    state,
    jax.random.key(0),
    apply_fn=apply_fn,
    config=config,
    max_decisions=24,
  )
  np.testing.assert_allclose(batch.utilities.sum(1), 0, atol=1e-3)  # zero-sum, in chips
  taken = np.take_along_axis(np.asarray(batch.legal), np.asarray(batch.actions)[..., None], 2)
  assert taken[..., 0][np.asarray(batch.mask)].all()
  state, _ = armac_epochs.learn(
    state, batch, jax.random.key(1), apply_fn=apply_fn, optimizer=OPTIMIZER, config=config
  )

  @jax.jit
  def policy(observations, legal):
    return policy_arrays.softmax(apply_fn.actor(state.params.actor, observations)[1], legal)

  bound = local_best_response.evaluate(
    large_games.NO_LIMIT_HOLDEM, policy, num_hands=4, num_particles=8
  )
  assert np.all(np.isfinite(bound.values)) and np.all(np.abs(bound.values) <= 2000)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="two players, got 3"):
    local_best_response.evaluate(compiled_games.KUHN3, None, num_hands=2)
  with pytest.raises(ValueError, match="num_hands must be an integer >= 2, got 1"):
    local_best_response.evaluate("kuhn_poker", None, num_hands=1)
  with pytest.raises(ValueError, match="num_particles must be an integer >= 1, got 0"):
    local_best_response.evaluate("kuhn_poker", None, num_hands=2, num_particles=0)


@pytest.mark.slow
def test_an_episode_that_is_too_long_is_named():
  config = armac.Config(num_episodes=4, num_groups=2, batch_size=4, capacity=4)
  state, apply_fn = _start(2, 2, 11, config)
  with pytest.raises(
    ValueError, match=r"max_decisions=1 is too small for an episode of kuhn_poker\(\): 3 is enough"
  ):
    large_games.play_episodes(
      "kuhn_poker", state, jax.random.key(0), apply_fn=apply_fn, config=config, max_decisions=1
    )
