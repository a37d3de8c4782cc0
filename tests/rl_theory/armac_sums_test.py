"""ARMAC from sums: what the networks see are the means of what episodes teach, and no more."""

import functools

import compiled_games
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import (
  armac,
  armac_play,
  armac_sums,
  armac_sums_epochs,
  cfr,
  games,
  policy_arrays,
  regret_matching,
)
from rl_theory.networks import actor_critic


def _found(game):
  return armac_sums.decisions(game, games.information_state_tensors(game))


def _true_values(game, policy, found):
  """Each player's value `[D, n, A]` of each action, 0 for illegal ones."""
  children = game.children[found.histories]
  after = games.history_values(game, policy)[children]
  return jnp.where((children >= 0)[..., None], after, 0).swapaxes(1, 2)


def _setup(name=compiled_games.KUHN, dtype="float32", **changes):
  game = games.compile_game(name, dtype=dtype)
  config = armac_sums.Config(
    **{
      **{"num_episodes": 64, "replay_epochs": 2, "num_rounds": 2, "batch_size": 32},
      **{"num_critic_steps": 8, "num_actor_steps": 8},
      **changes,
    }
  )
  found = _found(game)
  actor = actor_critic.Actor(game.layout.num_actions, 16, 16)
  critic = actor_critic.Critic(game.num_players, game.layout.num_actions, 16, 16)
  params = armac.Params(
    actor.init(jax.random.key(0), found.own_observations[:1]),
    critic.init(jax.random.key(1), found.observations[:1]),
  )
  optimizer = optax.adam(1e-2)
  state = armac_sums.init(params, game, optimizer=optimizer, config=config)
  bound = {
    "apply_fn": armac.Networks(actor.apply, critic.apply),
    "optimizer": optimizer,
    "config": config,
  }
  return game, found, state, bound


@pytest.mark.parametrize(
  "name", [compiled_games.KUHN, pytest.param(compiled_games.KUHN3, marks=pytest.mark.slow)]
)
def test_the_means_have_the_gradient_of_all_episodes(x64, name):
  """The identity behind the module: sums lose nothing that the actor's gradient needs."""
  game = compiled_games.compile_game(name)
  found, rng = _found(game), np.random.default_rng(0)
  batches, sums = [], None
  for seed in range(3):  # three epochs with policies and labels of their own
    policy = jnp.asarray(compiled_games.random_policy(game, seed))
    regrets = jnp.where(found.legal, jnp.asarray(rng.normal(size=found.legal.shape)), 0)
    episodes = armac_sums_epochs.play(policy, game, found, jax.random.key(seed), num_episodes=40)
    new = armac_sums_epochs.sums_of(episodes, regrets, policy, found)
    sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    at = episodes.decisions
    batches.append(
      armac.Batch(
        observations=found.observations[at], players=found.players[at], legal=found.legal[at],
        actions=episodes.actions, mask=episodes.mask, learners=episodes.learners,
        slots=jnp.full(40, seed), past_policies=policy[found.states[at]],
        policies=policy[found.states[at]], utilities=episodes.utilities, regrets=regrets[at],
      )
    )  # fmt: skip
  batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
  actor = nn.Dense(2 * game.layout.num_actions, param_dtype=jnp.float64)  # both heads
  apply_fn = armac.Networks(
    lambda params, seen: jnp.split(actor.apply(params, seen), 2, axis=-1), lambda *_: None
  )
  params = armac.Params(actor.init(jax.random.key(9), found.own_observations[:1]), ())
  grad = functools.partial(jax.grad, has_aux=True)
  rows, _ = grad(functools.partial(armac.loss_actor, apply_fn=apply_fn, config=None))(
    params, None, batch, None
  )
  whole = armac_sums.ActorBatch(found.own_observations, game.legal, sums)
  means, _ = grad(functools.partial(armac_sums.loss_actor, apply_fn=apply_fn, config=None))(
    params, None, whole, None
  )
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(rows)) > 0.1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), rows, means)


def _all_episodes(game, found):
  """Every path through the game, with every explorer: episodes, and their terminal histories."""
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  players, numbers = np.asarray(game.players), np.asarray(found.numbers)
  paths = []
  for end in np.asarray(game.terminals):
    path, node = [], end
    while parents[node] >= 0:
      if players[parents[node]] >= 0:
        path.insert(0, (numbers[parents[node]], actions[node]))
      node = parents[node]
    paths.append((end, path))
  length = max(len(path) for _, path in paths)
  rows = [
    (path + [(0, 0)] * (length - len(path)), len(path), learner, end)
    for end, path in paths
    for learner in range(game.num_players)
  ]
  steps = jnp.asarray([row[0] for row in rows])
  episodes = armac_sums.Episodes(
    decisions=steps[..., 0],
    actions=steps[..., 1],
    mask=jnp.arange(length) < jnp.asarray([row[1] for row in rows])[:, None],
    learners=jnp.asarray([row[2] for row in rows]),
    utilities=game.utilities[np.array([row[3] for row in rows])],
  )
  return episodes, np.array([row[3] for row in rows])


@pytest.mark.parametrize("recency", [0, 1])
def test_with_exact_expectations_the_sums_are_cfr(x64, recency):
  """All paths of Kuhn poker, weighted by their probabilities; p = 1 is linear CFR."""
  game = compiled_games.compile_game(compiled_games.KUHN)
  found = _found(game)
  episodes, ends = _all_episodes(game, found)
  learners = np.asarray(episodes.learners)
  uniform = policy_arrays.uniform(game)
  uniform_reach = np.asarray(games.reach_probabilities(game, uniform))[ends]
  total, policy = None, uniform
  theirs = cfr.init(game)
  config = cfr.make_config("linear" if recency else "cfr", alternating=False)
  for t in range(15):
    np.testing.assert_allclose(policy, cfr.current_policy(game, theirs), atol=1e-10)
    reach = np.asarray(games.reach_probabilities(game, policy))[ends].astype(float)
    rows = np.arange(len(ends))
    reach[rows, learners] = uniform_reach[rows, learners]
    own = armac.of_mover(_true_values(game, policy, found), found.players)
    regrets = own - jnp.sum(policy[found.states] * own, axis=-1, keepdims=True)
    regrets = jnp.where(found.legal, regrets, 0)
    single = jax.vmap(
      lambda one, regrets=regrets, policy=policy: armac_sums_epochs.sums_of(
        jax.tree.map(lambda leaf: leaf[None], one), regrets, policy, found
      )
    )(episodes)
    # Each path counts as often as it is played.
    weigh = functools.partial(jnp.tensordot, reach.prod(1), axes=1)
    shrink = functools.partial(jnp.multiply, (t / (t + 1)) ** recency)
    new = jax.tree.map(weigh, single)
    total = new if total is None else jax.tree.map(jnp.add, jax.tree.map(shrink, total), new)
    policy = regret_matching.regret_matching(total.regrets, game.legal)
    theirs, _ = cfr.update(theirs, game, config=config)
  mean = armac_sums_epochs.mean_policy_of(total, game)
  np.testing.assert_allclose(mean, cfr.average_policy(game, theirs), atol=1e-10)


def test_the_sums_estimate_counterfactual_regrets():
  """Means of sampled labels are the cumulative regret over its weight, whatever the labels are."""
  game = compiled_games.compile_game(compiled_games.KUHN)
  found = _found(game)
  policy = jnp.asarray(compiled_games.random_policy(game, 3))
  regrets = jnp.asarray(np.random.default_rng(1).normal(size=found.legal.shape))
  episodes = armac_sums_epochs.play(policy, game, found, jax.random.key(0), num_episodes=40_000)
  sums = armac_sums_epochs.sums_of(episodes, regrets, policy, found)
  reach = np.asarray(games.reach_probabilities(game, policy))[found.histories]
  players, states = np.asarray(found.players), np.asarray(found.states)
  reach[np.arange(len(players)), players] = 1
  weights = reach.prod(axis=1)
  for s in range(len(game.legal)):
    here = states == s
    expected = np.average(np.asarray(regrets)[here], axis=0, weights=weights[here])
    spread = np.sqrt(np.average((np.asarray(regrets)[here] - expected) ** 2, 0, weights[here]))
    count = float(sums.regret_counts[s])
    # Five standard errors of a mean of `count` labels.
    assert count > 500
    found_mean = np.asarray(sums.regrets[s]) / count
    assert np.all(np.abs(found_mean - expected) < 5 * spread / np.sqrt(count) + 1e-6)
  # The others play the policy itself, so its mean at each state is the policy; each float32 sum of
  # up to 20,000 terms is rounded.
  np.testing.assert_allclose(armac_sums_epochs.mean_policy_of(sums, game), policy, atol=1e-4)
  # Each player explores in half of the episodes, so both kinds of sums see every decision once.
  total = float(sums.regret_counts.sum() + sums.policy_counts.sum())
  assert total == float(episodes.mask.sum())


@pytest.mark.parametrize("trace_decay", [0.0, 0.6, 1.0])
def test_true_values_are_their_own_targets(x64, trace_decay):
  """After the deal nothing in Kuhn poker is random, so a target can only miss q by q's error."""
  game = compiled_games.compile_game(compiled_games.KUHN)
  found = _found(game)
  behaviour, policy = (jnp.asarray(compiled_games.random_policy(game, k)) for k in (0, 1))
  episodes = armac_sums_epochs.play(behaviour, game, found, jax.random.key(0), num_episodes=200)
  values = _true_values(game, policy, found)
  targets, seen = armac_sums_epochs.critic_targets(
    values, policy, episodes, found, trace_decay=trace_decay
  )
  assert float(seen.mean()) > 0.6
  chosen = np.broadcast_to(np.asarray(seen)[:, None], values.shape)
  np.testing.assert_allclose(np.asarray(targets)[chosen], np.asarray(values)[chosen], atol=1e-12)
  # The error measure agrees: it is 0 for true advantages, and the size of a constant error.
  own = armac.of_mover(values, found.players)
  base = jnp.sum(policy[found.states] * own, axis=-1, keepdims=True)
  true = jnp.where(found.legal, own - base, 0)
  assert float(armac_sums_epochs.advantage_error(true, policy, game, found)) < 1e-12
  assert float(armac_sums_epochs.advantage_error(true + 0.5, policy, game, found)) == pytest.approx(
    0.5
  )


def test_targets_are_means_over_the_episodes(x64):
  """Against a loop over episodes, with values that are wrong everywhere."""
  game = compiled_games.compile_game(compiled_games.KUHN)
  found, rng = _found(game), np.random.default_rng(2)
  policy = compiled_games.random_policy(game, 1)
  episodes = armac_sums_epochs.play(
    jnp.asarray(policy), game, found, jax.random.key(4), num_episodes=50
  )
  values = rng.normal(size=(len(found.histories), 2, game.layout.num_actions))
  targets, seen = armac_sums_epochs.critic_targets(
    jnp.asarray(values), jnp.asarray(policy), episodes, found, trace_decay=0.7
  )
  collected = {}
  for numbers, actions, mask, _, utilities in zip(*map(np.asarray, episodes), strict=True):
    steps = list(zip(numbers[mask], actions[mask], strict=True))
    for player in range(2):
      following = 0.0
      for k in reversed(range(len(steps))):
        d, a = steps[k]
        target = (utilities[player] if k == len(steps) - 1 else 0) + following
        collected.setdefault((d, player, a), []).append(target)
        probs, q = policy[np.asarray(found.states)[d]], values[d, player]
        following = probs @ q + 0.7 * probs[a] * (target - q[a])
  for (d, player, a), found_targets in collected.items():
    assert bool(seen[d, a])
    np.testing.assert_allclose(targets[d, player, a], np.mean(found_targets), atol=1e-12)
  assert int(seen.sum()) * 2 == len(collected)


def test_an_epoch_replaces_the_oldest_episodes_and_weighs_the_sums():
  game, found, state, bound = _setup(recency=1.0)
  states = [state]
  for k in range(3):
    state, metrics = armac_sums_epochs.epoch(state, game, found, jax.random.key(k), **bound)
    states.append(state)
  for leaf in jax.tree.leaves(metrics):
    assert np.isfinite(leaf)

  # Epochs 0 and 2 share a place in a memory of two epochs.
  first, second, third = (np.asarray(each.memory.decisions) for each in states[1:])
  assert first[0].any() and not first[1].any() and second[1].any()
  np.testing.assert_array_equal(third[1], second[1])
  assert (third[0] != second[0]).any()
  # The labels are advantages of the policy that played, from the critic after its steps.
  before, after = states[1:3]
  regrets = armac_sums_epochs.advantages(
    after.params, before.policy, found, apply_fn=bound["apply_fn"]
  )
  assert float(jnp.abs(regrets).max()) > 0.1
  episodes = jax.tree.map(lambda leaf: leaf[1], after.memory)
  new = armac_sums_epochs.sums_of(episodes, regrets, before.policy, found)
  expected = jax.tree.map(lambda old, leaf: old / 2 + leaf, before.sums, new)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), after.sums, expected)
  # Weights 1/3, 2/3 and 1, so two epochs' worth of episodes.
  assert float(state.sums.episodes) == pytest.approx(64 * 2)
  assert int(state.epoch) == 3 and int(state.step) == 3 * (8 + 8)
  total = float(state.sums.regret_counts.sum() + state.sums.policy_counts.sum())
  assert total < int(state.env_steps)
  # The policy that plays is regret matching on the actor's regrets.
  regrets, _ = bound["apply_fn"].actor(state.params.actor, found.own_observations)
  np.testing.assert_array_equal(state.policy, regret_matching.regret_matching(regrets, game.legal))


@pytest.mark.slow
def test_kuhn_poker_comes_near_equilibrium():
  game, found, state, bound = _setup(num_episodes=512, replay_epochs=8, num_actor_steps=32)
  observations = games.information_state_tensors(game)

  def step(state, key):
    state, _ = armac_sums_epochs.epoch(state, game, found, key, **bound)
    policy = armac_play.mean_policy(state.params, game, observations, apply_fn=bound["apply_fn"])
    return state, games.nash_conv(game, policy)

  distances = jax.vmap(
    lambda key: jax.lax.scan(step, state, jax.random.split(key, 100))[1][-20:].mean()
  )(jax.random.split(jax.random.key(0), 5))
  # Uniform play has 0.92, exact CFR 0.05 after 100 iterations. These seeds have 0.05 to 0.10; with
  # labels from the critic before it has learned, their mean is above 0.10.
  assert float(distances.mean()) < 0.085


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_epochs_run_in_a_scan_with_64_bits(x64, dtype):
  game, found, state, bound = _setup(dtype=dtype)
  keys = jax.random.split(jax.random.key(0), 2)
  new, _ = jax.lax.scan(
    lambda state, key: armac_sums_epochs.epoch(state, game, found, key, **bound), state, keys
  )
  assert int(new.epoch) == 2
  assert jax.tree.map(jnp.dtype, new) == jax.tree.map(jnp.dtype, state)


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="num_rounds must divide num_critic_steps=8, got 3"):
    armac_sums.Config(num_rounds=3, num_critic_steps=8)
  with pytest.raises(ValueError, match=r"recency must be one number, got shape \(2,\)"):
    armac_sums.Config(recency=np.ones(2))
  game, found, state, bound = _setup()
  key = jax.random.key(0)
  for changes, name in (
    ({"num_episodes": 32, "replay_epochs": 4}, "config.replay_epochs must be .* 2, got 4"),
    ({"num_episodes": 32, "replay_epochs": 2}, "config.num_episodes must be .* 64, got 32"),
  ):
    other = {**bound, "config": armac_sums.Config(**changes)}
    with pytest.raises(ValueError, match=name):
      armac_sums_epochs.epoch(state, game, found, key, **other)
  three = compiled_games.compile_game(compiled_games.KUHN3)
  with pytest.raises(ValueError, match=r"state belongs to another game: .* kuhn_poker"):
    armac_sums_epochs.epoch(state, three, _found(three), key, **bound)
  with pytest.raises(ValueError, match="found belongs to another game: "):
    armac_sums_epochs.epoch(state, game, _found(three), key, **bound)
  for wrong in (found.observations, found.numbers, 1.0):
    with pytest.raises(ValueError, match="observations must have shape"):
      armac_sums.decisions(game, wrong)
