"""Tree-Backup: equal to a plain loop, and off-policy values are learned."""

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_theory import armac, armac_play, armac_tables, games, returns


def _slow(values, policies, actions, rewards, mask, trace_decay, discount):
  """The definition of one episode, forwards: q + sum of the following errors, traces cut by pi."""
  steps = [t for t in range(len(actions)) if mask[t]]
  errors, probs = [], []
  for here, after in zip(steps, [*steps[1:], None], strict=True):
    following = 0 if after is None else float(policies[after] @ values[after])
    errors.append(rewards[here] + discount * following - values[here, actions[here]])
    probs.append(policies[here, actions[here]])
  targets = np.zeros(len(actions))
  for k, step in enumerate(steps):
    trace, targets[step] = 1.0, values[step, actions[step]]
    for later in range(k, len(steps)):
      trace *= discount * trace_decay * probs[later] if later > k else 1
      targets[step] += trace * errors[later]
  return targets


@pytest.mark.parametrize("trace_decay", [0.0, 0.3, 1.0])
def test_targets_are_the_sum_of_errors_with_traces(x64, trace_decay):
  rng = np.random.default_rng(0)
  values, rewards = rng.normal(size=(5, 7, 3)), rng.normal(size=(5, 7))
  policies, actions = rng.dirichlet(np.ones(3), size=(5, 7)), rng.integers(0, 3, (5, 7))
  mask = rng.random((5, 7)) < 0.7
  found = returns.tree_backup_targets(
    values, policies, actions, rewards, mask, trace_decay=trace_decay, discount=0.9
  )
  for row in range(5):
    each = (x[row] for x in (values, policies, actions, rewards, mask))
    np.testing.assert_allclose(found[row], _slow(*each, trace_decay, 0.9), atol=1e-12)


def test_shapes_that_differ_are_named():
  values = jnp.zeros((2, 3, 4))
  with pytest.raises(
    ValueError, match=r"shapes must be equal, got actions \[2, 3\], rewards \[3\]"
  ):
    returns.tree_backup_targets(
      values, values, jnp.zeros((2, 3), int), jnp.zeros(3), jnp.ones((2, 3)), trace_decay=1
    )
  with pytest.raises(
    ValueError, match=r"policies must have shape \[..., T, A\] = \[2, 3, 4\], got \[3, 4\]"
  ):
    returns.tree_backup_targets(
      values, values[0], jnp.zeros((2, 3), int), jnp.zeros((2, 3)), jnp.ones((2, 3)), trace_decay=1
    )


@pytest.mark.slow
@pytest.mark.parametrize("trace_decay", [0.0, 1.0])
def test_values_of_another_policy_are_learned_from_uniform_play(x64, trace_decay):
  """Precup, Sutton and Singh 2000, theorem 2: all values of Kuhn poker, from uniform play."""
  game = compiled_games.compile_game(compiled_games.KUHN)
  policy = jnp.asarray(compiled_games.random_policy(game))
  config = armac.Config(trace_decay=trace_decay, num_episodes=8_000, batch_size=8_000, capacity=1)
  state = armac_tables.init(game, config=config)
  # The evaluated policy is given as regrets; the tables' own start plays uniformly, and so do all.
  batch = armac_play.sample(
    state, game, armac_tables.observations(game), jax.random.key(0),
    apply_fn=armac_tables.TABLES, config=config,
  )  # fmt: skip
  states, nodes = batch.observations[..., 0, 0], batch.observations[..., 0, 1]
  batch = batch._replace(policies=policy[states])
  critic = state.params.critic
  for rate in (0.1, 0.01, 0.001):
    critic = armac_tables._learn_values(critic, batch, nodes, config, rate)
  true_values = jnp.swapaxes(games.history_values(game, policy)[game.children], 1, 2)
  decided = np.asarray(game.children >= 0)[:, None]
  # Seeds give 0.005 to 0.02 at these rates; untrained values are 1.5 off.
  assert np.max(np.where(decided, np.abs(critic - true_values), 0)) < 0.05
