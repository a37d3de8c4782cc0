"""Policies as arrays: uniform play, softmax over legal actions, checks, exchange with OpenSpiel.

A policy of a game is one array `[S, A]`: the action probabilities at all information states of all
players, in the order of `game.state_strings`. `policy_files` writes such arrays to files.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import game_tree, openspiel

# How far a row may be from summing to 1: float32 policies, perhaps printed with few digits.
TOLERANCE = 1e-4


def uniform(game: game_tree.Game) -> jax.Array:
  """Returns the policy `[S, A]` that gives all legal actions the same probability."""
  legal = game.legal.astype(game.utilities.dtype)
  return legal / jnp.sum(legal, axis=-1, keepdims=True)


def log_softmax(logits: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns the log-probabilities `[..., A]` of a softmax over legal actions, 0 for the others.

  Args:
    logits: `[..., A]`; those of illegal actions are ignored.
    legal: `[..., A]` bool; a row without legal actions gives zeros.

  Example:
    >>> log_softmax(jnp.array([0.0, 0.0, 9.0]), jnp.array([True, True, False]))
    Array([-0.6931472, -0.6931472,  0.       ], dtype=float32)
  """
  masked = jnp.where(legal, logits, -jnp.inf)
  # A row of -inf throughout would give NaN, also in the gradient.
  masked = jnp.where(jnp.any(legal, axis=-1, keepdims=True), masked, 0)
  return jnp.where(legal, jax.nn.log_softmax(masked), 0)


def softmax(logits: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns the probabilities `[..., A]` of a softmax over legal actions, 0 for the others."""
  return jnp.where(legal, jnp.exp(log_softmax(logits, legal)), 0)


# --- checks ---


def check(game: game_tree.Game, policy: Any) -> None:
  """Raises `ValueError` unless `policy` is `[S, A]` and holds probabilities of legal actions.

  Other functions look at the values of NumPy arrays and lists only, because looking at an array on
  a device waits for it. This one looks at those too.
  """
  _check_shape(game, policy)
  probs = np.asarray(policy, float)
  legal = np.asarray(game.legal)
  bad = np.flatnonzero(~((probs >= 0) & np.isfinite(probs)).all(1))
  if bad.size:
    raise ValueError(f"policy must hold probabilities, got {_row(game, probs, bad[0])}")
  bad = np.flatnonzero(np.where(legal, 0, probs).sum(1) > TOLERANCE)
  if bad.size:
    raise ValueError(
      f"policy must be 0 for illegal actions, got {_row(game, probs, bad[0])} with legal actions "
      f"{np.flatnonzero(legal[bad[0]]).tolist()}"
    )
  bad = np.flatnonzero(np.abs(probs.sum(1) - 1) > TOLERANCE)
  if bad.size:
    raise ValueError(f"policy must sum to 1 in every row, got {_row(game, probs, bad[0])}")


def checked(game: game_tree.Game, policy: Any) -> jax.Array:
  """Returns the policy in the game's dtype, after a check that does not wait for a device."""
  if isinstance(policy, jax.Array):
    _check_shape(game, policy)
    if policy.dtype == game.utilities.dtype:
      return policy  # a conversion that does nothing takes half as long as Kuhn poker's NashConv
  else:
    check(game, policy)
  return jnp.asarray(policy, game.utilities.dtype)


def _row(game: game_tree.Game, probs: np.ndarray, state: int) -> str:
  return f"{probs[state].tolist()} at row {state}, information state {game.state_strings[state]!r}"


def _check_shape(game: game_tree.Game, policy: Any) -> None:
  if np.shape(policy) != game.legal.shape:
    raise ValueError(
      f"policy must have shape [S, A] = {list(game.legal.shape)} in {game.layout.name}, got "
      f"{list(np.shape(policy))}: one row for each of game.state_strings; use jax.vmap for several"
    )


# --- other forms ---


def to_dict(game: game_tree.Game, policy: Any) -> dict[str, dict[int, float]]:
  """Returns the probability of each legal action at each information-state string."""
  check(game, policy)
  _rows_by_string(game)
  legal, probs = np.asarray(game.legal), np.asarray(policy, float)
  return {
    string: {int(action): float(probs[state, action]) for action in np.flatnonzero(legal[state])}
    for state, string in enumerate(game.state_strings)
  }


def from_dict(game: game_tree.Game, rows: Mapping[str, Mapping[int, float]]) -> jax.Array:
  """Returns the policy `[S, A]` of a dictionary from information-state string to probabilities.

  Actions that a row leaves out have probability 0.

  Raises:
    ValueError: if a state is missing or unknown, or a row is not a distribution.
  """
  by_string = _rows_by_string(game)
  unknown, missing = rows.keys() - by_string.keys(), by_string.keys() - rows.keys()
  if unknown or missing:
    problem, strings = ("unknown", unknown) if unknown else ("missing", missing)
    raise ValueError(
      f"the dictionary must have one row for each of the {len(by_string)} information states of "
      f"{game.layout.name}: {len(strings)} {problem}, such as {min(strings)!r}"
    )
  probs = np.zeros(game.legal.shape)
  for string, row in rows.items():
    for action, prob in row.items():
      if not 0 <= action < probs.shape[1]:
        raise ValueError(
          f"action must lie in [0, {probs.shape[1]}) in {game.layout.name}, got {action} at "
          f"{string!r}"
        )
      probs[by_string[string], action] = prob
  return checked(game, probs)


def to_openspiel(game: game_tree.Game, policy: Any) -> Any:
  """Returns the policy as a `pyspiel.TabularPolicy`.

  Raises:
    ValueError: if the array is not a policy of the game, or OpenSpiel does not have the game.
  """
  _require_openspiel(game)
  rows = to_dict(game, policy)
  return openspiel.tabular_policy({string: list(row.items()) for string, row in rows.items()})


def from_openspiel(game: game_tree.Game, policy: Any) -> jax.Array:
  """Returns the array `[S, A]` of an OpenSpiel policy, written in C++ or Python.

  The policy is evaluated at one history of each information state, in the game that OpenSpiel loads
  from `game.layout.name`. If OpenSpiel cannot load the game by that string, use `from_dict`.
  """
  _require_openspiel(game)
  probs = np.zeros(game.legal.shape)
  for state, row in enumerate(
    openspiel.action_probabilities(game.layout.name, _paths(game), policy)
  ):
    for action, prob in row.items():
      probs[state, action] = prob
  return checked(game, probs)


def action_names(game: game_tree.Game) -> list[dict[int, str]]:
  """Returns the name of each legal action, such as "Bet", for each information state.

  The names are OpenSpiel's or the description's. The dictionaries are empty if OpenSpiel is needed,
  but is not installed or cannot load `game.layout.name`.
  """
  named = game.layout.described_actions
  if named:
    rows = np.asarray(game.legal)
    return [{int(action): named[action] for action in np.flatnonzero(row)} for row in rows]
  players = np.asarray(game.state_players).tolist()
  try:
    return openspiel.action_names(game.layout.name, _paths(game), players)
  except (ImportError, ValueError):
    return [{} for _ in players]


def _require_openspiel(game: game_tree.Game) -> None:
  if game.layout.described_actions:
    raise ValueError(
      f"game {game.layout.name} is not one of OpenSpiel's: use to_dict and from_dict instead"
    )


def _paths(game: game_tree.Game) -> list[list[int]]:
  """Returns the actions that lead to one history of each information state."""
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  states, nodes = np.unique(np.asarray(game.info_states), return_index=True)
  paths = []
  for node in nodes[states >= 0]:
    path: list[int] = []
    while node > 0:
      path.append(int(actions[node]))
      node = parents[node]
    paths.append(path[::-1])
  return paths


def _rows_by_string(game: game_tree.Game) -> dict[str, int]:
  by_string = {string: state for state, string in enumerate(game.state_strings)}
  if len(by_string) < len(game.state_strings):
    raise ValueError(
      f"two players of {game.layout.name} have an information state with the same string, so the "
      "strings do not identify the states: use the array"
    )
  return by_string
