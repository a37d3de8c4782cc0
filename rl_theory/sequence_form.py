"""The value and an equilibrium of a two-player zero-sum game by linear programming.

It is an independent reference for the iterative solvers. A realisation plan x of player 0 is its
own reach of every sequence. The constraints E x = e say that the reaches of the actions at a state
sum to the reach of the sequence that leads to it. With the payoffs P of pairs of sequences,

  max over x, v of v_root  with  E x = e, x >= 0, F' v <= P' x

is the value of the game. The result is exact up to the solver's tolerance of about 1e-9, and fast
for up to a few thousand information states.

Reference: von Stengel 1996, "Efficient computation of behavior strategies".
"""

from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from rl_theory import games


def solve_zero_sum(game: games.Game) -> tuple[float, np.ndarray]:
  """Returns player 0's value and an equilibrium policy `[S, A]` of both players, in float64.

  Each player has its own linear program. A policy is uniform at states that its plan does not
  reach.

  Raises:
    ValueError: if the game does not have two players, or its utilities do not sum to zero.
    RuntimeError: if the solver fails.
  """
  utilities = np.asarray(game.utilities, float)
  if game.num_players != 2 or np.abs(utilities.sum(1)).max() > 1e-6:
    raise ValueError(f"game must have two players whose utilities sum to zero, got {game!r}")
  plans, values = [], []
  for player in range(2):
    plan, value = _best_plan(game, player, utilities)
    plans.append(plan)
    values.append(value)
  if abs(values[0] + values[1]) > 1e-6:
    raise RuntimeError(f"the two linear programs disagree on the value: {values[0]}, {-values[1]}")
  legal = np.asarray(game.legal)
  weights = np.zeros(legal.shape)
  weights[legal] = np.concatenate(plans)
  totals = weights.sum(1, keepdims=True)
  uniform = legal / legal.sum(1, keepdims=True)
  return values[0], np.where(totals > 1e-12, weights / np.where(totals > 0, totals, 1), uniform)


def _best_plan(game: games.Game, player: int, utilities: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns the player's own reach `[Q]` in an equilibrium, and its value of the game."""
  own, own_right = _constraints(game, player)
  other, _ = _constraints(game, 1 - player)
  terminals = np.asarray(game.terminals)
  payoffs = utilities[terminals, player] * np.asarray(game.chance_reach, float)[terminals]
  rows = _local_sequences(game, 1 - player)[terminals]
  columns = _local_sequences(game, player)[terminals]
  matrix = scipy.sparse.csr_matrix(
    (payoffs, (rows, columns)), shape=(other.shape[1], own.shape[1])
  )  # duplicate entries add up
  num_own, num_other = own.shape[1], other.shape[0]
  objective = np.zeros(num_own + num_other)
  objective[num_own + num_other - 1] = -1  # v_root belongs to the last row of F, the empty sequence
  result = scipy.optimize.linprog(
    objective,
    A_ub=scipy.sparse.hstack([-matrix, other.T], format="csr"),
    b_ub=np.zeros(other.shape[1]),
    A_eq=scipy.sparse.hstack(
      [own, scipy.sparse.csr_matrix((own.shape[0], num_other))], format="csr"
    ),
    b_eq=own_right,
    bounds=[(0, None)] * num_own + [(None, None)] * num_other,
    method="highs",
  )
  if result.status != 0:
    raise RuntimeError(f"the linear program of {game!r} failed: {result.message}")
  return np.maximum(result.x[: num_own - 1], 0), -float(result.fun)


def _constraints(game: games.Game, player: int) -> tuple[Any, np.ndarray]:
  """Returns E `[G + 1, Q + 1]` and e `[G + 1]`.

  Each state has a row: the reaches of its actions sum to the reach of the sequence that leads to
  it. In the last row the reach of the empty sequence is 1.
  """
  states, sequences = game.layout.player_slice(player), game.layout.sequence_slice(player)
  num_states, num_sequences = states.stop - states.start, sequences.stop - sequences.start + 1
  movers = np.flatnonzero(np.asarray(game.players) == player)
  leading = np.zeros(num_states, int)
  last = _local_sequences(game, player)[movers]
  leading[np.asarray(game.info_states)[movers] - states.start] = last
  entries = [
    (np.asarray(game.player_trees[player].state_of), np.arange(num_sequences - 1), 1.0),
    (np.arange(num_states), leading, -1.0),
    (np.array([num_states]), np.array([num_sequences - 1]), 1.0),
  ]
  data = np.concatenate([np.full(len(rows), value) for rows, _, value in entries])
  rows = np.concatenate([rows for rows, _, _ in entries])
  columns = np.concatenate([columns for _, columns, _ in entries])
  right = np.zeros(num_states + 1)
  right[-1] = 1
  return scipy.sparse.csr_matrix((data, (rows, columns)), shape=(len(right), num_sequences)), right


def _local_sequences(game: games.Game, player: int) -> np.ndarray:
  """Returns the player's last sequence before each history, `[H]`, numbered within the player."""
  own, last = game.layout.sequence_slice(player), np.asarray(game.sequences)[:, player]
  none_yet = len(game.sequence_places)
  return np.where(last == none_yet, own.stop - own.start, last - own.start)
