"""An epoch of PPO: play episodes on the device, then step through them several times."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rl_theory import games, policy_arrays, rollouts
from rl_theory.baselines import ppo


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def epoch(
  state: ppo.State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: ppo.Networks,
  optimizer: optax.GradientTransformation,
  config: ppo.Config,
) -> tuple[ppo.State, ppo.Metrics]:
  """Returns the state after an epoch on a compiled game.

  Args:
    state: not donated; run many epochs as one `jax.lax.scan`.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    key: typed PRNG key.
    apply_fn: the networks.
    optimizer: as in `ppo.update`.
    config: hyper-parameters.

  Returns:
    The new state and the metrics of `ppo.update`, means over the steps.
  """
  sample_key, order_key = jax.random.split(key)
  batch = sample(state, game, observations, sample_key, apply_fn=apply_fn, config=config)
  rounds = -(-config.num_steps * config.batch_size // config.num_episodes)
  orders = jax.vmap(lambda key: jax.random.permutation(key, config.num_episodes))(
    jax.random.split(order_key, rounds)
  )

  def step(state: ppo.State, rows: jax.Array) -> tuple[ppo.State, ppo.Metrics]:
    part = jax.tree.map(lambda leaf: leaf[rows], batch)
    return ppo.update(state, part, None, apply_fn=apply_fn, optimizer=optimizer, config=config)

  rows = orders.reshape(-1, config.batch_size)[: config.num_steps]
  state, metrics = jax.lax.scan(step, state, rows)
  played = jnp.sum(batch.mask, dtype=jnp.int32)
  return state._replace(env_steps=state.env_steps + played), jax.tree.map(jnp.mean, metrics)


@functools.partial(jax.jit, static_argnames="apply_fn")
def sample(
  state: ppo.State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: ppo.Networks,
  config: ppo.Config,
) -> ppo.Batch:
  """Returns the episodes of an epoch, in which the policy plays against itself.

  The networks are evaluated once at all information states, so that play is only look-ups.

  Args:
    state: its networks play.
    game: the game.
    observations: `[H, n, ...]` each player's observation at each history, such as
      `games.information_state_tensors`.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters.
  """
  seen = games.state_observations(game, observations)
  policy = current_policy(state.params, game, observations, apply_fn=apply_fn)
  values = apply_fn.values(state.params.values, seen)[:, 0]

  def step(nodes: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    players, states = game.players[nodes], jnp.maximum(game.info_states[nodes], 0)
    following, actions = rollouts.advance(game, nodes, policy[states], key)
    return following, (states, actions, players)

  keys = jax.random.split(key, max(len(game.layout.levels) - 1, 1))
  last, path = jax.lax.scan(step, jnp.zeros(config.num_episodes, jnp.int32), keys)
  states, actions, players = (x.T for x in path)
  mask = players >= 0  # moves of chance and steps after the end stay in the batch, masked out
  movers = jnp.maximum(players, 0)
  found = ppo.advantages(
    values[states], movers, mask, game.utilities[last], trace_decay=config.trace_decay
  )
  return ppo.Batch(
    observations=seen[states],
    legal=game.legal[states],
    actions=jnp.where(mask, actions, 0),  # chance has its own action numbers
    mask=mask,
    policies=policy[states],
    advantages=found,
    returns=found + values[states],
  )


def current_policy(
  params: ppo.Params, game: games.Game, observations: jax.Array, *, apply_fn: ppo.Networks
) -> jax.Array:
  """Returns the policy `[S, A]` at all information states, the one that plays and is evaluated.

  Args:
    params: of both networks.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    apply_fn: the networks.
  """
  seen = games.state_observations(game, observations)
  return policy_arrays.softmax(apply_fn.policy(params.policy, seen), game.legal)
