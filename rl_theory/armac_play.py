"""Who plays in an epoch of ARMAC, and the episodes of a compiled game.

The state keeps the actors and critics of past epochs, each pair in one place ("slot") of
`State.past`. An epoch draws who plays each episode (`draw_cast`) and plays (`sample`; `large_games`
does the same in OpenSpiel). What the networks learn from the episodes is in `armac`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_theory import armac, games, policy_arrays, regret_matching, rollouts

# --- past networks ---


def capacity(state: armac.State) -> int:
  """Returns the number of past networks that the state has room for."""
  return len(jax.tree.leaves(state.past)[0])


def networks_at(past: Any, slots: jax.Array) -> Any:
  """Returns the parameters at some slots of `State.past.actor` or `State.past.critic`."""
  return jax.tree.map(lambda leaf: leaf[slots], past)


def keep_critic(state: armac.State) -> armac.State:
  """Returns the state with its critic stored beside this epoch's policy, which it evaluates."""
  critic = _put(state.past.critic, _slot(state), state.params.critic)
  return state._replace(past=state.past._replace(critic=critic))


def next_epoch(state: armac.State) -> armac.State:
  """Returns the state of the next epoch, with its actor stored as the policy of that epoch."""
  state = state._replace(epoch=state.epoch + 1)
  actor = _put(state.past.actor, _slot(state), state.params.actor)
  return state._replace(past=state.past._replace(actor=actor))


def _slot(state: armac.State) -> jax.Array:
  """Returns the place of the current epoch."""
  return state.epoch % capacity(state)


def _put(tree: Any, slot: jax.Array, value: Any) -> Any:
  return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), tree, value)


# --- who plays ---


class Cast(NamedTuple):
  """Who plays the episodes of an epoch, in G groups of E episodes.

  Attributes:
    past_slots: `[G]` int, the slot of the others' policy pi^j.
    base_slots: `[G]` int, the slot of the actor that guides the explorer.
    candidates: `[G, E]` int, the explorer's policy: 0 uniform, 1 regret matching, 2 mean policy.
    learners: `[G, E]` int, the player i who explores.
  """

  past_slots: jax.Array
  base_slots: jax.Array
  candidates: jax.Array
  learners: jax.Array


def draw_cast(state: armac.State, key: Any, *, num_players: int, config: armac.Config) -> Cast:
  """Returns who plays the episodes of an epoch of a game with n players."""
  groups, size = config.num_groups, config.num_episodes // config.num_groups
  past_key, base_key, base_slot_key, candidate_key, learner_key, _ = jax.random.split(key, 6)
  slot = _slot(state)
  count = jnp.minimum(state.epoch + 1, capacity(state))  # policies that are kept, of epochs 0 to t
  # Stratified: the g-th of G draws is uniform in the g-th part, so a group's draw is uniform.
  strata = (jnp.arange(groups) + jax.random.uniform(past_key, (groups,))) / groups
  # The k-th oldest policy gets (k + 1)^(1 + p) - k^(1 + p) of count^(1 + p), about k^p.
  order = (count * strata ** (1 / (1 + config.recency))).astype(jnp.int32)
  past_slots = (slot - (count - 1 - jnp.minimum(order, count - 1))) % capacity(state)
  # The explorer's policy is drawn independently of j; otherwise it would not cancel.
  recent = jax.random.bernoulli(base_key, 0.5, (groups,))
  base_slots = jnp.where(recent, slot, jax.random.randint(base_slot_key, (groups,), 0, count))
  candidates = jax.random.randint(candidate_key, (groups, size), 0, 3)
  # Who explores in an episode must not depend on its stratum.
  learners = jax.random.randint(learner_key, (groups, size), 0, num_players)
  return Cast(past_slots, base_slots, candidates, learners)


# --- policies ---


def acting_policies(
  state: armac.State,
  cast: Cast,
  observations: jax.Array,
  movers: jax.Array,
  legal: jax.Array,
  *,
  apply_fn: armac.Networks,
  config: armac.Config,
) -> tuple[jax.Array, jax.Array]:
  """Returns the policy that acts at one decision of each episode, and pi^j there, `[G, E, A]` each.

  Args:
    state: its past networks play.
    cast: from `draw_cast`.
    observations: `[G, E, ...]` of the player who moves.
    movers: `[G, E]` int.
    legal: `[G, E, A]` bool.
    apply_fn: the networks.
    config: only `epsilon` is used.
  """
  past, base = (
    networks_at(state.past.actor, slots) for slots in (cast.past_slots, cast.base_slots)
  )
  act = jax.vmap(apply_fn.actor)
  past_policies = regret_matching.regret_matching(act(past, observations)[0], legal)
  regrets, logits = act(base, observations)
  explore = _behaviour(regrets, logits, legal, cast.candidates, config.epsilon)
  return jnp.where((movers == cast.learners)[..., None], explore, past_policies), past_policies


def _behaviour(
  regrets: jax.Array, logits: jax.Array, legal: jax.Array, candidates: jax.Array, epsilon: Any
) -> jax.Array:
  """Returns the explorer's policy for the number of its candidate, see `Cast`."""
  uniform = regret_matching.normalise(jnp.zeros(legal.shape, regrets.dtype), legal)
  matching = epsilon * uniform + (1 - epsilon) * regret_matching.regret_matching(regrets, legal)
  chosen = candidates[..., None]
  return jnp.where(
    chosen == 0,
    uniform,
    jnp.where(chosen == 1, matching, policy_arrays.softmax(logits, legal)),
  )


def current_policies(
  state: armac.State, observations: jax.Array, legal: jax.Array, *, apply_fn: armac.Networks
) -> jax.Array:
  """Returns pi^t `[..., A]`, from observations `[B, ...]` of the movers and `legal` `[..., A]`."""
  actor = networks_at(state.past.actor, _slot(state))
  regrets = apply_fn.actor(actor, observations)[0].reshape(legal.shape)
  return regret_matching.regret_matching(regrets, legal)


def mean_policy(
  params: armac.Params, game: games.Game, observations: jax.Array, *, apply_fn: armac.Networks
) -> jax.Array:
  """Returns the mean policy `[S, A]` at all information states, the one to evaluate.

  Args:
    params: of both networks.
    game: the game.
    observations: `[H, n, ...]` as in `sample`.
    apply_fn: the networks.
  """
  own = games.state_observations(game, observations)
  return policy_arrays.softmax(apply_fn.actor(params.actor, own)[1], game.legal)


# --- episodes ---


@functools.partial(jax.jit, static_argnames="apply_fn")
def sample(
  state: armac.State,
  game: games.Game,
  observations: jax.Array,
  key: Any,
  *,
  apply_fn: armac.Networks,
  config: armac.Config,
) -> armac.Batch:
  """Returns the episodes of an epoch, played on the device.

  Args:
    state: its past networks play. The slot of epoch t must hold the current actor, as after `init`
      and `next_epoch`.
    game: the game.
    observations: `[H, n, ...]` each player's observation at each history, such as
      `games.information_state_tensors`.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters.
  """
  cast = draw_cast(state, key, num_players=game.num_players, config=config)
  play_key = jax.random.split(key, 6)[5]

  def step(nodes: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    players = game.players[nodes]
    movers = jnp.maximum(players, 0)
    seen = jax.vmap(armac.of_mover)(observations[nodes], movers)
    legal = game.legal[jnp.maximum(game.info_states[nodes], 0)]
    policies, past_policies = acting_policies(
      state, cast, seen, movers, legal, apply_fn=apply_fn, config=config
    )
    following, actions = rollouts.advance(game, nodes, policies, key)
    return following, (nodes, actions, past_policies, players >= 0)

  keys = jax.random.split(play_key, max(len(game.layout.levels) - 1, 1))
  last, path = jax.lax.scan(step, jnp.zeros(cast.learners.shape, jnp.int32), keys)
  path = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(-1, len(keys), *x.shape[3:]), path)
  nodes, actions, past_policies, mask = decisions_first(path, game)
  info_states = jnp.maximum(game.info_states[nodes], 0)
  players, legal = jnp.maximum(game.players[nodes], 0), game.legal[info_states]
  flat = observations[nodes.reshape(-1)]
  own = armac.of_mover(flat, players.reshape(-1))
  return armac.Batch(
    observations=flat.reshape(*nodes.shape, *flat.shape[1:]),
    players=players,
    legal=legal,
    actions=jnp.where(mask, actions, 0),  # chance has its own action numbers
    mask=mask,
    learners=cast.learners.reshape(-1),
    slots=jnp.repeat(cast.past_slots, cast.learners.shape[1]),
    past_policies=past_policies,
    policies=current_policies(state, own, legal, apply_fn=apply_fn),
    utilities=game.utilities[last.reshape(-1)],
  )


def decisions_first(path: Any, game: games.Game) -> Any:
  """Returns the path `[B, depth, ...]` with its decisions first, cut to `[B, T, ...]`.

  The last leaf of the path says which steps are decisions. Chance moves and steps after the end
  come last. T is the largest number of decisions.
  """
  num_steps = min(path[-1].shape[1], sum(map(len, game.layout.state_levels)))
  order = jnp.argsort(~path[-1], axis=1, stable=True)[:, :num_steps]
  return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, order), path)
