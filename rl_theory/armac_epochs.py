"""An epoch of ARMAC: play, learn the critic, keep it, learn the actor, keep it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rl_theory import armac, armac_play, games
from sharding import checks


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def epoch(
  state: armac.State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: armac.Networks,
  optimizer: optax.GradientTransformation,
  config: armac.Config,
) -> tuple[armac.State, armac.Metrics]:
  """Returns the state after an epoch on a compiled game.

  Args:
    state: not donated.
    game: the game.
    observations: `[H, n, ...]` as in `armac_play.sample`.
    key: typed PRNG key.
    apply_fn: the networks.
    optimizer: as in `armac.update_critic`.
    config: hyper-parameters.

  Returns:
    The new state and metrics, each a mean over optimisation steps: all of `armac.update_actor` and
    the critic's `armac/critic_loss`.
  """
  sample_key, learn_key = jax.random.split(key)
  batch = armac_play.sample(state, game, observations, sample_key, apply_fn=apply_fn, config=config)
  return learn(state, batch, learn_key, apply_fn=apply_fn, optimizer=optimizer, config=config)


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def learn(
  state: armac.State,
  batch: armac.Batch,
  key: Any,
  *,
  apply_fn: armac.Networks,
  optimizer: optax.GradientTransformation,
  config: armac.Config,
) -> tuple[armac.State, armac.Metrics]:
  """Returns the state after learning from an epoch's episodes, wherever they were played.

  Args:
    state: not donated.
    batch: `config.num_episodes` episodes without regrets.
    key: typed PRNG key, for the order of the episodes.
    apply_fn: the networks.
    optimizer: as in `armac.update_critic`.
    config: hyper-parameters.

  Returns:
    As `epoch`.
  """
  _check_capacity(state, config)
  critic_key, actor_key = jax.random.split(key)
  bound = {"apply_fn": apply_fn, "optimizer": optimizer, "config": config}
  state, critic_metrics = _step_through(
    armac.update_critic, state, batch, critic_key, num_steps=config.num_critic_steps, **bound
  )
  state = armac_play.keep_critic(state)
  batch = add_regrets(state, batch, apply_fn=apply_fn, config=config)
  state, metrics = _step_through(
    armac.update_actor, state, batch, actor_key, num_steps=config.num_actor_steps, **bound
  )
  played = jnp.sum(batch.mask, dtype=jnp.int32)
  state = armac_play.next_epoch(state._replace(env_steps=state.env_steps + played))
  return state, metrics | {"armac/critic_loss": critic_metrics["armac/critic_loss"]}


@functools.partial(jax.jit, static_argnames="apply_fn")
def add_regrets(
  state: armac.State, batch: armac.Batch, *, apply_fn: armac.Networks, config: armac.Config
) -> armac.Batch:
  """Returns the batch with the advantages of each pi^j, from the critic that was kept beside it."""
  groups = config.num_groups
  observations = batch.observations
  grouped = observations.reshape(groups, -1, *observations.shape[2:])
  slots = batch.slots[:: len(batch.slots) // groups]
  critics = armac_play.networks_at(state.past.critic, slots)
  values = jax.vmap(apply_fn.critic)(critics, grouped)
  values = values.reshape(-1, *values.shape[2:])
  own = armac.of_mover(values, batch.players.reshape(-1)).reshape(batch.legal.shape)
  baseline = jnp.sum(batch.past_policies * own, axis=-1, keepdims=True)
  return batch._replace(regrets=jnp.where(batch.legal, own - baseline, 0))


def _step_through(
  update: Callable[..., Any],
  state: armac.State,
  batch: armac.Batch,
  key: Any,
  *,
  num_steps: int,
  config: armac.Config,
  **bound: Any,
) -> tuple[armac.State, armac.Metrics]:
  """Returns the state after steps over the episodes, in a new random order each time around."""
  rounds = -(-num_steps * config.batch_size // config.num_episodes)
  orders = jax.vmap(lambda key: jax.random.permutation(key, config.num_episodes))(
    jax.random.split(key, rounds)
  )
  rows = orders.reshape(-1, config.batch_size)[:num_steps]

  def step(state: armac.State, rows: jax.Array) -> tuple[armac.State, armac.Metrics]:
    part = jax.tree.map(lambda leaf: leaf[rows], batch)
    return update(state, part, key, config=config, **bound)

  state, metrics = jax.lax.scan(step, state, rows)
  return state, jax.tree.map(jnp.mean, metrics)


def _check_capacity(state: armac.State, config: armac.Config) -> None:
  checks.given(config)
  held = armac_play.capacity(state)
  if held != config.capacity:
    raise ValueError(
      f"config.capacity must be the one that init got, {held} past networks, got {config.capacity}"
    )
