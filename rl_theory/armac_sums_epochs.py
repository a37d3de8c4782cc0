"""An epoch of ARMAC from sums: play, learn the critic, label the decisions, learn the actor."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rl_theory import (
  armac,
  armac_play,
  armac_sums,
  games,
  policy_arrays,
  regret_matching,
  returns,
  rollouts,
)
from sharding import checks


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def epoch(
  state: armac_sums.State,
  game: games.Game,
  found: armac_sums.Decisions,
  key: Any,
  *,
  apply_fn: armac.Networks,
  optimizer: optax.GradientTransformation,
  config: armac_sums.Config,
) -> tuple[armac_sums.State, armac.Metrics]:
  """Returns the state after an epoch.

  Args:
    state: not donated; run many epochs as one `jax.lax.scan`.
    game: the game.
    found: from `decisions`.
    key: typed PRNG key.
    apply_fn: the networks.
    optimizer: as in `armac.update_critic`.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `update_actor` and `armac/critic_loss`, means over the steps.

  Raises:
    ValueError: if `num_episodes` or `replay_epochs` differs from that of `init`, or the state or
      the decisions belong to a game of another size.
  """
  _check(state, game, found, config)
  bound = {"apply_fn": apply_fn, "optimizer": optimizer, "config": config}
  play_key, learn_key = jax.random.split(key)
  episodes = play(state.policy, game, found, play_key, num_episodes=config.num_episodes)
  slot = state.epoch % config.replay_epochs
  memory = jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), state.memory, episodes)
  state, critic_metrics = _learn_values(state._replace(memory=memory), found, learn_key, **bound)
  regrets = advantages(state.params, state.policy, found, apply_fn=apply_fn)
  # Shrinking the old sums, rather than growing the new ones, keeps all of them in range.
  kept = (state.epoch / (state.epoch + 1)) ** config.recency
  new = sums_of(episodes, regrets, state.policy, found)
  sums = jax.tree.map(lambda total, leaf: kept * total + leaf, state.sums, new)
  batch = armac_sums.ActorBatch(found.own_observations, game.legal, sums)

  def step(state: armac_sums.State, _: Any) -> tuple[armac_sums.State, armac.Metrics]:
    return armac_sums.update_actor(state, batch, None, **bound)

  state, metrics = jax.lax.scan(step, state, length=config.num_actor_steps)
  mean_regrets, _ = apply_fn.actor(state.params.actor, found.own_observations)
  state = state._replace(
    policy=regret_matching.regret_matching(mean_regrets, game.legal).astype(state.policy.dtype),
    sums=sums,
    epoch=state.epoch + 1,
    env_steps=state.env_steps + jnp.sum(episodes.mask, dtype=jnp.int32),
  )
  metrics = jax.tree.map(jnp.mean, metrics)
  return state, metrics | {"armac/critic_loss": jnp.mean(critic_metrics["armac/critic_loss"])}


def _check(
  state: armac_sums.State, game: games.Game, found: armac_sums.Decisions, config: armac_sums.Config
) -> None:
  checks.given(config)
  memory = state.memory.mask.shape
  for name, given, kept in (
    ("config.replay_epochs", config.replay_epochs, memory[0]),
    ("config.num_episodes", config.num_episodes, memory[1]),
  ):
    if given != kept:
      raise ValueError(f"{name} must be the one that init got, {kept}, got {given}")
  for name, held, wanted in (
    ("state", (*state.policy.shape, memory[2]), (*game.legal.shape, armac_sums.num_steps(game))),
    ("found", found.numbers.shape, game.parents.shape),
  ):
    if held != wanted:
      raise ValueError(
        f"{name} belongs to another game: its sizes are {held}, those of {game.layout.name} are "
        f"{wanted}; make it for this game"
      )


def play(
  policy: jax.Array, game: games.Game, found: armac_sums.Decisions, key: Any, *, num_episodes: int
) -> armac_sums.Episodes:
  """Returns episodes in which one player explores with uniform play and the others play a policy.

  Args:
    policy: `[S, A]`.
    game: the game.
    found: from `decisions`.
    key: typed PRNG key.
    num_episodes: N.
  """
  play_key, learner_key = jax.random.split(key)
  learners = jax.random.randint(learner_key, (num_episodes,), 0, game.num_players, jnp.int32)
  uniform = policy_arrays.uniform(game)

  def step(nodes: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    players, states = game.players[nodes], jnp.maximum(game.info_states[nodes], 0)
    explores = (players == learners)[:, None]
    acting = jnp.where(explores, uniform[states], policy[states])
    following, actions = rollouts.advance(game, nodes, acting, key)
    return following, (nodes, actions, players >= 0)

  keys = jax.random.split(play_key, max(len(game.layout.levels) - 1, 1))
  last, path = jax.lax.scan(step, jnp.zeros(num_episodes, jnp.int32), keys)
  nodes, actions, mask = armac_play.decisions_first(tuple(x.T for x in path), game)
  return armac_sums.Episodes(
    decisions=jnp.where(mask, found.numbers[nodes], 0),
    actions=jnp.where(mask, actions, 0),  # chance has its own action numbers
    mask=mask,
    learners=learners,
    utilities=game.utilities[last],
  )


def advantages(
  params: armac.Params, policy: jax.Array, found: armac_sums.Decisions, *, apply_fn: armac.Networks
) -> jax.Array:
  """Returns the advantages `[D, A]` of a policy `[S, A]` for the player who decides."""
  own = armac.of_mover(apply_fn.critic(params.critic, found.observations), found.players)
  baseline = jnp.sum(policy[found.states] * own, axis=-1, keepdims=True)
  return jnp.where(found.legal, own - baseline, 0)


def advantage_error(
  regrets: jax.Array, policy: jax.Array, game: games.Game, found: armac_sums.Decisions
) -> jax.Array:
  """Returns how far advantages `[D, A]` are from the true ones of a policy `[S, A]`, in utilities.

  This is a root mean square over legal actions, with histories weighted by the others' reach, as
  counterfactual regret weights them.
  """
  values = games.history_values(game, policy)
  after = values[game.children[found.histories]]
  own = jnp.take_along_axis(after, found.players[:, None, None], 2)[..., 0]
  baseline = jnp.sum(policy[found.states] * own, axis=-1, keepdims=True)
  reach = games.reach_probabilities(game, policy)[found.histories]
  mine = jnp.arange(reach.shape[1]) == found.players[:, None]
  weights = jnp.prod(jnp.where(mine, 1, reach), axis=1)[:, None] * found.legal
  errors = jnp.where(found.legal, regrets - (own - baseline), 0)
  return jnp.sqrt(jnp.sum(weights * errors**2) / jnp.sum(weights))


def mean_policy_of(sums: armac_sums.Sums, game: games.Game) -> jax.Array:
  """Returns the mean of the past policies `[S, A]` in the sums, which the policy head imitates."""
  return regret_matching.normalise(sums.policies, game.legal)


def sums_of(
  episodes: armac_sums.Episodes, regrets: jax.Array, policy: jax.Array, found: armac_sums.Decisions
) -> armac_sums.Sums:
  """Returns the sums over episodes in which the others played `policy`.

  Args:
    episodes: B of them.
    regrets: `[D, A]` the advantages of the policy.
    policy: `[S, A]`.
    found: from `decisions`.
  """
  states = found.states[episodes.decisions]
  mine = found.players[episodes.decisions] == episodes.learners[:, None]
  num_states = len(policy)

  def add(rows: jax.Array, chosen: jax.Array) -> jax.Array:
    ids = jnp.where(chosen, states, num_states).reshape(-1)
    rows = rows.reshape(-1, *rows.shape[2:])
    return jax.ops.segment_sum(rows, ids, num_states + 1)[:-1]

  ones = jnp.ones(states.shape, policy.dtype)
  own, others = episodes.mask & mine, episodes.mask & ~mine
  return armac_sums.Sums(
    regrets=add(regrets[episodes.decisions], own),
    regret_counts=add(ones, own),
    policies=add(policy[states], others),
    policy_counts=add(ones, others),
    episodes=jnp.asarray(len(states), policy.dtype),
  )


def critic_targets(
  values: jax.Array,
  policy: jax.Array,
  episodes: armac_sums.Episodes,
  found: armac_sums.Decisions,
  *,
  trace_decay: Any,
) -> tuple[jax.Array, jax.Array]:
  """Returns mean Tree-Backup targets `[D, n, A]`, and which `[D, A]` occur in the episodes.

  Args:
    values: `[D, n, A]` each player's value of each action.
    policy: `[S, A]`, the one to evaluate.
    episodes: played by any policies.
    found: from `decisions`.
    trace_decay: lambda in [0, 1].
  """
  num_decisions, num_players, num_actions = values.shape
  places = episodes.decisions * num_actions + episodes.actions
  places = jnp.where(episodes.mask, places, num_decisions * num_actions).reshape(-1)

  def add(rows: jax.Array) -> jax.Array:
    total = jax.ops.segment_sum(rows.reshape(-1), places, num_decisions * num_actions + 1)
    return total[:-1].reshape(num_decisions, num_actions)

  rewards = armac.final_rewards(episodes.utilities, episodes.mask)
  policies = policy[found.states[episodes.decisions]]
  counts = add(jnp.ones(episodes.mask.shape, values.dtype))
  totals = [
    add(
      returns.tree_backup_targets(
        values[episodes.decisions, player],
        policies,
        episodes.actions,
        rewards[..., player],
        episodes.mask,
        trace_decay=trace_decay,
      )
    )
    for player in range(num_players)
  ]
  return jnp.stack(totals, axis=1) / jnp.maximum(counts, 1)[:, None], counts > 0


def _learn_values(
  state: armac_sums.State,
  found: armac_sums.Decisions,
  key: Any,
  *,
  apply_fn: armac.Networks,
  optimizer: optax.GradientTransformation,
  config: armac_sums.Config,
) -> tuple[armac_sums.State, armac.Metrics]:
  """Returns the state after all steps of the critic in an epoch."""
  memory = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), state.memory)
  held = jnp.minimum(state.epoch + 1, config.replay_epochs) * config.num_episodes
  lengths = jnp.sum(memory.mask, axis=1, dtype=jnp.int32)

  def round_of_steps(state: armac_sums.State, key: Any) -> tuple[armac_sums.State, armac.Metrics]:
    values = apply_fn.critic(state.params.critic, found.observations)
    targets, seen = critic_targets(
      values, state.policy, memory, found, trace_decay=config.trace_decay
    )

    def step(state: armac_sums.State, key: Any) -> tuple[armac_sums.State, armac.Metrics]:
      row_key, step_key = jax.random.split(key)
      rows = jax.random.randint(row_key, (config.batch_size,), 0, held)
      steps = jax.random.randint(step_key, rows.shape, 0, jnp.maximum(lengths[rows], 1))
      drawn = memory.decisions[rows, steps]
      batch = armac_sums.CriticBatch(found.observations[drawn], targets[drawn], seen[drawn])
      return armac_sums.update_critic(
        state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
      )

    return jax.lax.scan(
      step, state, jax.random.split(key, config.num_critic_steps // config.num_rounds)
    )

  return jax.lax.scan(round_of_steps, state, jax.random.split(key, config.num_rounds))
