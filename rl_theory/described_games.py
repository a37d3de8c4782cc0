"""Games that are described in Python: a tree of nested nodes, or a payoff matrix.

`games.compile_game` compiles them to the same arrays as the games of OpenSpiel. A tree is made of
three kinds of nodes:

- `Decision`: a player moves. Decisions of one player with the same `state` are one information
  state, between which the player cannot tell.
- `Chance`: a move of chance, with the probability of each outcome.
- The end: the gain of player 0 in a two-player zero-sum game (a number), or the utility of each
  player (a tuple). A tuple allows any number of players and general sums.

Actions are numbered by their names, in the order in which a walk in breadth-first order meets them.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_theory import openspiel
from sharding import checks

_SUM = 1e-5  # how far probabilities may be from summing to 1: files round them to six digits


@dataclasses.dataclass(frozen=True)
class Decision:
  """A history where a player moves.

  Attributes:
    player: 0, 1, ...
    state: name of the player's information state.
    moves: the node after each action, by the name of the action.
  """

  player: int
  state: str
  moves: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chance:
  """A history where chance moves.

  Attributes:
    moves: `(probability, node)` of each outcome, by its name.
  """

  moves: Mapping[str, tuple[Any, Any]]


def matrix_game(payoffs: Any) -> Decision:
  """Returns the tree of a game in which all players move once, at the same time.

  Args:
    payoffs: `[A, B]` what player 0 gains from player 1, or `[n, A_1, ..., A_n]` the utility of each
      of n players. A NumPy or JAX array, or nested lists. To change the payoffs of a compiled game
      under `jit` or `vmap`, replace its `utilities`: the terminal histories, which come last, are
      in the order of the array.

  Raises:
    ValueError: if the shape is another one, or a payoff is not finite.

  Example:
    >>> matrix_game([[1, -1], [-1, 1]]).moves["0"].state
    'player 1'
  """
  try:
    table = np.asarray(payoffs)
    if table.dtype == object and not all(isinstance(x, numbers.Real) for x in table.flat):
      raise TypeError
    table = table.astype(float, casting="unsafe" if table.dtype == object else "same_kind")
  except (OverflowError, TypeError, ValueError) as error:
    raise ValueError(
      f"payoffs must be real numbers in rows of one length, got {payoffs!r}"
    ) from error
  if table.ndim == 2:
    table = np.stack([table, 0 - table])
  if not table.ndim or table.ndim != len(table) + 1 or not table.size:
    raise ValueError(
      f"payoffs must be [A, B] or [n, A_1, ..., A_n], got shape {list(np.shape(payoffs))}"
    )
  checks.finite("payoffs", table)

  def node(played: tuple[int, ...]) -> Any:
    player = len(played)
    if player == len(table):
      return tuple(float(own[played]) for own in table)
    moves = {str(action): node((*played, action)) for action in range(table.shape[1 + player])}
    return Decision(player, f"player {player}", moves)

  root = node(())
  assert isinstance(root, Decision)  # there is at least one player
  return root


def read_tree(root: Any, *, name: str, max_nodes: int) -> tuple[openspiel.Tree, tuple[str, ...]]:
  """Returns the tree of a description and the name of each action.

  Args:
    root: a `Decision` or `Chance`.
    name: of the game, for messages and files.
    max_nodes: a larger game is refused.

  Raises:
    ValueError: if the description is not a game; the message names the moves that lead to the node.
  """
  walk = _Walk(name)
  if not isinstance(root, Decision | Chance):
    raise ValueError(f"game {name} must start with a Decision or a Chance, got {root!r}")
  nodes: list[Any] = [root]
  for number, node in enumerate(nodes):  # grows as it goes: breadth-first order
    nodes += walk.visit(number, node)
    if len(nodes) > max_nodes:
      raise ValueError(openspiel.too_large(name, max_nodes, f"at least {len(nodes)} nodes"))
  return walk.tree(), tuple(walk.action_numbers)


class _Walk:
  """What has been read of a tree."""

  def __init__(self, name: str):
    self.name = name
    self.parents, self.actions, self.chance_probs = [-1], [-1], [1.0]
    self.edges = [""]  # name of the move that leads to a node
    self.players: list[int] = []
    self.info_states: list[int] = []
    self.ends: dict[int, tuple[float, ...]] = {}
    self.action_numbers: dict[str, int] = {}
    self.state_numbers: dict[tuple[int, str], int] = {}
    self.state_moves: list[set[str]] = []

  def visit(self, number: int, node: Any) -> list[Any]:
    """Reads one node and returns its children in the order of their actions."""
    if isinstance(node, Decision):
      return self._decision(number, node)
    self.info_states.append(-1)
    if isinstance(node, Chance):
      return self._chance(number, node)
    self.players.append(openspiel.TERMINAL)
    self.ends[number] = self._utilities(number, node)
    return []

  def _decision(self, number: int, node: Decision) -> list[Any]:
    if not checks.is_integer(node.player) or node.player < 0:
      raise self._wrong(number, f"player must be 0, 1, ..., got {node.player!r}")
    if not isinstance(node.state, str):
      raise self._wrong(number, f"state must be a string, got {node.state!r}")
    self._check_moves(number, node.moves)
    key = (int(node.player), node.state)
    state = self.state_numbers.setdefault(key, len(self.state_numbers))
    if state == len(self.state_moves):
      self.state_moves.append(set(node.moves))
    elif self.state_moves[state] != set(node.moves):
      raise self._wrong(
        number,
        f"player {key[0]} has the moves {sorted(node.moves)} at state {node.state!r} and "
        f"{sorted(self.state_moves[state])} elsewhere: the moves at one information state must be "
        "the same",
      )
    for move in node.moves:
      self.action_numbers.setdefault(move, len(self.action_numbers))
    moves = sorted(node.moves, key=self.action_numbers.__getitem__)  # as OpenSpiel orders them
    self.players.append(key[0])
    self.info_states.append(state)
    self.actions += [self.action_numbers[move] for move in moves]
    self.chance_probs += [1.0] * len(moves)
    self._add_edges(number, moves)
    return [node.moves[move] for move in moves]

  def _chance(self, number: int, node: Chance) -> list[Any]:
    self._check_moves(number, node.moves)
    for move, outcome in node.moves.items():
      if not isinstance(outcome, tuple) or len(outcome) != 2 or not _is_number(outcome[0]):
        raise self._wrong(number, f"outcome {move!r} must be (probability, node), got {outcome!r}")
    probs = [float(prob) for prob, _ in node.moves.values()]
    total = math.fsum(probs)
    if min(probs) <= 0 or abs(total - 1) > _SUM:
      raise self._wrong(number, f"probabilities must be positive and sum to 1, got {probs}")
    self.players.append(openspiel.CHANCE)
    self.actions += range(len(probs))
    self.chance_probs += [prob / total for prob in probs]
    self._add_edges(number, node.moves)
    return [after for _, after in node.moves.values()]

  def _check_moves(self, number: int, moves: Any) -> None:
    if not isinstance(moves, Mapping) or not moves or not all(isinstance(m, str) for m in moves):
      raise self._wrong(number, f"moves must be a dictionary with names as keys, got {moves!r}")

  def _add_edges(self, number: int, moves: Any) -> None:
    self.edges += moves
    self.parents += [number] * len(moves)

  def _utilities(self, number: int, node: Any) -> tuple[float, ...]:
    given = node if isinstance(node, tuple) else (node,)
    if not given or not all(_is_number(utility) for utility in given):
      raise self._wrong(
        number,
        f"must be a Decision, a Chance, player 0's gain or a tuple of utilities, got {node!r}",
      )
    utilities = tuple(float(utility) for utility in given)
    if not isinstance(node, tuple):
      utilities = (utilities[0], -utilities[0])
    first = next(iter(self.ends.values()), utilities)
    if len(first) != len(utilities):
      raise self._wrong(
        number, f"must have utilities of {len(first)} players, as other ends, got {node!r}"
      )
    return utilities

  def _wrong(self, number: int, problem: str) -> ValueError:
    path = []
    while number > 0:
      path.append(self.edges[number])
      number = self.parents[number]
    where = " > ".join(map(repr, path[::-1])) if path else "its root"
    return ValueError(f"game {self.name} at {where}: {problem}")

  def tree(self) -> openspiel.Tree:
    num_players = len(next(iter(self.ends.values())))
    for player, state in self.state_numbers:
      if player >= num_players:
        raise ValueError(
          f"game {self.name}: player {player} moves at state {state!r}, but the ends have "
          f"utilities of {num_players} players"
        )
    if not self.state_numbers:
      raise ValueError(f"game {self.name} must have a decision")
    utilities = np.zeros((len(self.parents), num_players))
    utilities[list(self.ends)] = list(self.ends.values())
    return openspiel.Tree(
      np.array(self.parents, np.int32),
      np.array(self.actions, np.int32),
      np.array(self.players, np.int8),
      np.array(self.info_states, np.int32),
      np.array(self.chance_probs),
      utilities,
      tuple(state for _, state in self.state_numbers),
      self.name,
      len(self.action_numbers),
    )


def _is_number(value: Any) -> bool:
  real = isinstance(value, numbers.Real) or (np.ndim(value) == 0 and hasattr(value, "dtype"))
  if not real or isinstance(value, bool):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer or a fraction beyond the floats
    return False
