"""Games as arrays: what policies are worth, best responses and distance from equilibrium.

`compile_game` reads a game of OpenSpiel once; everything after it is a pure jitted function of a
`Game` and a policy, and maps over policies, payoffs and seeds with `jax.vmap`. A policy is one
array `[S, A]`: the action probabilities at all information states of all players, in the order of
`game.state_strings`.

Values are sums over terminal histories of utility times the players' and chance's probabilities to
reach them, so a policy costs a few gathers per number of own moves, whatever the depth of the tree.
Any number of players, chance anywhere, general sums; perfect recall is required and checked.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import game_tree, openspiel, segments

Game = game_tree.Game
CHANCE, TERMINAL = openspiel.CHANCE, openspiel.TERMINAL
# float32 policies that somebody else has rounded.
_TOLERANCE = 1e-4


def compile_game(
  game_or_string: Any,
  *,
  max_nodes: int = 1_000_000,
  dtype: Any = jnp.float32,
  cache: str | os.PathLike[str] | None = None,
) -> Game:
  """Returns the arrays of a game.

  Simultaneous moves are taken in turn and hidden from each other. Trees are kept on disk by the
  game's string and OpenSpiel's version; a file that cannot be read is made again.

  Args:
    game_or_string: OpenSpiel's string, such as "leduc_poker" or "kuhn_poker(players=3)", or a game
      of OpenSpiel (which is not kept on disk).
    max_nodes: histories, chance and terminal ones included, above which the game is refused.
    dtype: of probabilities and utilities; float64 needs JAX's `jax_enable_x64`.
    cache: folder in which trees are kept; None means `$BOOTSTRAX_CACHE` or `~/.cache/bootstrax`.

  Raises:
    ImportError: if OpenSpiel is absent.
    ValueError: if there is no such game (the closest names are shown), it is larger than
      `max_nodes`, a player forgets what it did, or float64 is not available.

  Example:
    >>> game = compile_game("kuhn_poker")  # doctest: +SKIP
    >>> nash_conv(game, uniform_policy(game))  # doctest: +SKIP
    Array(0.9166667, dtype=float32)
  """
  if isinstance(max_nodes, bool) or not isinstance(max_nodes, int) or max_nodes < 1:
    raise ValueError(f"max_nodes must be an integer >= 1, got {max_nodes!r}")
  wanted = jnp.dtype(dtype)
  available = jnp.asarray(np.zeros(0, wanted)).dtype  # float32 where there is no float64
  if available != wanted or not jnp.issubdtype(wanted, jnp.floating):
    raise ValueError(
      f"dtype must be a floating type that JAX has here, got {wanted}: for float64 call "
      'jax.config.update("jax_enable_x64", True) first'
    )
  return game_tree.index(
    openspiel.read_tree(game_or_string, max_nodes=max_nodes, cache=cache), wanted
  )


def state_observations(game: Game, observations: jax.Array) -> jax.Array:
  """Returns `[S, ...]`, what the mover has seen at each information state, from `[H, n, ...]`."""
  num_states, num_histories = len(game.legal), len(game.parents)
  states = jnp.where(game.info_states < 0, num_states, game.info_states)
  first = jnp.full(num_states, num_histories).at[states].min(jnp.arange(num_histories), mode="drop")
  return observations[first, game.state_players]


def information_state_tensors(game: Game) -> jax.Array:
  """Returns `[H, n, O]` float32, what OpenSpiel tells each player at each history, for networks.

  Zero at chance and terminal histories. The game is walked again: seconds for 100,000 histories.

  Raises:
    ValueError: if OpenSpiel makes no such tensors for this game.
  """
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  return jnp.asarray(openspiel.information_state_tensors(game.layout.name, parents, actions))


def observation_histories(game: Game, observations: jax.Array) -> jax.Array:
  """Returns `[H, n, L, ...]`: what players saw at the decisions up to each history, for an LSTM.

  The newest comes last; rows before the first decision are zero. L is the most decisions on a way
  through the game.

  Args:
    game: the game.
    observations: `[H, n, ...]`, such as `information_state_tensors`.
  """
  parents, players = np.asarray(game.parents), np.asarray(game.players)
  length = sum(map(len, game.layout.state_levels))
  none = len(parents)  # a row of zeros
  paths = np.full((len(parents), length), none)
  for start, stop in game.layout.levels:
    if start:
      paths[start:stop] = paths[parents[start:stop]]
    deciding = start + np.flatnonzero(players[start:stop] >= 0)
    paths[deciding] = np.concatenate([paths[deciding, 1:], deciding[:, None]], axis=1)
  used = (paths != none).any(0)
  padded = jnp.concatenate([observations, jnp.zeros_like(observations[:1])])
  return jnp.moveaxis(padded[paths[:, used]], 1, 2)


# --- policies ---


def uniform_policy(game: Game) -> jax.Array:
  """Returns the policy `[S, A]` that plays every legal action equally often."""
  legal = game.legal.astype(game.utilities.dtype)
  return legal / jnp.sum(legal, axis=-1, keepdims=True)


def check_policy(game: Game, policy: Any) -> None:
  """Raises `ValueError` unless `policy` is `[S, A]` and holds probabilities of legal actions.

  The functions of this module check shapes always and values of NumPy arrays and lists; arrays on a
  device are looked at here only, since that waits for them.
  """
  _check_shape(game, policy)
  probs = np.asarray(policy, float)
  legal = np.asarray(game.legal)
  bad = np.flatnonzero(~((probs >= 0) & np.isfinite(probs)).all(1))
  if bad.size:
    raise ValueError(f"policy must be probabilities, got {_row(game, probs, bad[0])}")
  bad = np.flatnonzero(np.where(legal, 0, probs).sum(1) > _TOLERANCE)
  if bad.size:
    raise ValueError(
      f"policy must give illegal actions no probability, got {_row(game, probs, bad[0])} with "
      f"legal actions {np.flatnonzero(legal[bad[0]]).tolist()}"
    )
  bad = np.flatnonzero(np.abs(probs.sum(1) - 1) > _TOLERANCE)
  if bad.size:
    raise ValueError(f"policy must sum to 1 in every row, got {_row(game, probs, bad[0])}")


def _row(game: Game, probs: np.ndarray, state: int) -> str:
  return f"{probs[state].tolist()} at row {state}, information state {game.state_strings[state]!r}"


def _check_shape(game: Game, policy: Any) -> None:
  if np.shape(policy) != game.legal.shape:
    raise ValueError(
      f"policy must have shape [S, A] = {list(game.legal.shape)} in {game.layout.name}, got "
      f"{list(np.shape(policy))}: one row for each of game.state_strings; use jax.vmap for several"
    )


def _checked(game: Game, policy: Any) -> jax.Array:
  """Returns the policy as an array of the game's type, looked at unless that would cost a wait."""
  if isinstance(policy, jax.Array):
    _check_shape(game, policy)
    if policy.dtype == game.utilities.dtype:
      return policy  # a conversion that does nothing takes half as long as Kuhn poker's NashConv
  else:
    check_policy(game, policy)
  return jnp.asarray(policy, game.utilities.dtype)


def policy_to_dict(game: Game, policy: Any) -> dict[str, dict[int, float]]:
  """Returns the probability of each legal action at each information-state string."""
  check_policy(game, policy)
  _rows_by_string(game)
  legal, probs = np.asarray(game.legal), np.asarray(policy, float)
  return {
    string: {int(action): float(probs[state, action]) for action in np.flatnonzero(legal[state])}
    for state, string in enumerate(game.state_strings)
  }


def policy_from_dict(game: Game, rows: Mapping[str, Mapping[int, float]]) -> jax.Array:
  """Returns the policy `[S, A]` with the probabilities of a dictionary by information-state string.

  Actions left out of a row have probability 0.

  Raises:
    ValueError: if a state is absent or unknown, or the probabilities are none.
  """
  by_string = _rows_by_string(game)
  unknown, absent = rows.keys() - by_string.keys(), by_string.keys() - rows.keys()
  if unknown or absent:
    problem, strings = ("unknown", unknown) if unknown else ("absent", absent)
    raise ValueError(
      f"the dictionary must have one row for each of the {len(by_string)} information states of "
      f"{game.layout.name}: {len(strings)} {problem}, such as {min(strings)!r}"
    )
  probs = np.zeros(game.legal.shape)
  for string, row in rows.items():
    for action, prob in row.items():
      if not 0 <= action < probs.shape[1]:
        raise ValueError(f"no action {action} in {game.layout.name}, got it at {string!r}")
      probs[by_string[string], action] = prob
  return _checked(game, probs)


def policy_to_openspiel(game: Game, policy: Any) -> Any:
  """Returns the policy as OpenSpiel's `pyspiel.TabularPolicy`."""
  rows = policy_to_dict(game, policy)
  return openspiel.tabular_policy({string: list(row.items()) for string, row in rows.items()})


def policy_from_openspiel(game: Game, policy: Any) -> jax.Array:
  """Returns the array `[S, A]` of any policy of OpenSpiel, of C++ or Python.

  It is asked at one history of each information state, in the game that OpenSpiel makes from
  `game.layout.name`: for games that have no such string use `policy_from_dict`.
  """
  probs = np.zeros(game.legal.shape)
  for state, row in enumerate(
    openspiel.action_probabilities(game.layout.name, _paths(game), policy)
  ):
    for action, prob in row.items():
      probs[state, action] = prob
  return _checked(game, probs)


def action_names(game: Game) -> list[dict[int, str]]:
  """Returns OpenSpiel's name of each legal action at each information state, such as "Bet".

  Empty where OpenSpiel is absent or has no game of the string `game.layout.name`.
  """
  players = np.asarray(game.state_players).tolist()
  try:
    return openspiel.action_names(game.layout.name, _paths(game), players)
  except (ImportError, ValueError):
    return [{} for _ in players]


def _paths(game: Game) -> list[list[int]]:
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


def _rows_by_string(game: Game) -> dict[str, int]:
  by_string = {string: state for state, string in enumerate(game.state_strings)}
  if len(by_string) < len(game.state_strings):
    raise ValueError(
      f"two players of {game.layout.name} share an information-state string: strings do not name "
      "the states, use the array"
    )
  return by_string


# --- values ---


def expected_values(game: Game, policy: Any) -> jax.Array:
  """Returns `[n]`, what each player gets on average when all play `policy` `[S, A]`.

  Raises:
    ValueError: if the shape is wrong, or a NumPy `policy` is no policy; as everywhere here.
  """
  return _expected_values(game, _checked(game, policy))


def reach_probabilities(game: Game, policy: Any) -> jax.Array:
  """Returns `[H, n + 1]`, what each player and (last) chance contribute to reaching each history.

  The product over the last axis is the probability of the history.
  """
  return _reach_probabilities(game, _checked(game, policy))


def best_response_values(game: Game, policy: Any) -> jax.Array:
  """Returns `[n]`, the most that each player can get while the others keep to `policy`."""
  return _best_response_values(game, _checked(game, policy))


def nash_conv(game: Game, policy: Any) -> jax.Array:
  """Returns the sum over players of what a best response gains; a scalar, 0 at an equilibrium.

  It is zero up to rounding, so float32 may give a small negative number.
  """
  return _nash_conv(game, _checked(game, policy))


def exploitability(game: Game, policy: Any) -> jax.Array:
  """Returns `nash_conv` over the number of players."""
  return nash_conv(game, policy) / game.num_players


def history_values(game: Game, policy: Any) -> jax.Array:
  """Returns `[H, n]`, what each player gets after each history when all play `policy`.

  The value q(h, a) of an action is that of the history `game.children[h, a]`.
  """
  return _history_values(game, _checked(game, policy))


def counterfactual_values(game: Game, policy: Any) -> jax.Array:
  """Returns `[S, A]`, each action's value at a state weighted with others' reach.

  At state s of player i: the sum over histories h in s of the probability that the other players
  and chance contribute to h, times what i gets after the action when all follow `policy`. Illegal
  actions have 0.
  """
  return _counterfactual_values(game, _checked(game, policy))


@jax.jit
def _expected_values(game: Game, policy: jax.Array) -> jax.Array:
  reach = sequence_reach(game, policy)
  last = game.sequences[game.terminals]
  probs = game.chance_reach[game.terminals]
  for player in range(game.num_players):
    probs = probs * segments.take(reach, last[:, player])
  # Not a matrix product: accelerators round its factors.
  return jnp.sum(probs[:, None] * game.utilities[game.terminals], axis=0)


@jax.jit
def _reach_probabilities(game: Game, policy: jax.Array) -> jax.Array:
  reach = sequence_reach(game, policy)
  return jnp.concatenate([segments.take(reach, game.sequences), game.chance_reach[:, None]], axis=1)


@jax.jit
def _history_values(game: Game, policy: jax.Array) -> jax.Array:
  flat = policy.reshape(-1)
  values = [game.utilities[slice(*game.layout.levels[-1])]]
  for level in range(len(game.layout.levels) - 2, -1, -1):
    start, stop = game.layout.levels[level]
    below = slice(*game.layout.levels[level + 1])
    parents = game.parents[below]
    places = game.info_states[parents] * game.layout.num_actions + game.actions[below]
    moved = jnp.where(game.players[parents] < 0, 1, flat[jnp.maximum(places, 0)])
    weighted = values[0] * (moved * game.chance_probs[below])[:, None]
    sums = jax.ops.segment_sum(weighted, parents - start, stop - start, indices_are_sorted=True)
    values.insert(0, sums + game.utilities[start:stop])  # utilities are 0 before the end
  return jnp.concatenate(values)


@jax.jit
def _best_response_values(game: Game, policy: jax.Array) -> jax.Array:
  reach, payoffs = sequence_reach(game, policy), terminal_payoffs(game)
  values = []
  for player in range(game.num_players):
    payoff = sequence_payoffs(game, player, reach, payoffs[player])
    values.append(pass_up(game, player, payoff, None)[2])
  return jnp.stack(values)


@jax.jit
def _nash_conv(game: Game, policy: jax.Array) -> jax.Array:
  reach, payoffs = sequence_reach(game, policy), terminal_payoffs(game)
  gains = []
  for player in range(game.num_players):
    payoff = sequence_payoffs(game, player, reach, payoffs[player])
    best = pass_up(game, player, payoff, None)[2]
    # The same sums serve both: no pass over all histories.
    own = pass_up(game, player, payoff, sequence_probs(game, player, policy))[2]
    gains.append(best - own)
  return jnp.sum(jnp.stack(gains))


@jax.jit
def _counterfactual_values(game: Game, policy: jax.Array) -> jax.Array:
  reach, payoffs = sequence_reach(game, policy), terminal_payoffs(game)
  values = []
  for player in range(game.num_players):
    payoff = sequence_payoffs(game, player, reach, payoffs[player])
    values.append(pass_up(game, player, payoff, sequence_probs(game, player, policy))[0])
  return by_state(game, values)


# --- the passes over one player's sequences, for the solvers too ---


def sequence_probs(game: Game, player: int, policy: jax.Array) -> jax.Array:
  """Returns the entries `[Q]` of an array `[S, A]` at the sequences of one player."""
  places = game.sequence_places[game.layout.sequence_slice(player)]
  return segments.take(policy.reshape(-1), places)


def by_state(game: Game, values: list[jax.Array]) -> jax.Array:
  """Returns all players' values `[Q]` of sequences as one array `[S, A]`, 0 if illegal."""
  joined = jnp.concatenate([*values, jnp.zeros(1, values[0].dtype)])
  return segments.take(joined, game.sequence_numbers)


def own_reach(game: Game, player: int, probs: jax.Array) -> jax.Array:
  """Returns `[Q]`, the player's own probability of each sequence, from that of its last action."""
  tree, levels = game.player_trees[player], game.layout.sequence_levels[player]
  reach: list[jax.Array] = []
  for level, (start, stop) in enumerate(levels):
    here = probs[start - levels[0][0] : stop - levels[0][0]]
    reach.append(here * segments.take(reach[-1], tree.parents[level - 1]) if level else here)
  return jnp.concatenate(reach) if reach else probs


def sequence_reach(game: Game, policy: jax.Array) -> jax.Array:
  """Returns `[Q + 1]`, own reach of every sequence of all players; the last, of no move, is 1."""
  return join_reach(
    [
      own_reach(game, player, sequence_probs(game, player, policy))
      for player in range(game.num_players)
    ]
  )


def join_reach(reaches: list[jax.Array]) -> jax.Array:
  """Returns all players' `own_reach` as one array `[Q + 1]`."""
  return jnp.concatenate([*reaches, jnp.ones(1, reaches[0].dtype)])


def terminal_payoffs(game: Game) -> tuple[tuple[jax.Array, ...], ...]:
  """Returns each player's utilities times chance's probability, in the tables of its tree."""
  payoffs = game.utilities[game.terminals] * game.chance_reach[game.terminals][:, None]
  return tuple(
    segments.gather(payoffs[:, player], tree.terminals)
    for player, tree in enumerate(game.player_trees)
  )


def sequence_payoffs(
  game: Game, player: int, reach: jax.Array, payoffs: tuple[jax.Array, ...]
) -> jax.Array:
  """Returns `[Q + 1]`, a player's payoff right after each of its sequences, times others' reach.

  The last entry is of the histories before the first own move.

  Args:
    game: the game.
    player: whose.
    reach: `[Q + 1]` from `sequence_reach`; only the other players' entries count.
    payoffs: the player's part of `terminal_payoffs`.
  """
  tree = game.player_trees[player]
  weighted = []
  for payoff, others in zip(payoffs, tree.opponents, strict=True):
    for column in range(others.shape[-1]):
      payoff = payoff * segments.take(reach, others[..., column])
    weighted.append(payoff)
  return segments.sum_rows(tuple(weighted), tree.terminals, reach.dtype)


def pass_up(
  game: Game, player: int, payoffs: jax.Array, probs: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Passes a player's states from the last own move to the first.

  Args:
    game: the game.
    player: whose states.
    payoffs: `[Q + 1]` from `sequence_payoffs`.
    probs: `[Q]` what the player plays; None for the best action everywhere.

  Returns:
    Counterfactual values `[Q]` of actions and `[G]` of states, and the value before the first move.
  """
  tree, levels = game.player_trees[player], game.layout.sequence_levels[player]
  action_values: list[jax.Array] = []
  values: list[jax.Array] = []
  for level in reversed(range(len(levels))):
    rows = slice(levels[level][0] - levels[0][0], levels[level][1] - levels[0][0])
    here = payoffs[rows]
    if values:
      here = here + segments.segment_sum(values[0], tree.children[level])
    states = tree.level_states[level]
    action_values.insert(0, here)
    if probs is None:
      values.insert(0, segments.segment_max(here, states))
    else:
      values.insert(0, segments.segment_sum(probs[rows] * here, states))
  if not values:
    return payoffs[:0], payoffs[:0], payoffs[-1]
  start = payoffs[-1] + jnp.sum(values[0])
  return jnp.concatenate(action_values), jnp.concatenate(values), start
