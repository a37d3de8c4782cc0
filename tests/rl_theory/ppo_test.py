"""PPO with a magnet: hand-worked numbers, its fixed point, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import games, mirror_descent, policy_arrays
from rl_theory.baselines import ppo, ppo_epochs


def test_losses_by_hand():
  legal = jnp.array([True, True, False])
  logits = jnp.log(jnp.array([0.6, 0.4, 1.0]))
  old = jnp.array([0.5, 0.5, 0.0])
  loss = ppo.clipped_policy_loss
  for action, advantage, expected in (
    (0, 2.0, -2.2),  # the ratio 1.2 is clipped at 1.1
    (0, -2.0, 2.4),  # not where that would hide a loss
    (1, 2.0, -1.6),
    (1, -2.0, 1.8),  # the ratio 0.8 is clipped at 0.9
  ):
    found = loss(logits, old, jnp.array(action), jnp.array(advantage), legal=legal, clip=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
  np.testing.assert_allclose(ppo.magnet_loss(logits, legal=legal), np.log(2) - entropy, rtol=1e-5)
  # Where both policies are the same, the gradient is minus the advantage times that of log pi.
  gradient = jax.grad(
    lambda x: loss(x, jax.nn.softmax(x), jnp.array(0), jnp.array(3.0), legal=legal | True, clip=0.1)
  )(jnp.zeros(3))
  np.testing.assert_allclose(gradient, -3 * (np.eye(3)[0] - 1 / 3), rtol=1e-5)


def test_advantages_follow_each_players_own_decisions():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(5, 6)).astype(np.float32)
  players, mask = rng.integers(0, 3, (5, 6)), rng.random((5, 6)) < 0.7
  utilities = rng.normal(size=(5, 3)).astype(np.float32)
  for decay in (0.0, 0.6, 1.0):
    found = ppo.advantages(
      jnp.asarray(values), jnp.asarray(players), jnp.asarray(mask), jnp.asarray(utilities),
      trace_decay=decay,
    )  # fmt: skip
    expected = np.zeros((5, 6))
    for row in range(5):
      for player in range(3):
        own = np.flatnonzero(mask[row] & (players[row] == player))
        ahead = np.append(values[row, own], utilities[row, player])
        errors = np.diff(ahead)
        for k, place in enumerate(own):
          expected[row, place] = sum(decay**j * error for j, error in enumerate(errors[k:]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_temperature_falls():
  config = ppo.Config(temperature_start=1.0, temperature_end=0.1, temperature_decay=100.0)
  np.testing.assert_allclose(ppo.temperature(jnp.array(0), config), 1.0)
  np.testing.assert_allclose(ppo.temperature(jnp.array(100), config), 0.1 + 0.9 / np.e, rtol=1e-5)


def _table(params, observations):
  return observations @ params


NETWORKS = ppo.Networks(_table, _table)
PAYOFFS = jnp.array([[3.0, -1.0], [-1.0, 1.0]])


def _start(game, optimizer, config):
  size = games.information_state_tensors(game).shape[-1]
  params = ppo.Params(jnp.zeros((size, 2)), jnp.zeros((size, 1)))
  return ppo.init(params, optimizer=optimizer, config=config)


def test_exact_steps_end_at_the_quantal_response_equilibrium():
  game = games.compile_game(PAYOFFS)
  observations = games.information_state_tensors(game)
  seen = games.state_observations(game, observations)
  config = ppo.Config(temperature_start=1.0, temperature_end=1.0)
  optimizer = optax.sgd(0.3)
  rows = jnp.broadcast_to(jnp.arange(2)[:, None], (2, 2))  # both play the action of the row

  def step(state, _):
    policy = ppo_epochs.current_policy(state.params, game, observations, apply_fn=NETWORKS)
    values = jnp.stack([PAYOFFS @ policy[1], -PAYOFFS.T @ policy[0]])
    gains = values - jnp.sum(policy * values, axis=1, keepdims=True)
    # A mean over the two actions that weights each as the policy does: no sampling.
    batch = ppo.Batch(
      jnp.broadcast_to(seen, (2, *seen.shape)), jnp.ones((2, 2, 2), bool), rows,
      jnp.ones((2, 2), bool), jnp.broadcast_to(policy, (2, 2, 2)), (2 * policy * gains).T,
      jnp.zeros((2, 2)),
    )  # fmt: skip
    state, _ = ppo.update(state, batch, None, apply_fn=NETWORKS, optimizer=optimizer, config=config)
    return state, policy

  _, policies = jax.lax.scan(step, _start(game, optimizer, config), length=400)
  exact = mirror_descent.solve(game, num_iterations=300, config=mirror_descent.Config(0.2, 1.0))
  expected = mirror_descent.current_policy(game, exact)
  np.testing.assert_allclose(policies[-1], expected, atol=1e-4)  # 400 steps in float32
  for other in (policy_arrays.uniform(game), jnp.array([[1 / 3, 2 / 3], [1 / 3, 2 / 3]])):
    assert jnp.max(jnp.abs(expected - other)) > 0.1  # neither uniform nor an equilibrium


def test_episodes_follow_the_policy_and_an_epoch_counts_them():
  game = games.compile_game(PAYOFFS)
  observations = games.information_state_tensors(game)
  config = ppo.Config(trace_decay=1.0, num_episodes=512, batch_size=256, num_steps=3)
  optimizer = optax.adam(1e-2)
  state = _start(game, optimizer, config)
  slanted = jnp.tile(jnp.array([0.0, 1.0]), (len(state.params.policy), 1))
  state = state._replace(params=state.params._replace(policy=slanted))
  batch = ppo_epochs.sample(
    state, game, observations, jax.random.key(0), apply_fn=NETWORKS, config=config
  )
  actions = np.asarray(batch.actions)
  utilities = np.asarray(PAYOFFS)[actions[:, 0], actions[:, 1]]
  np.testing.assert_array_equal(batch.returns, np.stack([utilities, -utilities], 1))
  np.testing.assert_array_equal(batch.advantages, batch.returns)  # the values are 0
  played = float(batch.policies[0, 0, 1])
  # Five standard errors of 1,024 draws.
  np.testing.assert_allclose(actions.mean(), played, atol=5 * (played * (1 - played) / 1024) ** 0.5)
  state, metrics = ppo_epochs.epoch(
    state, game, observations, jax.random.key(1), apply_fn=NETWORKS, optimizer=optimizer,
    config=config,
  )  # fmt: skip
  assert state.env_steps == 1024 and state.step == 3
  assert metrics.keys() >= {"loss", "ppo/policy_loss", "ppo/magnet_loss", "ppo/value_loss"}


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="batch_size must divide num_episodes=10, got 4"):
    ppo.Config(num_episodes=10, batch_size=4)
  with pytest.raises(ValueError, match=r"temperature_end must be .*not negative, got -1"):
    ppo.Config(temperature_end=-1)
  with pytest.raises(ValueError, match=r"trace_decay must .*got 2"):
    ppo.Config(trace_decay=2)
