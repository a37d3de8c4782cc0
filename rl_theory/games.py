"""Games as arrays: the value of policies, best responses and the distance from equilibrium.

`compile_game` reads a game once, from OpenSpiel or a description. All other functions are pure and
jitted functions of a `Game` and a policy, so `jax.vmap` maps them over policies, payoffs and seeds.
A policy is one array `[S, A]`, see `policy_arrays`.

A value is a sum over terminal histories of the utility times the probability that players and
chance reach them. A policy therefore costs a few gathers for each number of own moves, whatever the
depth of the tree. Games may have any number of players, chance moves anywhere and general sums.
They must have perfect recall, which is checked.
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_theory import described_games, efg_files, game_tree, openspiel, policy_arrays, segments
from sharding import checks

Game = game_tree.Game
CHANCE, TERMINAL = openspiel.CHANCE, openspiel.TERMINAL


def compile_game(
  game_or_string: Any,
  *,
  name: str = "",
  max_nodes: int = 1_000_000,
  dtype: Any = jnp.float32,
  cache: str | os.PathLike[str] | None = None,
) -> Game:
  """Returns the arrays of a game.

  Simultaneous moves become moves in turn that the others do not see. Trees are cached on disk under
  the game's string and OpenSpiel's version. A cache file that cannot be read is written again.

  Args:
    game_or_string: OpenSpiel's string, such as "leduc_poker" or "kuhn_poker(players=3)", or a game
      object of OpenSpiel (these are not cached). Or a game that OpenSpiel does not have: the path
      of a file that ends in `.efg`, a `described_games.Decision` or `Chance`, or an array of
      payoffs as in `described_games.matrix_game`. These need no OpenSpiel.
    name: of a game that OpenSpiel does not have, for messages and files of policies. By default the
      title in the file, "tree" or "matrix".
    max_nodes: the largest number of histories, including those of chance and terminal ones; a
      larger game is refused.
    dtype: of probabilities and utilities; float64 needs JAX's `jax_enable_x64`.
    cache: folder of the cache; None means `$BOOTSTRAX_CACHE` or `~/.cache/bootstrax`.

  Raises:
    ImportError: if OpenSpiel is needed and not installed.
    ValueError: if OpenSpiel has no such game (similar names are listed), a description is wrong
      (the line or the node is named), the game has more than `max_nodes` histories or imperfect
      recall, or float64 is not enabled.
    OSError: if a file cannot be read.

  Example:
    >>> game = compile_game("kuhn_poker")  # doctest: +SKIP
    >>> nash_conv(game, policy_arrays.uniform(game))  # doctest: +SKIP
    Array(0.9166667, dtype=float32)
  """
  checks.count("max_nodes", max_nodes)
  wanted = jnp.dtype(dtype)
  available = jnp.asarray(np.zeros(0, wanted)).dtype  # float32 if float64 is not enabled
  if available != wanted or not jnp.issubdtype(wanted, jnp.floating):
    raise ValueError(
      f"dtype must be a floating-point type that is enabled in JAX, got {wanted}: for float64 call "
      'jax.config.update("jax_enable_x64", True) first'
    )
  root = game_or_string
  if isinstance(root, os.PathLike) or (isinstance(root, str) and root.lower().endswith(".efg")):
    root, title = efg_files.read_efg(root)
    name = name or title or pathlib.Path(game_or_string).stem
  elif hasattr(root, "__array__") or isinstance(root, list):
    root, name = described_games.matrix_game(root), name or "matrix"
  if isinstance(root, described_games.Decision | described_games.Chance):
    tree, actions = described_games.read_tree(root, name=name or "tree", max_nodes=max_nodes)
    return game_tree.index(tree, wanted, actions)
  if name:
    raise ValueError(f"name must be left out for a game of OpenSpiel, got {name!r}")
  return game_tree.index(openspiel.read_tree(root, max_nodes=max_nodes, cache=cache), wanted)


# --- observations for networks ---


def state_observations(game: Game, observations: jax.Array) -> jax.Array:
  """Returns the mover's observation at each information state, `[S, ...]` from `[H, n, ...]`."""
  num_states, num_histories = len(game.legal), len(game.parents)
  states = jnp.where(game.info_states < 0, num_states, game.info_states)
  first = jnp.full(num_states, num_histories).at[states].min(jnp.arange(num_histories), mode="drop")
  return observations[first, game.state_players]


def information_state_tensors(game: Game) -> jax.Array:
  """Returns OpenSpiel's information state tensor of each player at each history, `[H, n, O]`.

  float32, and zero at chance and terminal histories. For simultaneous moves they have one part
  more, see `openspiel.information_state_tensor`. This walks the game again, which takes seconds for
  100,000 histories. A described game has `decision_indicators` instead.

  Raises:
    ValueError: if OpenSpiel has no such tensors for this game.
  """
  if game.layout.described_actions:
    return decision_indicators(game)
  parents, actions = np.asarray(game.parents), np.asarray(game.actions)
  return jnp.asarray(openspiel.information_state_tensors(game.layout.name, parents, actions))


def decision_indicators(game: Game) -> jax.Array:
  """Returns observations of any game, made from its tree: `[H, n, S + Q]`, float32, of 0 and 1.

  A player's row marks the information states at which it may decide next, and the sequence that it
  played last. For the player who moves that is its information state, and no more than it knows.
  The rows of the others tell a critic which of their states play leads to. Rows are zero at chance
  and terminal histories.
  """
  num_states, num_sequences = len(game.legal), len(game.sequence_places)
  players, states = np.asarray(game.players), np.asarray(game.info_states)
  parents, last = np.asarray(game.parents), np.asarray(game.sequences)
  marked = np.zeros((len(parents), game.num_players, num_states + num_sequences), np.float32)
  for start, stop in reversed(game.layout.levels):
    deciding = start + np.flatnonzero(players[start:stop] >= 0)
    marked[deciding, players[deciding]] = 0  # its later decisions are not its next
    marked[deciding, players[deciding], states[deciding]] = 1
    if start:
      np.maximum.at(marked, parents[start:stop], marked[start:stop])
  node, player = np.nonzero(last < num_sequences)
  marked[node, player, num_states + last[node, player]] = 1
  marked[players < 0] = 0
  return jnp.asarray(marked)


def observation_histories(game: Game, observations: jax.Array) -> jax.Array:
  """Returns all observations up to each history as a sequence, `[H, n, L, ...]`, for an LSTM.

  The newest observation comes last, and rows before the first decision are zero. L is the largest
  number of decisions on a path through the game.

  Args:
    game: the game.
    observations: `[H, n, ...]`, such as `information_state_tensors`.
  """
  parents, players = np.asarray(game.parents), np.asarray(game.players)
  length = sum(map(len, game.layout.state_levels))
  none = len(parents)  # the number of a row of zeros
  paths = np.full((len(parents), length), none)
  for start, stop in game.layout.levels:
    if start:
      paths[start:stop] = paths[parents[start:stop]]
    deciding = start + np.flatnonzero(players[start:stop] >= 0)
    paths[deciding] = np.concatenate([paths[deciding, 1:], deciding[:, None]], axis=1)
  used = (paths != none).any(0)
  padded = jnp.concatenate([observations, jnp.zeros_like(observations[:1])])
  return jnp.moveaxis(padded[paths[:, used]], 1, 2)


# --- values ---


def expected_values(game: Game, policy: Any) -> jax.Array:
  """Returns each player's expected utility `[n]` when all play `policy` `[S, A]`.

  Raises:
    ValueError: if the shape is wrong, or a NumPy array or list does not hold a policy. So do all
      functions of this module.
  """
  return _expected_values(game, policy_arrays.checked(game, policy))


def reach_probabilities(game: Game, policy: Any) -> jax.Array:
  """Returns the reach probabilities `[H, n + 1]` of each player and, last, of chance.

  Each is the product of that player's action probabilities on the path to the history. The product
  over the last axis is the probability of the history.
  """
  return _reach_probabilities(game, policy_arrays.checked(game, policy))


def best_response_values(game: Game, policy: Any) -> jax.Array:
  """Returns the utility `[n]` of each player's best response to the others' `policy`."""
  return _best_response_values(game, policy_arrays.checked(game, policy))


def nash_conv(game: Game, policy: Any) -> jax.Array:
  """Returns NashConv, the sum over players of what a best response would gain; a scalar.

  It is 0 at an equilibrium, up to rounding: float32 may give a small negative number.
  """
  return _nash_conv(game, policy_arrays.checked(game, policy))


def is_constant_sum(game: Game) -> bool:
  """Tells whether there are two players whose utilities have the same sum at every end of the game.

  Only there is it proved that the averages of `cfr` and the other methods near an equilibrium.
  """
  utilities = np.asarray(game.utilities, float)[np.asarray(game.terminals)]
  # Rounding of the sum of two float32.
  return game.num_players == 2 and bool(np.ptp(utilities.sum(1)) <= 1e-6 * np.abs(utilities).max())


def exploitability(game: Game, policy: Any) -> jax.Array:
  """Returns `nash_conv` divided by the number of players."""
  return nash_conv(game, policy) / game.num_players


def history_values(game: Game, policy: Any) -> jax.Array:
  """Returns each player's expected utility `[H, n]` after each history when all play `policy`.

  The value q(h, a) of an action is the value of the history `game.children[h, a]`.
  """
  return _history_values(game, policy_arrays.checked(game, policy))


def counterfactual_values(game: Game, policy: Any) -> jax.Array:
  """Returns the counterfactual value `[S, A]` of each action, 0 for illegal ones.

  At a state s of player i this is the sum, over the histories h in s, of the probability with which
  the other players and chance reach h times i's expected utility after the action.
  """
  return _counterfactual_values(game, policy_arrays.checked(game, policy))


@jax.jit
def _expected_values(game: Game, policy: jax.Array) -> jax.Array:
  reach = sequence_reach(game, policy)
  last = game.sequences[game.terminals]
  probs = game.chance_reach[game.terminals]
  for player in range(game.num_players):
    probs = probs * segments.take(reach, last[:, player])
  # Not a matrix product, because accelerators round its factors to fewer bits.
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
    # The payoffs above serve both passes, so there is no second pass over all histories.
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


# --- passes over one player's sequences, which the solvers use too ---


def sequence_probs(game: Game, player: int, policy: jax.Array) -> jax.Array:
  """Returns the entries of an array `[S, A]` at one player's sequences, `[Q]`."""
  places = game.sequence_places[game.layout.sequence_slice(player)]
  return segments.take(policy.reshape(-1), places)


def by_state(game: Game, values: list[jax.Array]) -> jax.Array:
  """Returns one array `[S, A]` from each player's values `[Q]`; illegal actions have 0."""
  joined = jnp.concatenate([*values, jnp.zeros(1, values[0].dtype)])
  return segments.take(joined, game.sequence_numbers)


def own_reach(game: Game, player: int, probs: jax.Array) -> jax.Array:
  """Returns a player's own reach `[Q]` of each sequence, from its action probabilities `[Q]`."""
  tree, levels = game.player_trees[player], game.layout.sequence_levels[player]
  reach: list[jax.Array] = []
  for level, (start, stop) in enumerate(levels):
    here = probs[start - levels[0][0] : stop - levels[0][0]]
    reach.append(here * segments.take(reach[-1], tree.parents[level - 1]) if level else here)
  return jnp.concatenate(reach) if reach else probs


def sequence_reach(game: Game, policy: jax.Array) -> jax.Array:
  """Returns the own reach `[Q + 1]` of all players' sequences; the last entry (no move) is 1."""
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
  """Returns each player's utilities times the reach of chance, in the tables of its tree."""
  payoffs = game.utilities[game.terminals] * game.chance_reach[game.terminals][:, None]
  return tuple(
    segments.gather(payoffs[:, player], tree.terminals)
    for player, tree in enumerate(game.player_trees)
  )


def sequence_payoffs(
  game: Game, player: int, reach: jax.Array, payoffs: tuple[jax.Array, ...]
) -> jax.Array:
  """Returns a player's payoffs `[Q + 1]` times the others' reach, summed for each own sequence.

  A terminal history counts for the last own sequence before it. The last entry sums those that the
  player reaches without a move.

  Args:
    game: the game.
    player: the player.
    reach: `[Q + 1]` from `sequence_reach`; only the other players' entries matter.
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
  """Computes a player's counterfactual values backwards, from the last own moves to the first.

  Args:
    game: the game.
    player: the player.
    payoffs: `[Q + 1]` from `sequence_payoffs`.
    probs: `[Q]` the player's action probabilities; None for the best action at each state.

  Returns:
    Counterfactual values `[Q]` of actions and `[G]` of the player's G states, and the value of the
    game.
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
