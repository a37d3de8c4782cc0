"""NFSP: episodes in the right buffers, each network's own loss, and play near equilibrium."""

import functools

import compiled_games
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import games, policy_arrays
from rl_theory.baselines import nfsp, nfsp_epochs
from rl_theory.networks import mlp

# --- episodes ---


def _problem(name=compiled_games.KUHN, *, optimizer=None, width=16, **changes):
  config = nfsp.Config(
    **{"num_episodes": 64, "batch_size": 16, "replay_capacity": 512, "reservoir_capacity": 256}
    | {"learning_starts": 8, "anticipatory": 0.5, **changes}
  )
  game = compiled_games.compile_game(name)
  observations = games.information_state_tensors(game)
  model = mlp.MLP(game.layout.num_actions, (width,))
  keys = jax.random.split(jax.random.key(0), (2, game.num_players))
  params = jax.jit(jax.vmap(jax.vmap(lambda key: model.init(key, observations[:1, 0]))))(keys)
  params = nfsp.Params(*(jax.tree.map(lambda leaf, k=k: leaf[k], params) for k in range(2)))
  optimizer = optimizer or _SGD
  state = nfsp.init(params, optimizer=optimizer, config=config)
  bound = {"apply_fn": nfsp.Networks(model.apply, model.apply), "config": config}
  return game, observations, state, optimizer, bound


def _utilities_by_decisions(game):
  """What the players get after each sequence of (information state, action)."""
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  states, found = np.asarray(game.info_states), {}
  for terminal in np.asarray(game.terminals):
    path, node = [], terminal
    while node > 0:
      if states[parents[node]] >= 0:
        path.append((states[parents[node]], actions[node]))
      node = parents[node]
    found[tuple(path[::-1])] = np.asarray(game.utilities)[terminal]
  return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [compiled_games.KUHN, compiled_games.KUHN3])
def test_transitions_lead_to_the_players_own_next_decision(name):
  game, observations, state, _, bound = _problem(name)
  first = jax.jit(functools.partial(nfsp_epochs.average_policy, apply_fn=bound["apply_fn"]))(
    state.params, game, observations
  )
  np.testing.assert_allclose(first, policy_arrays.uniform(game), atol=1e-7)
  utilities = _utilities_by_decisions(game)  # the states of an episode show all cards
  episodes = nfsp_epochs.sample(state, game, observations, jax.random.key(2), **bound)
  after = nfsp_epochs.remember(state, episodes, jax.random.key(3))
  (states, actions, rewards, next_states), mask, by_best_response = jax.tree.map(
    np.asarray, (tuple(episodes.transitions), episodes.mask, episodes.by_best_response)
  )
  stored = [[] for _ in range(game.num_players)]
  for episode in range(64):
    steps = np.flatnonzero(mask[:, episode].any(0))
    path = tuple(zip(states[0, episode, steps], actions[:, episode, steps].max(0), strict=True))
    for player in range(game.num_players):
      own = np.flatnonzero(mask[player, episode])
      assert np.all(np.asarray(game.state_players)[states[player, episode, own]] == player)
      following = [*states[player, episode, own[1:]], -1]
      for t, then in zip(own, following, strict=True):
        reward = utilities[path][player] if then < 0 else 0
        row = (states[player, episode, t], actions[player, episode, t], reward, then)
        assert (rewards[player, episode, t], next_states[player, episode, t]) == row[2:]
        stored[player].append((*row, by_best_response[player, episode]))
  for player, rows in enumerate(stored):
    # All decisions are replayed; those of best responses are imitated, all while there is room.
    held = np.stack([leaf[player] for leaf in after.replay.items], axis=-1)
    np.testing.assert_array_equal(held[: len(rows)], np.array(rows)[:, :4])
    chosen = np.array([row[:2] for row in rows if row[4]])
    held = np.stack([leaf[player] for leaf in after.reservoir.items], axis=-1)
    np.testing.assert_array_equal(held[: len(chosen)], chosen)
    assert 0 < len(chosen) < len(rows) == int(after.replay.seen[player])
  assert int(after.env_steps) == mask.sum()
  # What was greedy at first, all values being 0, is the first legal action.
  epsilon_share = np.mean([row[1] != 0 for rows in stored for row in rows if row[4]])
  assert epsilon_share < 0.15


# --- losses ---


def test_values_of_illegal_actions_and_of_the_end_count_for_nothing():
  values, next_values = jnp.array([[1.0, 5.0]] * 3), jnp.array([[2.0, 9.0]] * 3)
  legal = jnp.array([[True, False], [True, True], [False, False]])
  arguments = (values, jnp.zeros(3, int), jnp.full(3, 0.5), next_values)

  def total(*arguments):
    losses = nfsp.best_response_loss(*arguments, next_legal=legal)
    return jnp.sum(losses), losses

  grads, losses = jax.jit(jax.grad(total, argnums=(0, 2, 3), has_aux=True))(*arguments)
  np.testing.assert_allclose(losses, [1.5**2, 8.5**2, 0.5**2])
  np.testing.assert_allclose(grads[0], [[-3, 0], [-17, 0], [1, 0]])
  assert not np.any(grads[1]) and not np.any(grads[2])


def test_play_and_imitation_are_among_legal_actions():
  values, legal = jnp.array([[1.0, 2.0, 9.0], [3.0, 2.0, 9.0]]), jnp.array([True, True, False])
  np.testing.assert_allclose(
    jax.jit(nfsp.best_response)(values, jnp.stack([legal] * 2), 0.2),
    [[0.1, 0.9, 0], [0.9, 0.1, 0]],
    rtol=1e-6,
  )
  losses = nfsp.average_policy_loss(jnp.log(jnp.array([1.0, 3.0, 50.0])), jnp.array(1), legal=legal)
  np.testing.assert_allclose(losses, -np.log(0.75), rtol=1e-6)


def test_epsilon_decays_from_start_to_end():
  config = nfsp.Config(epsilon_decay=1000.0)
  found = nfsp.epsilon(np.array([0, 1000, 100_000]), config)
  np.testing.assert_allclose(found, [0.06, 0.001 + 0.059 / np.e, 0.001], rtol=1e-5)


# --- updates ---

_SGD = optax.sgd(0.1)


def _linear(params, observations):
  return observations @ params["kernel"]


def test_networks_and_players_learn_apart_and_the_target_stands_still():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  params = nfsp.Params(*({"kernel": normal(2, 5, 3)} for _ in range(2)))
  actions, legal = rng.integers(0, 3, (2, 8, 2)), np.ones((8, 2, 3), bool)
  batch = nfsp.Batch(
    normal(8, 2, 5), actions[0], normal(8, 2), normal(8, 2, 5), legal, normal(8, 2, 5), legal,
    actions[1],
  )  # fmt: skip
  config = nfsp.Config(
    target_period=2, learning_starts=1, replay_capacity=1, reservoir_capacity=1
  )  # fmt: skip
  state = nfsp.init(params, optimizer=_SGD, config=config)
  step = functools.partial(
    nfsp.update, apply_fn=nfsp.Networks(_linear, _linear), optimizer=_SGD, config=config
  )
  moved, _ = step(state, batch, None)

  def equal(first, second):
    return [
      np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    ]

  # Another batch for the average policy, or for player 1, is nothing to the others.
  other = batch._replace(imitated_actions=2 - batch.imitated_actions)
  changed, _ = step(state, other, None)
  assert all(equal(changed.params.values, moved.params.values))
  assert not any(equal(changed.params.policy, moved.params.policy))
  other = batch._replace(
    rewards=batch.rewards + np.array([0, 1], np.float32),
    imitated_actions=np.where([True, False], actions[1], 2 - actions[1]),
  )
  changed, _ = step(state, other, None)
  pairs = jax.tree.map(np.asarray, (changed.params, moved.params))
  first, second = (jax.tree.map(lambda leaf, k=k: leaf[k], pairs) for k in range(2))
  assert all(equal(*first)) and not any(equal(*second))
  # The target network is a copy of two updates' past at most.
  assert all(equal(moved.target_params, state.target_params))
  again, _ = step(moved, batch, None)
  assert all(equal(again.target_params, again.params.values))


@pytest.mark.slow
def test_an_epoch_does_the_updates_that_its_play_calls_for():
  game, observations, state, optimizer, bound = _problem(learn_every=10, learning_starts=100)
  run = functools.partial(nfsp_epochs.epoch, optimizer=optimizer, **bound)
  steps = [0]
  for index in range(5):
    before = int(state.env_steps)
    state, metrics = run(state, game, observations, jax.random.key(index))
    ready = min(int(state.replay.seen.min()), int(state.reservoir.seen.min())) >= 100
    due = (int(state.env_steps) // 10 - before // 10) if ready else 0
    steps.append(steps[-1] + due)
    assert int(state.step) == steps[-1] and (metrics["grad_norm"] > 0) == ready
  assert steps[1] == 0 < steps[-1]


@pytest.mark.slow
def test_a_batch_is_drawn_from_each_players_own_buffers():
  game, observations, state, _, bound = _problem()
  episodes = nfsp_epochs.sample(state, game, observations, jax.random.key(2), **bound)
  state = nfsp_epochs.remember(state, episodes, jax.random.key(3))
  seen = jnp.arange(len(game.legal))  # states in place of observations
  batch = nfsp_epochs.draw(state, game, seen, jax.random.key(4), batch_size=2000)
  batch, held_by = jax.tree.map(np.asarray, (batch, (state.replay, state.reservoir)))
  legal, end = np.asarray(game.legal), ~batch.next_legal.any(-1)
  following = np.where(end, -1, batch.next_observations)
  assert np.all(end | (batch.next_legal == legal[batch.next_observations]).all(-1))
  np.testing.assert_array_equal(batch.imitated_legal, legal[batch.imitated_observations])
  drawn = (
    (batch.observations, batch.actions, batch.rewards, following),
    (batch.imitated_observations, batch.imitated_actions),
  )
  for columns, buffer in zip(drawn, held_by, strict=True):
    for player in range(2):
      held = zip(*(leaf[player, : buffer.seen[player]] for leaf in buffer.items), strict=True)
      # Of at most 160 items none is missed by 2,000 draws but with probability 6e-4.
      assert set(zip(*(column[:, player] for column in columns), strict=True)) == set(held)


@pytest.mark.slow
def test_seeds_run_side_by_side():
  game, observations, state, optimizer, bound = _problem(learn_every=16)
  run = functools.partial(nfsp_epochs.epoch, optimizer=optimizer, **bound)
  keys = jax.random.split(jax.random.key(5), (3, 4))
  many = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], 3, axis=0), state)
  for step in range(4):
    many, _ = jax.vmap(lambda state, key: run(state, game, observations, key))(many, keys[:, step])
  for seed in range(3):
    one = state
    for step in range(4):
      one, _ = run(one, game, observations, keys[seed, step])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
      # Sums in another order; what was played is the same.
      np.testing.assert_allclose(a, b[seed], atol=1e-4)


@pytest.mark.slow
def test_only_legal_actions_are_ever_played():
  game, observations, state, optimizer, bound = _problem(compiled_games.LEDUC, epsilon_start=1.0)
  for index in range(4):
    state, _ = nfsp_epochs.epoch(
      state, game, observations, jax.random.key(index), optimizer=optimizer, **bound
    )
  for buffer in (state.replay, state.reservoir):
    for player in range(2):
      held = min(int(buffer.seen[player]), buffer.items.states.shape[1])
      states, actions = (np.asarray(x[player, :held]) for x in buffer.items[:2])
      assert np.asarray(game.legal)[states, actions].all()
      assert (np.asarray(game.state_players)[states] == player).all()


@pytest.mark.slow
def test_average_play_comes_near_the_equilibrium_of_kuhn_poker():
  """A fraction of the published run; uniform play has 0.92."""
  game, observations, state, optimizer, bound = _problem(
    optimizer=optax.sgd(0.1), width=64, num_episodes=128, batch_size=128, learning_starts=100,
    replay_capacity=20_000, reservoir_capacity=20_000, anticipatory=0.1, epsilon_decay=1e6,
  )  # fmt: skip

  def body(state, key):
    return nfsp_epochs.epoch(state, game, observations, key, optimizer=optimizer, **bound)

  keys = jax.random.split(jax.random.key(1), 1000)
  state, metrics = jax.jit(lambda state: jax.lax.scan(body, state, keys))(state)
  found = games.nash_conv(
    game, nfsp_epochs.average_policy(state.params, game, observations, apply_fn=bound["apply_fn"])
  )
  # Five seeds gave 0.08 to 0.14 after these 128,000 episodes.
  assert found < 0.25 and np.all(np.isfinite(metrics["loss"]))


# --- bad input ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"anticipatory": 0.0}, "anticipatory must be positive and finite, got 0.0"),
    ({"anticipatory": 1.5}, r"anticipatory must lie in \[0, 1\], got 1.5"),
    ({"epsilon_start": 1.5}, r"epsilon_start must lie in \[0, 1\], got 1.5"),
    ({"epsilon_decay": 0}, "epsilon_decay must be positive and finite, got 0"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ({"replay_capacity": 500}, "learning_starts must not exceed replay_capacity=500 .* got 1000"),
  ],
)
def test_bad_hyperparameters_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    nfsp.Config(**changes)


def test_a_state_of_another_game_or_config_is_refused():
  game, observations, state, optimizer, bound = _problem()
  bound["config"] = nfsp.Config()
  with pytest.raises(ValueError, match=r"capacities of 512 and 256, .* asks for 200000 and 200000"):
    nfsp_epochs.epoch(state, game, observations, jax.random.key(0), optimizer=optimizer, **bound)
