"""Compiles OpenSpiel's games of one player into decision processes.

Histories with the same observation at the same time become one state. Up to eight of them are
followed, and the game is refused if two go on in different ways: then the observation hides
something that matters. If only the time matters, as in a game that stops after a number of moves,
the time becomes part of the state and of the observation.
"""

import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rl_theory import decision_processes, openspiel
from sharding import checks

_NUM_COPIES = 8  # histories with one observation and time that are followed
_END = b""  # the key of all terminal states
_DIGITS = 9  # of probabilities and rewards, which are sums of float64 in OpenSpiel


class _Row(NamedTuple):
  """What follows a state: its legal actions, and (key, probability, reward) of their outcomes."""

  actions: tuple[int, ...]
  outcomes: tuple[tuple[tuple[bytes, float, float], ...], ...]


def compile_process(
  game_or_string: Any, *, max_states: int = 100_000, dtype: Any = jnp.float32
) -> decision_processes.DecisionProcess:
  """Returns a game of one player as a decision process; the last state is the terminal one.

  A reward is the change of OpenSpiel's return from one decision to the next. Actions keep
  OpenSpiel's numbers. Observations are OpenSpiel's observation tensors in one row, and 0 in the
  terminal state. Where the time is part of the state, a last entry is the share of
  `game.max_game_length()` that has passed.

  Args:
    game_or_string: such as "catch(rows=5)", or a game object of OpenSpiel. The prize of "deep_sea"
      is behind the moves to the right.
    max_states: a game with more pairs of observation and time, or with more outcomes of one action,
      is refused.
    dtype: of probabilities, rewards and observations.

  Raises:
    ImportError: if OpenSpiel is not installed.
    ValueError: if OpenSpiel has no such game, it has several players or no observation tensor, it
      is too large, or its observations do not determine what happens next.
  """
  checks.count("max_states", max_states)
  game = openspiel.load_game(game_or_string, needs_info_states=False)
  if game.num_players() != 1:
    raise ValueError(f"game must have one player, got {game} with {game.num_players()}")
  if not game.get_type().provides_observation_tensor:
    raise ValueError(f"game {game} has no observation tensor, which identifies the states")
  rows, initial = _explore(game, max_states)
  first = {key: row for (_, key), row in reversed(rows.items())}
  timed = any(row != first[key] for (_, key), row in rows.items())
  if not timed:
    rows = {(0, key): row for (_, key), row in rows.items()}
  return _to_arrays(game, rows, initial, timed, dtype)


def _explore(
  game: Any, max_states: int
) -> tuple[dict[tuple[int, bytes], _Row], dict[bytes, float]]:
  """Returns the row of each pair of time and key, in order of time, and the initial keys."""
  rows: dict[tuple[int, bytes], _Row] = {}
  outcomes = list(_outcomes(game.new_initial_state(), 1.0, 0.0, max_states))
  initial = {key: prob for key, prob, _ in _merged(outcomes)}
  rng, frontier, time = random.Random(0), [state for state, *_ in outcomes], 0
  while frontier:
    copies: dict[bytes, list[Any]] = {}
    for state in frontier:
      if not state.is_terminal():
        copies.setdefault(_key(state), []).append(state)
    if len(rows) + len(copies) > max_states:
      raise ValueError(
        f"game {game} has more than max_states={max_states} pairs of observation and time, within "
        f"{time + 1} moves: increase max_states if memory allows, or choose a smaller game"
      )
    frontier = []
    for key, states in copies.items():
      for state in rng.sample(states, min(len(states), _NUM_COPIES)):
        actions, before = tuple(state.legal_actions()), state.returns()[0]
        reached = [list(_outcomes(state.child(a), 1.0, before, max_states)) for a in actions]
        row = _Row(actions, tuple(_merged(found) for found in reached))
        known = rows.setdefault((time, key), row)
        if row != known:
          raise ValueError(
            f"game {game} has two histories of {time} moves with one observation after which "
            f"different things happen, {_difference(known, row)}: it is no Markov decision process "
            f"of its observations, here {state.observation_string(0)!r}"
          )
        frontier += [child for found in reached for child, *_ in found]
    time += 1
  return rows, initial


def _outcomes(
  state: Any, prob: float, before: float, max_states: int
) -> Iterator[tuple[Any, float, float]]:
  """Yields (state, probability, reward) after chance's moves."""
  waiting, count = [(state, prob)], 0
  while waiting:
    state, prob = waiting.pop()
    if state.is_chance_node():
      waiting += [
        (state.child(action), prob * weight) for action, weight in state.chance_outcomes()
      ]
    else:
      count += 1
      yield state, prob, state.returns()[0] - before
    if len(waiting) + count > max_states:
      raise ValueError(
        f"chance has more than max_states={max_states} outcomes between two decisions: increase "
        "max_states if memory allows, or choose a smaller game"
      )


def _merged(found: list[tuple[Any, float, float]]) -> tuple[tuple[bytes, float, float], ...]:
  """Returns the outcomes with equal keys and rewards as one, in a fixed order."""
  sums: dict[tuple[bytes, float], list[float]] = {}
  for state, prob, reward in found:
    sums.setdefault((_key(state), round(reward, _DIGITS) + 0.0), []).append(prob)
  return tuple(
    (key, round(math.fsum(probs), _DIGITS), reward) for (key, reward), probs in sorted(sums.items())
  )


def _key(state: Any) -> bytes:
  if state.is_terminal():
    return _END
  return np.asarray(state.observation_tensor(0), np.float32).tobytes()


def _difference(first: _Row, second: _Row) -> str:
  if first.actions != second.actions:
    return f"legal actions {list(first.actions)} and {list(second.actions)}"
  for action, *found in zip(first.actions, first.outcomes, second.outcomes, strict=True):
    if found[0] != found[1]:
      rewards = [sorted({reward for *_, reward in one}) for one in found]
      if rewards[0] != rewards[1]:
        return f"rewards {rewards[0]} and {rewards[1]} after action {action}"
      return f"other observations or other probabilities after action {action}"
  raise AssertionError("the rows are equal")


def _to_arrays(
  game: Any,
  rows: dict[tuple[int, bytes], _Row],
  initial: dict[bytes, float],
  timed: bool,
  dtype: Any,
) -> decision_processes.DecisionProcess:
  end, num_actions = len(rows), game.num_distinct_actions()
  numbers = {key: number for number, key in enumerate(rows)}
  width = max(len(found) for row in rows.values() for found in row.outcomes)
  shape = (end + 1, num_actions, width)
  # An illegal action ends the episode, so that no arithmetic with it can fail.
  next_states, probs, rewards = np.full(shape, end, np.int32), np.zeros(shape), np.zeros(shape)
  probs[..., 0] = 1
  legal = np.zeros(shape[:2], bool)
  legal[end] = True
  observed = np.zeros((end + 1, game.observation_tensor_size() + timed), np.float32)
  for (time, key), state in numbers.items():
    tensor = np.frombuffer(key, np.float32)
    observed[state] = [*tensor, time / game.max_game_length()] if timed else tensor
    row = rows[time, key]
    legal[state, list(row.actions)] = True
    for action, found in zip(row.actions, row.outcomes, strict=True):
      places = [end if child == _END else numbers[(time + 1) * timed, child] for child, *_ in found]
      next_states[state, action, : len(found)] = places
      probs[state, action, : len(found)] = [prob for _, prob, _ in found]
      rewards[state, action, : len(found)] = [reward for *_, reward in found]
  first = np.zeros(end + 1)
  for key, prob in initial.items():
    first[end if key == _END else numbers[0, key]] += prob
  return decision_processes.DecisionProcess(
    next_states=jnp.asarray(next_states),
    probs=jnp.asarray(probs / probs.sum(-1, keepdims=True), dtype),
    rewards=jnp.asarray(rewards, dtype),
    legal=jnp.asarray(legal),
    terminal=jnp.arange(end + 1) == end,
    initial=jnp.asarray(first / first.sum(), dtype),
    observations=jnp.asarray(observed, dtype),
  )
