"""ARMAC with tables in place of networks: with exact expectations, and from sampled episodes.

Exact (`exact_update`): each regression of `armac` is replaced by the conditional mean that is its
minimum. At the histories of a state s, weight the advantages of pi^t by the others' reach. Let
a_t(s) be their sum and w_t(s) the sum of the weights. Then

  W(s, .) = sum_{j<=t} a_j(s, .) / sum_{j<=t} w_j(s),   pi^{t+1} = RM(W),

whatever the explorers did. This is CFR that updates all players at once, and the mean policy is
CFR's average policy. With more than two players, episodes also weight the mean policy by the reach
of the other past policies. That is not CFR's average, so such games are refused.

Sampled (`update`): the episodes of `armac_play.sample`. The actor's tables take the mean of what an
epoch teaches them; the critic's table moves a fixed share of the way to each Tree-Backup target.
What remains of the distance from equilibrium is the noise of one epoch's means.

Reference: Gruslys et al. 2020, https://arxiv.org/abs/2008.12234.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import (
  armac,
  armac_epochs,
  armac_play,
  games,
  policy_arrays,
  regret_matching,
  returns,
)

Metrics = dict[str, jax.Array]


# --- exact expectations ---


class ExactState(NamedTuple):
  """Running sums over epochs.

  Attributes:
    regret_sums: `[S, A]` advantages of all past policies, weighted by the others' reach.
    regret_weights: `[S]` sum of these weights.
    policy_sums: `[S, A]` past policies, weighted by their player's own reach.
    step: scalar int32, epochs done.
  """

  regret_sums: jax.Array
  regret_weights: jax.Array
  policy_sums: jax.Array
  step: jax.Array


def exact_init(game: games.Game) -> ExactState:
  """Returns the state before the first epoch, whose policy is uniform.

  Raises:
    ValueError: if the game does not have two players.
  """
  if game.num_players != 2:
    raise ValueError(
      f"game must have two players, got {game.num_players} in {game.layout.name}: with more the "
      "mean policy is not CFR's average; use cfr.solve or armac_epochs.epoch"
    )
  zeros = jnp.zeros(game.legal.shape, game.utilities.dtype)
  return ExactState(zeros, zeros[:, 0], jnp.zeros_like(zeros), jnp.zeros((), jnp.int32))


def mean_regrets(state: ExactState) -> jax.Array:
  """Returns W `[S, A]`, 0 at states that the other player has never reached."""
  weights = state.regret_weights[:, None]
  return jnp.where(weights > 0, state.regret_sums / jnp.where(weights > 0, weights, 1), 0)


def exact_policy(game: games.Game, state: ExactState) -> jax.Array:
  """Returns pi^t `[S, A]`, which the next epoch plays and evaluates."""
  return regret_matching.regret_matching(mean_regrets(state), game.legal)


def exact_mean_policy(game: games.Game, state: ExactState) -> jax.Array:
  """Returns the mean policy `[S, A]`, which converges to an equilibrium."""
  return regret_matching.normalise(state.policy_sums, game.legal)


@jax.jit
def exact_update(state: ExactState, game: games.Game) -> tuple[ExactState, Metrics]:
  """Returns the state after one epoch.

  The metric `armac/exact_policy_change` is the largest change of a probability. The advantages come
  from the values q(h, a) of single histories, not from counterfactual values, so that agreement
  with `cfr` tests the method.
  """
  policy = exact_policy(game, state)
  values = games.history_values(game, policy)
  reach = games.reach_probabilities(game, policy)
  players = jnp.maximum(game.players, 0)
  own_values = jnp.take_along_axis(values, players[:, None], 1)[:, 0]
  after = jnp.take_along_axis(values[game.children], players[:, None, None], 2)[..., 0]
  legal = game.children >= 0
  advantages = jnp.where(legal, after - own_values[:, None], 0)
  own = jax.nn.one_hot(players, game.num_players + 1, dtype=reach.dtype)
  others_reach = jnp.prod(jnp.where(own > 0, 1, reach), axis=1)
  num_states = len(game.legal)
  states = jnp.where(game.info_states < 0, num_states, game.info_states)
  add = functools.partial(jax.ops.segment_sum, segment_ids=states, num_segments=num_states)
  own_reach = jnp.take_along_axis(reach, players[:, None], 1)[:, 0]
  # Own reach is the same at all histories of a state, so the maximum picks any of them.
  state_reach = jax.ops.segment_max(own_reach, states, num_states)
  new = ExactState(
    state.regret_sums + add(others_reach[:, None] * advantages),
    state.regret_weights + add(others_reach),
    state.policy_sums + state_reach[:, None] * policy,
    state.step + 1,
  )
  change = jnp.max(jnp.abs(exact_policy(game, new) - policy))
  return new, {"armac/exact_policy_change": change}


# --- sampled episodes ---


class Actor(NamedTuple):
  """The actor's two tables, `[S, A]` each: mean regrets and mean policy."""

  regrets: jax.Array
  policies: jax.Array


def _act(actor: Actor, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
  states = observations[..., 0]
  return actor.regrets[states], jnp.log(actor.policies[states])


def _evaluate(critic: jax.Array, observations: jax.Array) -> jax.Array:
  return critic[observations[..., 0, 1]]


TABLES = armac.Networks(_act, _evaluate)


def observations(game: games.Game) -> jax.Array:
  """Returns what the tables read, `[H, n, 2]` int: the mover's information state, the history."""
  rows = jnp.stack([jnp.maximum(game.info_states, 0), jnp.arange(len(game.parents))], axis=-1)
  return jnp.repeat(rows[:, None], game.num_players, axis=1)


def init(game: games.Game, *, config: armac.Config) -> armac.State:
  """Returns the state before the first epoch: regrets and values of 0, uniform policies."""
  num_histories = len(game.parents)
  dtype = game.utilities.dtype
  actor = Actor(jnp.zeros(game.legal.shape, dtype), policy_arrays.uniform(game))
  critic = jnp.zeros((num_histories, game.num_players, game.layout.num_actions), dtype)
  params = armac.Params(actor, critic)
  past = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], config.capacity, axis=0), params)
  return armac.State(params, past, (), *(jnp.zeros((), jnp.int32) for _ in range(3)))


@functools.partial(jax.jit, static_argnames="exact_critic")
def update(
  state: armac.State,
  game: games.Game,
  key: Any,
  *,
  config: armac.Config,
  learning_rate: Any = 0.1,
  exact_critic: bool = False,
) -> tuple[armac.State, Metrics]:
  """Returns the state after one epoch: play, learn the values, average advantages and policies.

  Args:
    state: from `init` or an earlier `update` of the same game.
    game: the game.
    key: typed PRNG key.
    config: hyper-parameters; the numbers of optimisation steps are not used.
    learning_rate: share of the way to its target that a value moves in each episode.
    exact_critic: whether to compute the values from the tree instead of learning them.

  Returns:
    The new state, and the metric `armac/critic_error`: the mean absolute error of the values of
    the actions played.
  """
  batch = armac_play.sample(state, game, observations(game), key, apply_fn=TABLES, config=config)
  nodes, states = batch.observations[..., 0, 1], batch.observations[..., 0, 0]
  policy = regret_matching.regret_matching(state.params.actor.regrets, game.legal)
  after = games.history_values(game, policy)[game.children]
  true_values = jnp.where((game.children >= 0)[..., None], after, 0).swapaxes(1, 2)
  critic = true_values
  if not exact_critic:
    critic = _learn_values(state.params.critic, batch, nodes, config, learning_rate)
  taken = jnp.broadcast_to(batch.actions[..., None, None], (*nodes.shape, game.num_players, 1))
  error = jnp.take_along_axis(jnp.abs(critic - true_values)[nodes], taken, -1)
  error = jnp.sum(jnp.where(batch.mask[..., None, None], error, 0))
  error = error / (jnp.sum(batch.mask) * game.num_players)
  state = armac_play.keep_critic(state._replace(params=state.params._replace(critic=critic)))
  batch = armac_epochs.add_regrets(state, batch, apply_fn=TABLES, config=config)
  mine = batch.players == batch.learners[:, None]
  actor = Actor(
    _mean_by_state(batch.regrets, states, batch.mask & mine, state.params.actor.regrets),
    _mean_by_state(batch.past_policies, states, batch.mask & ~mine, state.params.actor.policies),
  )
  state = state._replace(
    params=state.params._replace(actor=actor),
    step=state.step + 1,
    env_steps=state.env_steps + jnp.sum(batch.mask, dtype=jnp.int32),
  )
  return armac_play.next_epoch(state), {"armac/critic_error": error}


def _learn_values(
  critic: jax.Array, batch: armac.Batch, nodes: jax.Array, config: armac.Config, rate: Any
) -> jax.Array:
  """Moves the values of played actions towards their targets, one episode at a time."""
  steps, rewards = batch.mask.shape[1], armac.final_rewards(batch.utilities, batch.mask)

  def learn(critic: jax.Array, episode: Any) -> tuple[jax.Array, None]:
    nodes, policies, actions, rewards, mask = episode
    for player in range(rewards.shape[-1]):
      values = critic[nodes, player]
      targets = returns.tree_backup_targets(
        values, policies, actions, rewards[:, player], mask, trace_decay=config.trace_decay
      )
      change = jnp.where(mask, rate * (targets - values[jnp.arange(steps), actions]), 0)
      critic = critic.at[nodes, player, actions].add(change)
    return critic, None

  episodes = (nodes, batch.policies, batch.actions, rewards, batch.mask)
  return jax.lax.scan(learn, critic, episodes)[0]


def _mean_by_state(
  rows: jax.Array, states: jax.Array, chosen: jax.Array, otherwise: jax.Array
) -> jax.Array:
  """Returns the mean `[S, A]` of each state's chosen rows, and `otherwise` if it has none."""
  num_states = len(otherwise)
  ids = jnp.where(chosen, states, num_states).reshape(-1)
  add = functools.partial(jax.ops.segment_sum, segment_ids=ids, num_segments=num_states)
  sums = add(rows.reshape(-1, rows.shape[-1]))
  counts = add(jnp.ones(len(ids), rows.dtype))[:, None]
  return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), otherwise)
