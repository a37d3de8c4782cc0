"""Games too large for arrays: episodes played in OpenSpiel itself, and a local best response.

`play_episodes` gives the `armac.Batch` that `armac.sample` gives for a compiled game, so the same
`armac.learn` follows. `local_best_response` measures a policy where no exact best response can be
computed: it plays against it, and what it wins on average is a lower bound on what a best response
would win. Lisy and Bowling 2017, https://arxiv.org/abs/1612.07547.

The exploiter knows the opponent's policy and keeps a belief: histories that look the same to it,
with the opponent's hidden cards drawn anew and weighted with the probability of what the opponent
did. At its turn it compares its actions as if, after this one, the opponent either folds at once,
as often as its policy says, or calls, and both then check and call to the end.

No-limit hold'em from end to end, with networks for its 169 numbers and 4 actions:

  actor, critic = networks.Actor(4), networks.Critic(2, 4)
  params = armac.Params(
    actor.init(key, jnp.zeros((1, 169))), critic.init(key, jnp.zeros((1, 2, 169)))
  )
  config, optimizer = armac.Config(capacity=64), optax.adam(1e-3)
  bound = {"apply_fn": armac.Networks(actor.apply, critic.apply), "config": config}
  state = armac.init(params, optimizer=optimizer, config=config)
  for key in jax.random.split(key, num_epochs):
    batch = play_episodes(NO_LIMIT_HOLDEM, state, key, max_decisions=24, **bound)
    state, metrics = armac.learn(state, batch, key, optimizer=optimizer, **bound)
  policy = jax.jit(
    lambda seen, legal: armac.mean_policy(actor.apply(state.params.actor, seen)[1], legal)
  )
  local_best_response(NO_LIMIT_HOLDEM, policy, num_hands=1000)  # chips a hand, 100 a big blind
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import armac, openspiel

Policy = Callable[[np.ndarray, np.ndarray], Any]
# Fold, call, pot or all-in, with stacks of 20 big blinds.
NO_LIMIT_HOLDEM = (
  "universal_poker(betting=nolimit,numPlayers=2,numRounds=4,blind=100 50,firstPlayer=2 1 1 1,"
  "numSuits=4,numRanks=13,numHoleCards=2,numBoardCards=0 3 1 1,stack=2000 2000,"
  "bettingAbstraction=fcpa)"
)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _act(
  state: armac.State, cast: armac.Cast, seen: Any, movers: Any, legal: Any, *, apply_fn, config
) -> tuple[jax.Array, jax.Array]:
  shape = cast.learners.shape
  seen, movers, legal = (x.reshape(*shape, *x.shape[1:]) for x in (seen, movers, legal))
  found = armac.acting_policies(state, cast, seen, movers, legal, apply_fn=apply_fn, config=config)
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

  All episodes go on together, so that the networks see one batch a move. The networks' observations
  are OpenSpiel's information state tensors.

  Args:
    game_or_string: of OpenSpiel, of any size.
    state: whose past plays.
    key: typed PRNG key.
    apply_fn: the networks.
    config: hyper-parameters; `num_episodes` are played.
    max_decisions: T, the most decisions an episode may have.

  Raises:
    ValueError: if the game has no such tensors, or an episode is longer.
  """
  game = openspiel.load_game(game_or_string)
  if not game.get_type().provides_information_state_tensor:
    raise ValueError(f"game {game} has no information state tensors for the networks to read")
  num_players, num_actions = game.num_players(), game.num_distinct_actions()
  shape, count = (config.num_episodes, max_decisions), config.num_episodes
  cast = armac.draw_cast(state, key, num_players=num_players, config=config)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
  batch = armac.Batch(
    observations=np.zeros((*shape, num_players, game.information_state_tensor_size()), np.float32),
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
  histories = [_advance_chance(game.new_initial_state(), rng) for _ in range(count)]
  for step in range(max_decisions + 1):
    going = [k for k, history in enumerate(histories) if not history.is_terminal()]
    if not going:
      break
    if step == max_decisions:
      raise ValueError(
        f"max_decisions={max_decisions}, but an episode of {game} goes on: give more, at most "
        f"{game.max_game_length()}"
      )
    seen = np.zeros((count, game.information_state_tensor_size()), np.float32)
    for k in going:
      history, mover = histories[k], histories[k].current_player()
      for player in range(num_players):
        batch.observations[k, step, player] = history.information_state_tensor(player)
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
      batch.actions[k, step] = action = _draw(rng, played[k])
      histories[k].apply_action(action)
      _advance_chance(histories[k], rng)
  batch.utilities[:] = [history.returns() for history in histories]
  own = np.take_along_axis(batch.observations, batch.players[..., None, None], 2)[:, :, 0]
  policies = armac.current_policies(
    state,
    jnp.asarray(own.reshape(-1, own.shape[-1])),
    jnp.asarray(batch.legal),
    apply_fn=apply_fn,
  )
  return jax.tree.map(jnp.asarray, batch._replace(policies=policies))


def _advance_chance(state: Any, rng: np.random.Generator) -> Any:
  """Plays chance's moves in place, until a player moves or the game ends."""
  while state.is_chance_node():
    actions, probs = zip(*state.chance_outcomes(), strict=True)
    state.apply_action(actions[_draw(rng, np.array(probs))])
  return state


def _draw(rng: np.random.Generator, probs: np.ndarray) -> int:
  sums = np.cumsum(probs, dtype=float)
  return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


# --- local best response ---


class Bound(NamedTuple):
  """What local best responses win.

  Attributes:
    values: `[n]` mean utility of the exploiter in each seat.
    standard_errors: `[n]` of these means.
  """

  values: np.ndarray
  standard_errors: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Exploiter:
  """What one exploiter goes by; see `local_best_response`."""

  seat: int
  policy: Policy
  fold_action: int
  call_action: int
  num_particles: int


def local_best_response(
  game_or_string: Any,
  policy: Policy,
  *,
  num_hands: int,
  num_particles: int = 50,
  fold_action: int = 0,
  call_action: int = 1,
  seed: int = 0,
) -> Bound:
  """Returns what a local best response wins against a policy of a two-player poker game.

  Args:
    game_or_string: of OpenSpiel; of any size, but of poker's kind: chance deals, and one action
      calls or checks.
    policy: `policy(observations [B, O], legal [B, A]) -> [B, A]` probabilities, from information
      state tensors.
    num_hands: played in each seat.
    num_particles: histories in the exploiter's belief; fewer make it weaker, never too strong.
    fold_action, call_action: OpenSpiel's numbers of these actions.
    seed: of what chance deals, what is believed and what the policy draws.

  Returns:
    Utilities of the game: the sum of `values`, less sampling error, is at most the NashConv of a
    zero-sum game.

  Raises:
    ValueError: if the game has not two players, or a count is not positive.
  """
  game = openspiel.load_game(game_or_string)
  if game.num_players() != 2:
    raise ValueError(f"game must have two players, got {game.num_players()} in {game}")
  # Two hands: one has no standard error.
  for name, value, least in (("num_hands", num_hands, 2), ("num_particles", num_particles, 1)):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
  rng = np.random.default_rng(seed)
  results = np.zeros((2, num_hands))
  for seat in range(2):
    exploiter = _Exploiter(seat, policy, fold_action, call_action, num_particles)
    for hand in range(num_hands):
      results[seat, hand] = _play_hand(game, exploiter, rng)
  return Bound(results.mean(1), results.std(1, ddof=1) / num_hands**0.5)


def _play_hand(game: Any, exploiter: _Exploiter, rng: np.random.Generator) -> float:
  real, seat = game.new_initial_state(), exploiter.seat
  believed = [game.new_initial_state() for _ in range(exploiter.num_particles)]
  weights = np.ones(len(believed))
  moves: list[tuple[int, bool]] = []  # and whether the exploiter cannot see it
  while not real.is_terminal():
    if real.is_chance_node():
      believed, weights = _deal(real, believed, weights, moves, seat, rng)
      continue
    if real.current_player() == seat:
      action = _choose(real, believed, weights, exploiter, rng)
    else:
      probs = _probs(exploiter.policy, [real, *believed])
      action = _draw(rng, probs[0])
      weights = weights * probs[1:, action]
    moves.append((action, False))
    for state in (real, *believed):
      state.apply_action(action)
  return float(real.returns()[seat])


def _deal(
  real: Any,
  believed: list[Any],
  weights: np.ndarray,
  moves: list[tuple[int, bool]],
  seat: int,
  rng: np.random.Generator,
) -> tuple[list[Any], np.ndarray]:
  """Plays one move of chance: what the exploiter sees of it holds in its belief, the rest is drawn.

  A particle that cannot follow, since it holds the card that is now seen, gives way to a copy of
  another one. Where none can, the hidden cards are dealt anew, and what the opponent did is
  forgotten: the truth must not enter the belief, or the bound would be none.
  """
  actions, probs = zip(*real.chance_outcomes(), strict=True)
  action = actions[_draw(rng, np.array(probs))]
  other = next((a for a in actions if a != action), action)
  hidden = _view(real.child(other), seat) == _view(real.child(action), seat)
  real.apply_action(action)
  moves.append((action, hidden))
  following, kept = [], []
  for state, weight in zip(believed, weights, strict=True):
    own, chances = zip(*state.chance_outcomes(), strict=True)
    if not hidden and action not in own:
      continue
    state.apply_action(own[_draw(rng, np.array(chances))] if hidden else action)
    following.append(state)
    kept.append(weight)
  if not following:
    game = real.get_game()
    return [_redeal(game, moves, rng) for _ in believed], np.ones(len(believed))
  missing = len(believed) - len(following)
  copies = rng.integers(len(following), size=missing)
  following += [following[k].clone() for k in copies]
  return following, np.array(kept + [kept[k] for k in copies])


def _redeal(game: Any, moves: list[tuple[int, bool]], rng: np.random.Generator) -> Any:
  """Returns a history with the moves that the exploiter has seen, and other hidden ones."""
  while True:  # until no hidden card is one that is seen later; few are
    state = game.new_initial_state()
    for action, hidden in moves:
      if hidden:
        actions, probs = zip(*state.chance_outcomes(), strict=True)
        action = actions[_draw(rng, np.array(probs))]
      elif action not in state.legal_actions():
        break
      state.apply_action(action)
    else:
      return state


def _view(state: Any, seat: int) -> str:
  return str(state.information_state_string(seat))


def _probs(policy: Policy, states: list[Any]) -> np.ndarray:
  seen = np.array([state.information_state_tensor(state.current_player()) for state in states])
  legal = np.zeros((len(states), states[0].num_distinct_actions()), bool)
  for row, state in zip(legal, states, strict=True):
    row[state.legal_actions()] = True
  return np.asarray(policy(seen.astype(np.float32), legal), float)


def _choose(
  real: Any, believed: list[Any], weights: np.ndarray, exploiter: _Exploiter, rng: Any
) -> int:
  """Returns the action of the largest one-step value."""
  total = weights.sum()
  weights = weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
  values = {}
  for action in real.legal_actions():
    after = [state.child(action) for state in believed]
    results = np.zeros(len(after))
    answered = [k for k, s in enumerate(after) if s.current_player() == 1 - exploiter.seat]
    folds = np.zeros(len(after))
    if answered and exploiter.fold_action in after[answered[0]].legal_actions():
      probs = _probs(exploiter.policy, [after[k] for k in answered])
      folds[answered] = probs[:, exploiter.fold_action]
    for k, state in enumerate(after):
      gained = 0.0
      if folds[k] > 0:
        gained = folds[k] * state.child(exploiter.fold_action).returns()[exploiter.seat]
      results[k] = gained + (1 - folds[k]) * _call_to_the_end(state, exploiter, rng)
    values[action] = float(weights @ results)
  return max(values, key=lambda action: values[action])


def _call_to_the_end(state: Any, exploiter: _Exploiter, rng: np.random.Generator) -> float:
  while not state.is_terminal():
    if state.is_chance_node():
      _advance_chance(state, rng)
    elif exploiter.call_action in state.legal_actions():
      state.apply_action(exploiter.call_action)
    else:
      state.apply_action(state.legal_actions()[0])
  return float(state.returns()[exploiter.seat])
