"""An epoch of NFSP: play episodes, store them in the buffers, and do the updates that are due."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl_theory import buffers, games, policy_arrays, rollouts
from rl_theory.baselines import nfsp
from sharding import checks

_METRICS = ("loss", "grad_norm", "nfsp/best_response_loss", "nfsp/average_policy_loss")


class Episodes(NamedTuple):
  """The episodes of an epoch, seen by each player.

  Attributes:
    transitions: leaves `[n, B, T]`.
    mask: `[n, B, T]` bool, true at the player's decisions.
    by_best_response: `[n, B]` bool, whether the player played its best response in the episode.
  """

  transitions: nfsp.Transitions
  mask: jax.Array
  by_best_response: jax.Array


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def epoch(
  state: nfsp.State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: nfsp.Networks,
  optimizer: optax.GradientTransformation,
  config: nfsp.Config,
) -> tuple[nfsp.State, nfsp.Metrics]:
  """Returns the state after an epoch on a compiled game.

  Args:
    state: not donated; run many epochs as one `jax.lax.scan`.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    key: typed PRNG key.
    apply_fn: the networks.
    optimizer: as in `nfsp.update`.
    config: hyper-parameters.

  Returns:
    The new state and the metrics of `nfsp.update`, means over the updates; 0 if there were none.

  Raises:
    ValueError: if the number of players or the capacities of the state are not those of the game
      and the config.
  """
  _check_state(state, game, config)
  sample_key, remember_key, draw_key = jax.random.split(key, 3)
  episodes = sample(state, game, observations, sample_key, apply_fn=apply_fn, config=config)
  before, state = state.env_steps, remember(state, episodes, remember_key)
  due = state.env_steps // config.learn_every - before // config.learn_every
  held = jnp.minimum(jnp.min(state.replay.seen), jnp.min(state.reservoir.seen))
  due = jnp.where(held >= config.learning_starts, due, 0)
  full, seen = state, games.state_observations(game, observations)

  def learn(index: jax.Array, carry: tuple[nfsp.State, nfsp.Metrics]) -> Any:
    state, sums = carry
    step_key = jax.random.fold_in(draw_key, index)
    batch = draw(full, game, seen, step_key, batch_size=config.batch_size)
    state, metrics = nfsp.update(
      state, batch, None, apply_fn=apply_fn, optimizer=optimizer, config=config
    )
    return state, jax.tree.map(jnp.add, sums, metrics)

  # Without the buffers: under `vmap` a loop whose lengths differ copies all that it carries.
  start = state._replace(replay=(), reservoir=()), {name: jnp.zeros(()) for name in _METRICS}
  state, sums = jax.lax.fori_loop(0, due, learn, start)
  metrics = {name: value / jnp.maximum(due, 1) for name, value in sums.items()}
  return state._replace(replay=full.replay, reservoir=full.reservoir), metrics


def _check_state(state: nfsp.State, game: games.Game, config: nfsp.Config) -> None:
  checks.given(config)
  found = (*state.replay.items.states.shape, state.reservoir.items.states.shape[1])
  expected = (game.num_players, config.replay_capacity, config.reservoir_capacity)
  if found != expected:
    raise ValueError(
      f"the state has {found[0]} players with capacities of {found[1]} and {found[2]}, but the "
      f"game has {expected[0]} and config asks for {expected[1]} and {expected[2]}: give init the "
      "parameters of as many players as the game has, and epoch the same config as init"
    )


# --- play ---


@functools.partial(jax.jit, static_argnames="apply_fn")
def sample(
  state: nfsp.State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: nfsp.Networks,
  config: nfsp.Config,
) -> Episodes:
  """Returns the episodes of an epoch, played on the device.

  Args:
    state: its networks play.
    game: the game.
    observations: `[H, n, ...]` each player's observation at each history, such as
      `games.information_state_tensors`.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters.
  """
  mode_key, play_key = jax.random.split(key)
  values = _at_states(apply_fn.values, state.params.values, game, observations)
  responses = nfsp.best_response(values, game.legal, nfsp.epsilon(state.env_steps, config))
  averages = average_policy(state.params, game, observations, apply_fn=apply_fn)
  shape = (game.num_players, config.num_episodes)
  by_best_response = jax.random.bernoulli(mode_key, config.anticipatory, shape)

  def step(nodes: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    players, states = game.players[nodes], jnp.maximum(game.info_states[nodes], 0)
    responds = by_best_response[jnp.maximum(players, 0), jnp.arange(config.num_episodes)]
    policies = jnp.where(responds[:, None], responses[states], averages[states])
    following, actions = rollouts.advance(game, nodes, policies, key)
    return following, (states, actions, players)

  keys = jax.random.split(play_key, max(len(game.layout.levels) - 1, 1))
  last, path = jax.lax.scan(step, jnp.zeros(config.num_episodes, jnp.int32), keys)
  states, actions, players = (x.T for x in path)  # [B, T]
  mask = players == jnp.arange(game.num_players)[:, None, None]
  next_states = _next_states(states, mask)
  rewards = jnp.where(next_states < 0, game.utilities[last].T[..., None], 0)
  transitions = nfsp.Transitions(
    jnp.broadcast_to(states, mask.shape),
    jnp.where(mask, actions, 0),  # chance has its own action numbers
    rewards.astype(jnp.float32),
    next_states,
  )
  return Episodes(transitions, mask, by_best_response)


def _next_states(states: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns each player's next state after each step, `[n, B, T]`, -1 if it decides no more.

  Args:
    states: `[B, T]` information states of the movers.
    mask: `[n, B, T]` bool, true at the player's decisions.
  """
  num_steps = states.shape[1]
  places = jnp.where(mask, jnp.arange(num_steps), num_steps)
  # The first decision from t + 1 on; T if there is none.
  following = jax.lax.cummin(places, axis=2, reverse=True)[..., 1:]
  following = jnp.pad(following, ((0, 0), (0, 0), (0, 1)), constant_values=num_steps)
  padded = jnp.pad(states, ((0, 0), (0, 1)), constant_values=-1)
  return jnp.take_along_axis(jnp.broadcast_to(padded, (len(mask), *padded.shape)), following, -1)


def average_policy(
  params: nfsp.Params, game: games.Game, observations: jax.Array, *, apply_fn: nfsp.Networks
) -> jax.Array:
  """Returns the average policy `[S, A]` at all information states, the one to evaluate.

  Args:
    params: of all players' networks.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    apply_fn: the networks.
  """
  logits = _at_states(apply_fn.policy, params.policy, game, observations)
  return policy_arrays.softmax(logits, game.legal)


def _at_states(network: Any, params: Any, game: games.Game, observations: jax.Array) -> jax.Array:
  """Returns each player's network at its information states, `[S, A]`."""
  seen = games.state_observations(game, observations)
  rows = []
  for player in range(game.num_players):
    own = jax.tree.map(lambda leaf, k=player: leaf[k], params)
    rows.append(network(own, seen[game.layout.player_slice(player)]))
  return jnp.concatenate(rows)


# --- buffers ---


@jax.jit
def remember(state: nfsp.State, episodes: Episodes, key: Any) -> nfsp.State:
  """Returns the state with the episodes in its buffers and their decisions counted."""
  transitions, mask = jax.tree.map(
    lambda x: x.reshape(len(x), -1), (episodes.transitions, episodes.mask)
  )
  imitated = (episodes.mask & episodes.by_best_response[..., None]).reshape(mask.shape)
  keys = jax.random.split(key, len(mask))
  choices = nfsp.Choices(transitions.states, transitions.actions)
  return state._replace(
    env_steps=state.env_steps + jnp.sum(mask, dtype=jnp.int32),
    replay=jax.vmap(buffers.add_to_replay)(state.replay, transitions, mask),
    reservoir=jax.vmap(buffers.add_to_reservoir)(state.reservoir, choices, imitated, keys),
  )


@functools.partial(jax.jit, static_argnames="batch_size")
def draw(
  state: nfsp.State, game: games.Game, seen: jax.Array, key: Any, *, batch_size: int
) -> nfsp.Batch:
  """Returns a batch drawn from the buffers, uniformly and with replacement.

  Args:
    state: its buffers must not be empty.
    game: the game.
    seen: `[S, ...]` from `games.state_observations`.
    key: typed PRNG key.
    batch_size: B, from each player and buffer.
  """
  replay_key, reservoir_key = jax.random.split(key)
  replayed = buffers.draw(state.replay, replay_key, batch_size)
  imitated = buffers.draw(state.reservoir, reservoir_key, batch_size)
  next_states = jnp.maximum(replayed.next_states, 0)
  return nfsp.Batch(
    observations=seen[replayed.states],
    actions=replayed.actions,
    rewards=replayed.rewards,
    next_observations=seen[next_states],
    next_legal=game.legal[next_states] & (replayed.next_states >= 0)[..., None],
    imitated_observations=seen[imitated.states],
    imitated_legal=game.legal[imitated.states],
    imitated_actions=imitated.actions,
  )
