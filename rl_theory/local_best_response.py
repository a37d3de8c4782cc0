"""Local best response: a lower bound on what a best response wins, in poker games of any size.

Where no exact best response can be computed, an exploiter plays many hands against the policy. What
it wins on average is at most what a best response would win.

The exploiter knows the opponent's policy and keeps a belief: histories that look the same to it,
with hidden cards of the opponent drawn at random, weighted by the probability of the opponent's
actions. When it moves, it compares its actions as if the opponent then either folds, as often as
its policy says, or calls, and both check and call to the end.

Reference: Lisy and Bowling 2017, https://arxiv.org/abs/1612.07547.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rl_theory import openspiel
from sharding import checks

Policy = Callable[[np.ndarray, np.ndarray], Any]


class Bound(NamedTuple):
  """What the local best response wins.

  Attributes:
    values: `[2]` the exploiter's mean utility in each seat.
    standard_errors: `[2]` of these means.
  """

  values: np.ndarray
  standard_errors: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Exploiter:
  """The settings of one exploiter; see `evaluate`."""

  seat: int
  policy: Policy
  fold_action: int
  call_action: int
  num_particles: int


def evaluate(
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
    game_or_string: OpenSpiel's string or game, of any size. It must be like poker: chance deals
      cards, and one action calls or checks.
    policy: `policy(observations [B, O], legal [B, A]) -> [B, A]` probabilities, from information
      state tensors.
    num_hands: played in each seat, at least 2.
    num_particles: histories in the exploiter's belief; fewer make it weaker, never too strong.
    fold_action, call_action: OpenSpiel's numbers of these actions.
    seed: for the deals, the belief and the policy's actions.

  Returns:
    Mean utilities. In a zero-sum game the sum of `values` is at most the policy's NashConv, up to
    sampling error.

  Raises:
    ValueError: if the game does not have two players, or a count is too small.
  """
  game = openspiel.load_game(game_or_string)
  if game.num_players() != 2:
    raise ValueError(f"game must have two players, got {game.num_players()} in {game}")
  checks.count("num_hands", num_hands, least=2)  # one hand has no standard error
  checks.count("num_particles", num_particles)
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
  moves: list[tuple[int, bool]] = []  # an action, and whether it is hidden from the exploiter
  while not real.is_terminal():
    if real.is_chance_node():
      believed, weights = _deal(real, believed, weights, moves, seat, rng)
      continue
    if real.current_player() == seat:
      action = _choose(real, believed, weights, exploiter, rng)
    else:
      probs = _probs(exploiter.policy, [real, *believed])
      action = openspiel.draw(rng, probs[0])
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
  """Plays one move of chance in the real game and in the belief; returns particles and weights.

  If the exploiter sees the move, all particles make it; a hidden move is drawn for each particle. A
  particle that holds the card now seen is impossible and is replaced by a copy of another one. If
  all are impossible, the hidden cards are dealt again and the opponent's actions are forgotten. The
  true hidden cards must not enter the belief, because then the value would not be a lower bound.
  """
  actions, probs = zip(*real.chance_outcomes(), strict=True)
  action = actions[openspiel.draw(rng, np.array(probs))]
  other = next((a for a in actions if a != action), action)
  hidden = _view(real.child(other), seat) == _view(real.child(action), seat)
  real.apply_action(action)
  moves.append((action, hidden))
  following, kept = [], []
  for state, weight in zip(believed, weights, strict=True):
    own, chances = zip(*state.chance_outcomes(), strict=True)
    if not hidden and action not in own:
      continue
    state.apply_action(own[openspiel.draw(rng, np.array(chances))] if hidden else action)
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
  """Returns a history with the moves that the exploiter has seen and new hidden ones."""
  while True:  # until no hidden card is seen later, which takes few attempts
    state = game.new_initial_state()
    for action, hidden in moves:
      if hidden:
        actions, probs = zip(*state.chance_outcomes(), strict=True)
        action = actions[openspiel.draw(rng, np.array(probs))]
      elif action not in state.legal_actions():
        break
      state.apply_action(action)
    else:
      return state


def _view(state: Any, seat: int) -> str:
  return str(state.information_state_string(seat))


def _probs(policy: Policy, states: list[Any]) -> np.ndarray:
  seen = np.array(
    [openspiel.information_state_tensor(state, state.current_player()) for state in states]
  )
  legal = np.zeros((len(states), states[0].num_distinct_actions()), bool)
  for row, state in zip(legal, states, strict=True):
    row[state.legal_actions()] = True
  return np.asarray(policy(seen.astype(np.float32), legal), float)


def _choose(
  real: Any, believed: list[Any], weights: np.ndarray, exploiter: _Exploiter, rng: Any
) -> int:
  """Returns the action with the largest one-step value."""
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
      openspiel.advance_chance(state, rng)
    elif exploiter.call_action in state.legal_actions():
      state.apply_action(exploiter.call_action)
    else:
      state.apply_action(state.legal_actions()[0])
  return float(state.returns()[exploiter.seat])
