"""ARMAC on games too large for arrays: episodes played in OpenSpiel itself.

`play_episodes` gives the same `armac.Batch` as `armac_play.sample` does for a compiled game, so
`armac_epochs.learn` can follow. `local_best_response` evaluates the result.

No-limit hold'em from end to end, with networks for its 169 numbers and 4 actions:

  actor, critic = actor_critic.Actor(4), actor_critic.Critic(2, 4)
  params = armac.Params(
    actor.init(key, jnp.zeros((1, 169))), critic.init(key, jnp.zeros((1, 2, 169)))
  )
  config, optimizer = armac.Config(capacity=64), optax.adam(1e-3)
  bound = {"apply_fn": armac.Networks(actor.apply, critic.apply), "config": config}
  state = armac.init(params, optimizer=optimizer, config=config)
  for key in jax.random.split(key, num_epochs):
    batch = play_episodes(NO_LIMIT_HOLDEM, state, key, max_decisions=24, **bound)
    state, metrics = armac_epochs.learn(state, batch, key, optimizer=optimizer, **bound)
  policy = jax.jit(
    lambda seen, legal: policy_arrays.softmax(actor.apply(state.params.actor, seen)[1], legal)
  )
  local_best_response.evaluate(NO_LIMIT_HOLDEM, policy, num_hands=1000)  # in chips; 100 a big blind
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import armac, armac_play, openspiel

# Fold, call, pot or all-in, with stacks of 20 big blinds.
NO_LIMIT_HOLDEM = (
  "universal_poker(betting=nolimit,numPlayers=2,numRounds=4,blind=100 50,firstPlayer=2 1 1 1,"
  "numSuits=4,numRanks=13,numHoleCards=2,numBoardCards=0 3 1 1,stack=2000 2000,"
  "bettingAbstraction=fcpa)"
)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _act(
  state: armac.State, cast: armac_play.Cast, seen: Any, movers: Any, legal: Any, *, apply_fn, config
) -> tuple[jax.Array, jax.Array]:
  shape = cast.learners.shape
  seen, movers, legal = (x.reshape(*shape, *x.shape[1:]) for x in (seen, movers, legal))
  found = armac_play.acting_policies(
    state, cast, seen, movers, legal, apply_fn=apply_fn, config=config
  )
  return tuple(x.reshape(-1, x.shape[-1]) for x in found)  # type: ignore[return-value]


def play_episodes(
  game_or_string: Any,
  state: armac.State,
  key: Any,
  *,
  apply_fn: armac.Networks,
  config: armac.Config,
  max_decisions: int,
) -> armac.Batch:
  """Returns the episodes of an epoch of ARMAC, played on the host.

  All episodes advance together, so each move is one batch for the networks. Their observations are
  those of `openspiel.information_state_tensor`.

  Args:
    game_or_string: OpenSpiel's string or game, of any size.
    state: its past networks play.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters; `num_episodes` are played.
    max_decisions: T, the largest number of decisions in an episode.

  Raises:
    ValueError: if the game has no such tensors, or an episode has more decisions.
  """
  game = openspiel.load_game(game_or_string)
  size = openspiel.tensor_size(game)
  num_players, num_actions = game.num_players(), game.num_distinct_actions()
  shape, count = (config.num_episodes, max_decisions), config.num_episodes
  cast = armac_play.draw_cast(state, key, num_players=num_players, config=config)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
  batch = armac.Batch(
    observations=np.zeros((*shape, num_players, size), np.float32),
    players=np.zeros(shape, np.int32),
    legal=np.zeros((*shape, num_actions), bool),
    actions=np.zeros(shape, np.int32),
    mask=np.zeros(shape, bool),
    learners=np.asarray(cast.learners).reshape(-1),
    slots=np.repeat(np.asarray(cast.past_slots), cast.learners.shape[1]),
    past_policies=np.zeros((*shape, num_actions), np.float32),
    policies=(),
    utilities=np.zeros((count, num_players), np.float32),
  )
  histories = [openspiel.advance_chance(game.new_initial_state(), rng) for _ in range(count)]
  for step in range(max_decisions + 1):
    going = [k for k, history in enumerate(histories) if not history.is_terminal()]
    if not going:
      break
    if step == max_decisions:
      raise ValueError(
        f"max_decisions={max_decisions} is too small for an episode of {game}: "
        f"{game.max_game_length()} is enough"
      )
    seen = np.zeros((count, size), np.float32)
    for k in going:
      history, mover = histories[k], histories[k].current_player()
      for player in range(num_players):
        batch.observations[k, step, player] = openspiel.information_state_tensor(history, player)
      seen[k] = batch.observations[k, step, mover]
      batch.players[k, step], batch.mask[k, step] = mover, True
      batch.legal[k, step, history.legal_actions()] = True
    played, past_policies = map(
      np.asarray,
      _act(
        state, cast, seen, batch.players[:, step], batch.legal[:, step], apply_fn=apply_fn,
        config=config,
      ),
    )  # fmt: skip
    batch.past_policies[:, step] = past_policies
    for k in going:
      batch.actions[k, step] = action = openspiel.draw(rng, played[k])
      histories[k].apply_action(action)
      openspiel.advance_chance(histories[k], rng)
  batch.utilities[:] = [history.returns() for history in histories]
  own = np.take_along_axis(batch.observations, batch.players[..., None, None], 2)[:, :, 0]
  policies = armac_play.current_policies(
    state,
    jnp.asarray(own.reshape(-1, own.shape[-1])),
    jnp.asarray(batch.legal),
    apply_fn=apply_fn,
  )
  return jax.tree.map(jnp.asarray, batch._replace(policies=policies))
