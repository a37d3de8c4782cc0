"""Q-learning epochs: what goes into the buffer and the batch, play, and learning to the optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import decision_processes, q_learning_epochs, qr_dqn
from rl_theory.baselines import dqn


def _corridor(num_cells=4):
  """Right moves on and in the end gains 1, left stays; in cell 0 only right is legal."""
  cells = np.arange(num_cells)
  right = np.minimum(cells + 1, num_cells - 1)
  legal = np.ones((num_cells, 2), bool)
  legal[0, 0] = False
  rewards = np.zeros((num_cells, 2, 1), np.float32)
  rewards[num_cells - 2, 1] = 1
  return decision_processes.DecisionProcess(
    next_states=jnp.asarray(np.stack([cells, right], axis=1)[..., None], jnp.int32),
    probs=jnp.ones((num_cells, 2, 1)), rewards=jnp.asarray(rewards), legal=jnp.asarray(legal),
    terminal=jnp.asarray(cells == num_cells - 1),
    initial=jnp.asarray([0.5, 0.5] + [0.0] * (num_cells - 2)), observations=jnp.eye(num_cells),
  )  # fmt: skip


def _table(params, observations):
  return jnp.tensordot(observations, params, 1)


_ADAM = optax.adam(0.03)
_PLAY = q_learning_epochs.Config(
  discount=0.5, epsilon_end=0.2, epsilon_decay=400.0, num_envs=4, batch_size=16,
  learning_starts=40, replay_capacity=200,
)  # fmt: skip
_CASES = {
  "qr_dqn": (qr_dqn, qr_dqn.Config(kappa=0.0, target_period=10), (4, 2, 3)),
  "dqn": (dqn, dqn.Config(target_period=10), (4, 2)),
}


def _start(name, process, seed=0):
  algorithm, hyperparameters, shape = _CASES[name]
  learner = algorithm.init(jnp.zeros(shape), optimizer=_ADAM, config=hyperparameters)
  state = q_learning_epochs.init(learner, process, jax.random.key(seed), config=_PLAY)
  run = functools.partial(
    q_learning_epochs.epoch, algorithm=algorithm, apply_fn=_table, optimizer=_ADAM,
    hyperparameters=hyperparameters, config=_PLAY,
  )  # fmt: skip
  return state, run


@pytest.mark.parametrize("name", [pytest.param("qr_dqn", marks=pytest.mark.slow), "dqn"])
def test_epochs_find_the_optimum_for_every_seed(name):
  process, algorithm = _corridor(), _CASES[name][0]
  states = jax.vmap(lambda seed: _start(name, process, seed)[0])(jnp.arange(3))
  _, run = _start(name, process)
  over_seeds = jax.jit(jax.vmap(functools.partial(run, num_updates=1200), in_axes=(0, None, 0)))
  states, metrics = over_seeds(states, process, jax.random.split(jax.random.key(1), 3))
  best = decision_processes.optimum(process, 0.5)
  for seed in range(3):
    params = jax.tree.map(lambda leaf, k=seed: leaf[k], states.learner.params)
    policy = q_learning_epochs.greedy_policy(params, process, algorithm=algorithm, apply_fn=_table)
    np.testing.assert_array_equal(policy[:-1], best.policy[:-1])
    values = np.asarray(algorithm.action_values(params))
    legal = np.asarray(process.legal)[:-1]
    # Adam's last steps have the size 0.03.
    np.testing.assert_allclose(
      values[:-1][legal], np.asarray(best.action_values)[:-1][legal], atol=0.1
    )
  assert metrics["loss"].shape == (3,)


def test_the_buffer_holds_the_moves_of_the_process():
  process = _corridor()
  state, run = _start("dqn", process)
  state, metrics = run(state, process, jax.random.key(2), num_updates=5)
  assert int(state.env_steps) == int(state.replay.seen) == 20
  assert int(state.learner.step) == 0  # learning starts after 40 moves
  assert not np.any(state.learner.params) and float(metrics["loss"]) == 0
  moves = jax.tree.map(lambda leaf: np.asarray(leaf)[:20], state.replay.items)
  assert np.all(np.asarray(process.legal)[moves.states, moves.actions])
  chosen = (moves.states, moves.actions, 0)
  np.testing.assert_array_equal(moves.next_states, np.asarray(process.next_states)[chosen])
  np.testing.assert_array_equal(moves.rewards, np.asarray(process.rewards)[chosen])
  # Each copy goes on where it was, or in a first state after the end.
  by_step = jax.tree.map(lambda leaf: leaf.reshape(5, 4), moves)
  ended = by_step.next_states[:-1] == 3
  following = by_step.states[1:]
  assert np.all(np.where(ended, following <= 1, following == by_step.next_states[:-1]))
  assert not np.any(np.asarray(process.terminal)[np.asarray(state.states)])
  batch = q_learning_epochs.draw(state.replay, process, jax.random.key(3), config=_PLAY)
  seen, following = (np.argmax(x, axis=1) for x in (batch.observations, batch.next_observations))
  chosen = (seen, np.asarray(batch.actions), 0)
  np.testing.assert_array_equal(following, np.asarray(process.next_states)[chosen])
  np.testing.assert_array_equal(batch.discounts, np.where(following == 3, 0, 0.5))
  np.testing.assert_array_equal(batch.next_legal, np.asarray(process.legal)[following])


def test_updates_follow_moves_one_by_one_once_learning_has_started():
  process = _corridor()
  state, run = _start("qr_dqn", process)
  state, _ = run(state, process, jax.random.key(4), num_updates=30)
  # Four moves a step; the tenth step brings the fortieth move and the first update.
  assert int(state.env_steps) == 120 and int(state.learner.step) == 21
  assert np.any(state.learner.params) and np.any(state.learner.target_params)


def test_epsilon_greedy_explores_among_legal_actions():
  values, legal = jnp.array([1.0, 5.0, 3.0]), jnp.array([True, False, True])
  drawn = q_learning_epochs.epsilon_greedy(
    jax.random.key(5), jnp.tile(values, (4000, 1)), jnp.tile(legal, (4000, 1)), 0.4
  )
  shares = np.bincount(np.asarray(drawn), minlength=3) / 4000
  # Five standard errors of a frequency among 4,000.
  np.testing.assert_allclose(shares, [0.2, 0, 0.8], atol=5 * 0.4 / np.sqrt(4000))
  found = q_learning_epochs.epsilon(jnp.array([0, 200, 400, 9999]), _PLAY)
  np.testing.assert_allclose(found, [1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def test_bad_settings_name_themselves():
  with pytest.raises(ValueError, match="learning_starts must not exceed replay_capacity=10"):
    q_learning_epochs.Config(learning_starts=20, replay_capacity=10)
  with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\]"):
    q_learning_epochs.Config(discount=1.5)
  with pytest.raises(ValueError, match="num_envs must be an integer"):
    q_learning_epochs.Config(num_envs=0)
