"""The arrays of a compiled game, and how they are made from a tree.

All information states of a player after the same number of its own moves form one slice. Own reach
is computed through these slices forwards, counterfactual values backwards. The number of own moves
orders the states, not the depth of the tree, because the histories of one information state can lie
at different depths if a player does not see a move of another.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_theory import openspiel, segments


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """The static part of a game; games with the same layout share compiled code.

  Attributes:
    name: OpenSpiel's string of the game, or the name of a described one.
    num_players: n.
    num_actions: A, the number of distinct actions.
    max_children: W, the largest number of children of a history.
    levels: `(start, stop)` of the histories at each depth of the tree.
    state_levels: for each player, `(start, stop)` of its information states after 0, 1, ... own
      moves.
    sequence_levels: for each player, `(start, stop)` of the sequences at these states.
    sampling_widths: for each player, the largest number of histories at each depth in a sample that
      tries all actions of this player and one of everybody else.
    state_strings: OpenSpiel's string of each information state, or its name in a description.
    described_actions: the name of each action of a described game; empty for games of OpenSpiel,
      which knows their names.
  """

  name: str
  num_players: int
  num_actions: int
  max_children: int
  levels: tuple[tuple[int, int], ...]
  state_levels: tuple[tuple[tuple[int, int], ...], ...]
  sequence_levels: tuple[tuple[tuple[int, int], ...], ...]
  sampling_widths: tuple[tuple[int, ...], ...]
  state_strings: tuple[str, ...]
  described_actions: tuple[str, ...] = ()

  def __hash__(self) -> int:
    return hash((self.name, self.levels, self.state_levels))  # the strings would take long

  def __eq__(self, other: object) -> bool:
    if self is other:
      return True
    return isinstance(other, Layout) and dataclasses.astuple(self) == dataclasses.astuple(other)

  def player_slice(self, player: int) -> slice:
    """Returns the slice of the player's information states."""
    return _whole(self.state_levels[player])

  def sequence_slice(self, player: int) -> slice:
    """Returns the slice of the player's sequences."""
    return _whole(self.sequence_levels[player])


def _whole(levels: tuple[tuple[int, int], ...]) -> slice:
  return slice(levels[0][0], levels[-1][1]) if levels else slice(0, 0)


class PlayerTree(NamedTuple):
  """One player's decisions as a tree of sequences, which are pairs of a state and a legal action.

  Sequences are in the order of their states, and at one state in the order of actions. Here a
  player's Q sequences are numbered from its own first one, and number Q means "no move yet".

  Attributes:
    terminals: the terminal histories (numbered among themselves) whose last own sequence is q, as
      segments for q in `[Q + 1]`.
    opponents: tables laid out like `terminals.rows`, `[n, w, players - 1]`: the others' last
      sequences, numbered among those of all players.
    states: the sequences of each state, as segments.
    state_of: `[Q]` the state of a sequence, numbered from the player's first.
    level_states: for each level, `states` of that level alone.
    parents: for each level but the first, `[Q_k]` the sequence that leads to a sequence's state,
      numbered from the start of the level before.
    children: for each level but the first, the states that each sequence leads to, as segments.
  """

  terminals: segments.Segments
  opponents: tuple[Any, ...]
  states: segments.Segments
  state_of: Any
  level_states: tuple[segments.Segments, ...]
  parents: tuple[Any, ...]
  children: tuple[segments.Segments, ...]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "parents",
    "actions",
    "players",
    "info_states",
    "first_children",
    "num_children",
    "children",
    "chance_probs",
    "chance_reach",
    "utilities",
    "terminals",
    "sequences",
    "sequence_places",
    "sequence_numbers",
    "legal",
    "state_players",
    "state_chance_reach",
    "player_trees",
  ],
  meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class Game:
  """A game as arrays, made by `games.compile_game`.

  There are H histories in breadth-first order (the root is 0, children of one history are
  adjacent), of which Z are terminal, and S information states of all n players. The states of
  player 0 come first; each player's are sorted by the number of own moves before them, then by
  first visit. The Q sequences are pairs of a state and a legal action. To change the payoffs on the
  same tree, replace `utilities` with `dataclasses.replace`, also under `jax.vmap`.

  Attributes:
    parents: `[H]` the history before, -1 for the root.
    actions: `[H]` OpenSpiel's number of the action that leads here, -1 for the root.
    players: `[H]` the player who moves: 0, 1, ..., `CHANCE` or `TERMINAL`.
    info_states: `[H]` the mover's information state, -1 if no player moves.
    first_children: `[H]` the first child; the others follow it.
    num_children: `[H]`.
    children: `[H, A]` the history after each action of a player, -1 for illegal actions and if no
      player moves.
    chance_probs: `[H]` probability of the edge into h if chance moved, else 1.
    chance_reach: `[H]` product of `chance_probs` on the path to h.
    utilities: `[H, n]` of the players at terminal histories, else 0.
    terminals: `[Z]` the terminal histories.
    sequences: `[H, n]` each player's last sequence before h, Q for none.
    sequence_places: `[Q]` the place s A + a of a sequence in a flat policy.
    sequence_numbers: `[S, A]` the sequence of a legal action, Q for illegal ones.
    legal: `[S, A]` which actions are legal.
    state_players: `[S]` the player of each information state.
    state_chance_reach: `[S]` sum of `chance_reach` over the histories of an information state.
    player_trees: each player's decisions, for passes over information states only.
    layout: the static part.
  """

  parents: Any
  actions: Any
  players: Any
  info_states: Any
  first_children: Any
  num_children: Any
  children: Any
  chance_probs: Any
  chance_reach: Any
  utilities: Any
  terminals: Any
  sequences: Any
  sequence_places: Any
  sequence_numbers: Any
  legal: Any
  state_players: Any
  state_chance_reach: Any
  player_trees: tuple[PlayerTree, ...]
  layout: Layout

  @property
  def num_players(self) -> int:
    """Number of players n, without chance."""
    return self.layout.num_players

  @property
  def state_strings(self) -> tuple[str, ...]:
    """OpenSpiel's string of each information state, in the order of the rows of a policy."""
    return self.layout.state_strings

  def __repr__(self) -> str:
    rows, columns = self.legal.shape[-2:]
    return (
      f"Game({self.layout.name!r}, players={self.num_players}, histories={self.parents.shape[-1]}, "
      f"information states={rows}, actions={columns})"
    )


def index(tree: openspiel.Tree, dtype: Any, described_actions: tuple[str, ...] = ()) -> Game:
  """Returns the game of a tree.

  Args:
    tree: all histories.
    dtype: of probabilities and utilities.
    described_actions: as in `Layout`.

  Raises:
    ValueError: if a player forgets its own moves, or one information state has different legal
      actions at different histories.
  """
  num_actions, num_players = tree.num_actions, tree.utilities.shape[1]
  num_states = len(tree.state_strings)
  levels = _levels(tree.parents)
  first_children = np.searchsorted(tree.parents, np.arange(len(tree.parents))).astype(np.int32)
  num_children = np.bincount(tree.parents[1:], minlength=len(tree.parents)).astype(np.int32)
  movers = np.flatnonzero(tree.info_states >= 0)
  first_visits = np.zeros(num_states, int)
  first_visits[tree.info_states[movers][::-1]] = movers[::-1]
  state_players = tree.players[first_visits]

  # Up to here information states are numbered by first visit; renumber them.
  sequences, moves = _last_sequences(tree, levels)
  state_moves = moves[first_visits, state_players]
  new_to_old = np.lexsort((np.arange(num_states), state_moves, state_players))
  old_to_new = np.argsort(new_to_old)
  _check_recall(tree, sequences, movers, first_visits)
  moved = sequences >= 0
  renumbered = old_to_new[np.where(moved, sequences // num_actions, 0)]
  none_yet = num_states * num_actions
  sequences = np.where(moved, renumbered * num_actions + sequences % num_actions, none_yet)
  info_states = np.where(tree.info_states >= 0, old_to_new[tree.info_states], -1)
  state_players, state_moves = state_players[new_to_old], state_moves[new_to_old]
  strings = tuple(tree.state_strings[state] for state in new_to_old)

  decided = np.flatnonzero((tree.parents >= 0) & (tree.players[tree.parents] >= 0))
  children = np.full((len(tree.parents), num_actions), -1, np.int32)
  children[tree.parents[decided], tree.actions[decided]] = decided
  legal = np.zeros((num_states, num_actions), bool)
  legal[info_states[tree.parents[decided]], tree.actions[decided]] = True
  _check_legal(info_states[movers], num_children[movers], legal, strings)

  # Only legal pairs are sequences: in bidding games most of [S, A] is illegal.
  sequence_places = np.flatnonzero(legal.reshape(-1))
  num_sequences = len(sequence_places)
  numbers = np.full(none_yet + 1, num_sequences)
  numbers[sequence_places] = np.arange(num_sequences)
  sequences = numbers[sequences]

  chance_reach = np.ones(len(tree.parents))
  for start, stop in levels[1:]:
    chance_reach[start:stop] = (
      chance_reach[tree.parents[start:stop]] * tree.chance_probs[start:stop]
    )
  terminals = np.flatnonzero(tree.players == openspiel.TERMINAL)
  parent_sequences = np.full(num_states, num_sequences)
  parent_sequences[info_states[movers]] = sequences[movers, tree.players[movers]]
  state_levels = tuple(
    _state_levels(state_players, state_moves, player) for player in range(num_players)
  )
  first_sequences = np.concatenate([[0], np.cumsum(legal.sum(1))]).tolist()
  layout = Layout(
    name=tree.name,
    num_players=num_players,
    num_actions=num_actions,
    max_children=int(num_children.max()),
    levels=levels,
    state_levels=state_levels,
    sequence_levels=tuple(
      tuple((first_sequences[start], first_sequences[stop]) for start, stop in levels_of_player)
      for levels_of_player in state_levels
    ),
    sampling_widths=tuple(
      _sampling_widths(tree, levels, first_children, num_children, player)
      for player in range(num_players)
    ),
    state_strings=strings,
    described_actions=described_actions,
  )

  def integers(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32)

  largest = np.max(np.abs(tree.utilities))
  if largest > np.finfo(dtype).max:
    raise ValueError(
      f"game {tree.name} has a utility of size {largest:g}, too large for {np.dtype(dtype).name}: "
      "divide all utilities by a number"
    )

  game = Game(
    parents=integers(tree.parents),
    actions=integers(tree.actions),
    players=integers(tree.players),
    info_states=integers(info_states),
    first_children=integers(first_children),
    num_children=integers(num_children),
    children=integers(children),
    chance_probs=tree.chance_probs.astype(dtype),
    chance_reach=chance_reach.astype(dtype),
    utilities=tree.utilities.astype(dtype),
    terminals=integers(terminals),
    sequences=integers(sequences),
    sequence_places=integers(sequence_places),
    sequence_numbers=integers(numbers[:none_yet].reshape(legal.shape)),
    legal=legal,
    state_players=integers(state_players),
    state_chance_reach=np.bincount(
      info_states[movers], chance_reach[movers], minlength=num_states
    ).astype(dtype),
    player_trees=tuple(
      _player_tree(player, layout, sequences[terminals], parent_sequences, np.nonzero(legal)[0])
      for player in range(num_players)
    ),
    layout=layout,
  )
  return jax.device_put(game)


def _levels(parents: np.ndarray) -> tuple[tuple[int, int], ...]:
  levels = [(0, 1)]
  while levels[-1][1] < len(parents):
    stop = levels[-1][1]
    levels.append((stop, int(np.searchsorted(parents, stop))))
  return tuple(levels)


def _last_sequences(
  tree: openspiel.Tree, levels: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns each player's last sequence (-1 for none) and number of moves before h, `[H, n]`."""
  sequences = np.full(tree.utilities.shape, -1)
  moves = np.zeros(tree.utilities.shape, int)
  for start, stop in levels[1:]:
    parents = tree.parents[start:stop]
    sequences[start:stop], moves[start:stop] = sequences[parents], moves[parents]
    by_player = np.flatnonzero(tree.players[parents] >= 0)
    rows, columns = start + by_player, tree.players[parents[by_player]]
    last = tree.info_states[parents[by_player]] * tree.num_actions + tree.actions[rows]
    sequences[rows, columns] = last
    moves[rows, columns] += 1
  return sequences, moves


def _check_recall(
  tree: openspiel.Tree, sequences: np.ndarray, movers: np.ndarray, first_visits: np.ndarray
) -> None:
  own = sequences[movers, tree.players[movers]]
  first = first_visits[tree.info_states[movers]]
  forgotten = np.flatnonzero(own != sequences[first, tree.players[movers]])
  if forgotten.size:
    state = tree.info_states[movers[forgotten[0]]]
    raise ValueError(
      f"game {tree.name} has imperfect recall: at information state "
      f"{tree.state_strings[state]!r} player {tree.players[first_visits[state]]} does not know its "
      "own earlier moves; best responses and CFR need perfect recall"
    )


def _check_legal(
  info_states: np.ndarray, num_children: np.ndarray, legal: np.ndarray, strings: tuple[str, ...]
) -> None:
  wrong = np.flatnonzero(legal.sum(1)[info_states] != num_children)
  if wrong.size:
    raise ValueError(
      f"information state {strings[info_states[wrong[0]]]!r} has different legal actions at "
      "different histories, so the mover could tell them apart: correct the game's strings"
    )


def _state_levels(
  state_players: np.ndarray, state_moves: np.ndarray, player: int
) -> tuple[tuple[int, int], ...]:
  start = int(np.searchsorted(state_players, player))
  sizes = np.bincount(state_moves[state_players == player])
  stops = start + np.cumsum(sizes)
  return tuple(zip((stops - sizes).tolist(), stops.tolist(), strict=True))


def _player_tree(
  player: int, layout: Layout, last: np.ndarray, parent_sequences: np.ndarray, state_of: np.ndarray
) -> PlayerTree:
  """Returns one player's tree; `last` is `[Z, n]`, `parent_sequences` `[S]`, `state_of` `[Q]`."""
  own, states = layout.sequence_slice(player), layout.player_slice(player)
  none_yet, count = len(state_of), own.stop - own.start
  terminals = segments.make(
    np.where(last[:, player] == none_yet, count, last[:, player] - own.start), count + 1
  )
  others = np.delete(last, player, axis=1)
  padded = np.concatenate([others, np.full((1, others.shape[1]), none_yet)])
  level_states, parents, children = [], [], []
  before = 0
  for number, (start, stop) in enumerate(layout.state_levels[player]):
    first, end = layout.sequence_levels[player][number]
    local = state_of[first:end] - start
    level_states.append(segments.make(local, stop - start))
    if number:
      leading = parent_sequences[start:stop] - before
      parents.append(leading[local].astype(np.int32))
      children.append(segments.make(leading, first - before))
    before = first
  local = state_of[own] - states.start
  return PlayerTree(
    terminals=terminals,
    opponents=tuple(padded[rows].astype(np.int32) for rows in terminals.rows),
    states=segments.make(local, states.stop - states.start),
    state_of=local.astype(np.int32),
    level_states=tuple(level_states),
    parents=tuple(parents),
    children=tuple(children),
  )


def _sampling_widths(
  tree: openspiel.Tree,
  levels: tuple[tuple[int, int], ...],
  first_children: np.ndarray,
  num_children: np.ndarray,
  player: int,
) -> tuple[int, ...]:
  """Returns the largest number of histories at each depth, see `Layout.sampling_widths`."""
  counts = np.zeros((len(tree.parents), len(levels)), np.int32)
  for depth, (start, stop) in reversed(list(enumerate(levels))):
    inner = start + np.flatnonzero(num_children[start:stop])
    if inner.size:
      below = counts[slice(*levels[depth + 1])]
      offsets = first_children[inner] - levels[depth + 1][0]
      totals, largest = np.add.reduceat(below, offsets), np.maximum.reduceat(below, offsets)
      counts[inner] = np.where((tree.players[inner] == player)[:, None], totals, largest)
    counts[start:stop, depth] = 1
  return tuple(counts[0].tolist())
