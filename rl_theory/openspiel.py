"""Reads whole game trees from OpenSpiel; the only module that imports it.

The rules of a game always come from OpenSpiel. A tree is read in breadth-first order into flat
arrays and cached on disk under the game's string and OpenSpiel's version, so that a large game is
walked once. OpenSpiel is imported only when it is needed; compiled arrays work without it.
"""

import difflib
import hashlib
import os
import pathlib
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

CHANCE, TERMINAL = -1, -2  # values of `players` for histories where no player moves
_FORMAT = 1  # of cache files: increase it whenever a field of `Tree` changes its meaning
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Tree(NamedTuple):
  """All histories of a game in breadth-first order; the root is 0, siblings are adjacent.

  Attributes:
    parents: `[H]` int32, -1 for the root.
    actions: `[H]` int32, OpenSpiel's number of the action that leads here, -1 for the root.
    players: `[H]` int8, the player who moves: 0, 1, ..., `CHANCE` or `TERMINAL`.
    info_states: `[H]` int32, the mover's information state, numbered by first visit; -1 if no
      player moves.
    chance_probs: `[H]` float64, probability of the edge into h if chance moved, else 1.
    utilities: `[H, n]` float64, of the players at terminal histories, else 0.
    state_strings: OpenSpiel's string of each information state.
    name: OpenSpiel's string of the game.
    num_actions: number of distinct actions.
  """

  parents: np.ndarray
  actions: np.ndarray
  players: np.ndarray
  info_states: np.ndarray
  chance_probs: np.ndarray
  utilities: np.ndarray
  state_strings: tuple[str, ...]
  name: str
  num_actions: int


def read_tree(
  game_or_string: Any, *, max_nodes: int, cache: str | os.PathLike[str] | None = None
) -> Tree:
  """Returns the whole tree of a game.

  Args:
    game_or_string: such as "kuhn_poker(players=3)", or a game object of OpenSpiel. Games given by a
      string are cached, except those read from a file or written in Python, whose rules can change
      under the same string.
    max_nodes: a larger game is refused.
    cache: folder of the cache; None means `$BOOTSTRAX_CACHE` or `~/.cache/bootstrax`.

  Raises:
    ImportError: if OpenSpiel is not installed.
    ValueError: if OpenSpiel has no such game, the game does not have a finite tree of information
      states, or it has more than `max_nodes` nodes.
  """
  game = load_game(game_or_string)
  name = str(game)
  path = _cache_path(name, cache) if _cacheable(game_or_string, game) else None
  tree = None if path is None else _load(path, name)
  if tree is not None and len(tree.parents) > max_nodes:
    raise ValueError(too_large(name, max_nodes, f"{len(tree.parents)} nodes"))
  if tree is None:
    tree = _walk(game, name, max_nodes)
    if path is not None:
      _save(path, tree)
  return tree


def load_game(game_or_string: Any, *, needs_info_states: bool = True) -> Any:
  """Returns OpenSpiel's game; simultaneous moves become hidden moves in turn.

  Args:
    game_or_string: as in `read_tree`.
    needs_info_states: whether a game without information state strings is refused.
  """
  pyspiel = _pyspiel()
  game = game_or_string
  if isinstance(game, str):
    short_name = game.split("(")[0].strip()
    known = pyspiel.registered_names()
    if short_name not in known:
      closest = difflib.get_close_matches(short_name, known, n=5, cutoff=0.5)
      hint = f"did you mean {', '.join(closest)}?" if closest else "none has a similar name"
      raise ValueError(f"game must be one of OpenSpiel's, got {game!r}: {hint}")
    try:
      game = pyspiel.load_game(game)
    except pyspiel.SpielError as error:
      raise ValueError(f"OpenSpiel cannot load the game {game!r}: {error}") from error
  if not isinstance(game, pyspiel.Game):
    raise ValueError(f"game must be a string or a game of OpenSpiel, got {type(game).__name__}")
  kind = game.get_type()
  if kind.dynamics == pyspiel.GameType.Dynamics.SIMULTANEOUS:
    game = pyspiel.convert_to_turn_based(game)
    kind = game.get_type()
  if kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
    raise ValueError(f"game must be turn-based or simultaneous, got {game} with {kind.dynamics}")
  if kind.chance_mode == pyspiel.GameType.ChanceMode.SAMPLED_STOCHASTIC:
    raise ValueError(f"game {game} samples chance without explicit probabilities: no tree exists")
  nameless = not kind.provides_information_state_string and not _is_a_search(game)
  if needs_info_states and nameless:
    raise ValueError(f"game {game} has no information state strings, which identify the states")
  return game


def _is_a_search(game: Any) -> bool:
  """Returns whether the game has one player and no chance, so that own moves identify a state."""
  deterministic = game.get_type().chance_mode == _pyspiel().GameType.ChanceMode.DETERMINISTIC
  return bool(game.num_players() == 1 and deterministic)


def tensor_size(game: Any) -> int:
  """Returns the length of `information_state_tensor`.

  Raises:
    ValueError: if the game has no information state tensors.
  """
  if not game.get_type().provides_information_state_tensor:
    raise ValueError(f"game {game} has no information state tensors: pass your own observations")
  return int(
    game.information_state_tensor_size() + _hides_moves(game) * game.num_distinct_actions()
  )


def _hides_moves(game: Any) -> bool:
  """Returns whether `load_game` turned simultaneous moves into hidden moves in turn."""
  return bool(game.get_type().short_name == "turn_based_simultaneous_game")


def information_state_tensor(state: Any, player: int) -> np.ndarray:
  """Returns OpenSpiel's information state tensor of a player, with its last action where it hides.

  OpenSpiel's tensor leaves out a move that the others make at the same time, such as a bid. Even a
  critic that reads the tensors of all players would not see it. So in games of simultaneous moves
  the row ends with the player's own last action, which it knows, as one of A.
  """
  game = state.get_game()
  tensor = np.zeros(tensor_size(game), np.float32)
  known = state.information_state_tensor(player)
  tensor[: len(known)] = known
  if _hides_moves(game):
    own = [move.action for move in state.full_history() if move.player == player]
    tensor[[len(known) + action for action in own[-1:]]] = 1
  return tensor


def information_state_tensors(name: str, parents: np.ndarray, actions: np.ndarray) -> np.ndarray:
  """Returns the `information_state_tensor` of each player at each history, `[H, n, O]` float32.

  They are 0 at chance and terminal histories.

  Args:
    name: OpenSpiel's string of the game.
    parents, actions: of its tree.

  Raises:
    ValueError: if the game has no such tensors.
  """
  game = load_game(name)
  num_players = game.num_players()
  tensors = np.zeros((len(parents), num_players, tensor_size(game)), np.float32)
  states: dict[int, Any] = {}
  children = np.bincount(parents[1:], minlength=len(parents))
  for node, (parent, action) in enumerate(zip(parents.tolist(), actions.tolist(), strict=True)):
    state = game.new_initial_state() if parent < 0 else states[parent].child(action)
    if state.current_player() >= 0:
      for player in range(num_players):
        tensors[node, player] = information_state_tensor(state, player)
    if children[node]:
      states[node] = state
    if parent >= 0:  # a parent is no longer needed once all its children are read
      children[parent] -= 1
      if not children[parent]:
        del states[parent]
  return tensors


def advance_chance(state: Any, rng: np.random.Generator) -> Any:
  """Plays chance's moves in place, until a player moves or the game ends; returns the state."""
  while state.is_chance_node():
    actions, probs = zip(*state.chance_outcomes(), strict=True)
    state.apply_action(actions[draw(rng, np.array(probs))])
  return state


def draw(rng: np.random.Generator, probs: np.ndarray) -> int:
  """Returns an index drawn with probabilities `[W]`, which need not sum to 1."""
  sums = np.cumsum(probs, dtype=float)
  return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


def tabular_policy(rows: dict[str, list[tuple[int, float]]]) -> Any:
  """Returns OpenSpiel's policy with these (action, probability) pairs at each string."""
  return _pyspiel().TabularPolicy(rows)


def action_probabilities(name: str, paths: list[list[int]], policy: Any) -> list[dict[int, float]]:
  """Returns an OpenSpiel policy's action probabilities after each path of actions."""
  return [dict(policy.action_probabilities(state)) for state in _states(name, paths)]


def action_names(name: str, paths: list[list[int]], players: list[int]) -> list[dict[int, str]]:
  """Returns the names of a player's legal actions after each path of actions."""
  return [
    {action: state.action_to_string(player, action) for action in state.legal_actions()}
    for state, player in zip(_states(name, paths), players, strict=True)
  ]


def _states(name: str, paths: list[list[int]]) -> Iterator[Any]:
  game = load_game(name)
  for path in paths:
    state = game.new_initial_state()
    for action in path:
      state.apply_action(action)
    yield state


def _pyspiel() -> Any:
  try:
    import pyspiel
  except ImportError as error:
    raise ImportError(
      "OpenSpiel, which provides the games, is not installed: pip install open-spiel"
    ) from error
  return pyspiel


def _walk(game: Any, name: str, max_nodes: int) -> Tree:
  """Reads the tree level by level, so that only one level of OpenSpiel's states is in memory."""
  num_players = game.num_players()
  parents, actions, chance_probs = [-1], [-1], [1.0]
  players: list[int] = []
  info_states: list[int] = []
  terminals: list[int] = []
  payoffs: list[Any] = []
  lookups: list[dict[str, int]] = [{} for _ in range(num_players)]
  strings: list[str] = []
  has_strings = game.get_type().provides_information_state_string
  frontier, depth, node = [game.new_initial_state()], 0, -1
  while frontier:
    following: list[Any] = []
    for state in frontier:
      node += 1
      player = state.current_player()
      if player >= 0:
        string = state.information_state_string(player) if has_strings else state.history_str()
        lookup = lookups[player]
        info_state = lookup.get(string)
        if info_state is None:
          info_state = lookup[string] = len(strings)
          strings.append(string)
        players.append(player)
        info_states.append(info_state)
        legal = state.legal_actions()
        actions += legal
        parents += [node] * len(legal)
        chance_probs += [1.0] * len(legal)
        following += map(state.child, legal)
        continue
      info_states.append(-1)
      if state.is_terminal():
        players.append(TERMINAL)
        terminals.append(node)
        payoffs.append(state.returns())
      elif state.is_chance_node():
        players.append(CHANCE)
        for action, prob in state.chance_outcomes():
          actions.append(action)
          parents.append(node)
          chance_probs.append(prob)
          following.append(state.child(action))
      else:
        raise ValueError(f"game {name} has a history where no single player moves: player {player}")
      if len(parents) > max_nodes:
        break
    if len(parents) > max_nodes:
      raise ValueError(
        too_large(name, max_nodes, f"at least {len(parents)} nodes within {depth + 1} moves")
      )
    frontier, depth = following, depth + 1
  utilities = np.zeros((len(parents), num_players))
  utilities[terminals] = payoffs
  return Tree(
    np.array(parents, np.int32),
    np.array(actions, np.int32),
    np.array(players, np.int8),
    np.array(info_states, np.int32),
    np.array(chance_probs),
    utilities,
    tuple(strings),
    name,
    game.num_distinct_actions(),
  )


def too_large(name: str, max_nodes: int, size: str) -> str:
  """Returns the message for a game with more histories than `max_nodes`."""
  return (
    f"game {name} has {size}, more than max_nodes={max_nodes}: increase max_nodes if memory "
    "allows, or choose a smaller game"
  )


def _cacheable(game_or_string: Any, game: Any) -> bool:
  in_library = type(game).__module__.split(".")[0] == "pyspiel"
  return isinstance(game_or_string, str) and in_library and "filename" not in game_or_string


def _cache_path(name: str, cache: str | os.PathLike[str] | None) -> pathlib.Path:
  if cache is None:
    cache = os.environ.get("BOOTSTRAX_CACHE") or pathlib.Path("~/.cache/bootstrax")
  version = getattr(_pyspiel(), "__version__", "unknown")
  digest = hashlib.sha256(f"{_FORMAT} {version} {name}".encode()).hexdigest()[:32]
  return pathlib.Path(cache).expanduser() / "games" / f"{digest}.npz"


def _save(path: pathlib.Path, tree: Tree) -> None:
  """Writes a temporary file and renames it; warns if the disk cannot be written."""
  arrays = tree._asdict()
  for name in ("state_strings", "name"):
    text = "\0".join(tree.state_strings) if name == "state_strings" else tree.name
    arrays[name] = np.frombuffer(text.encode(), np.uint8)
  scratch = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
      scratch = pathlib.Path(file.name)
      np.savez_compressed(file, **arrays)
    os.replace(scratch, path)
  except OSError as error:
    warnings.warn(f"the game {tree.name} could not be cached in {path}: {error}", stacklevel=2)
  finally:
    if scratch is not None:
      scratch.unlink(missing_ok=True)


def _load(path: pathlib.Path, name: str) -> Tree | None:
  """Returns the tree of a file, or None unless the file exists, is intact and is of this game."""
  if not path.exists():
    return None
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {field: file[field] for field in Tree._fields}
    strings = arrays["state_strings"].tobytes().decode().split("\0")
    tree = Tree(
      **arrays
      | {
        "state_strings": tuple(strings) if strings != [""] else (),
        "name": arrays["name"].tobytes().decode(),
        "num_actions": int(arrays["num_actions"]),
      }
    )
    whole = (
      tree.name == name
      and len({len(array) for array in tree[:6]}) == 1
      and int(tree.info_states.max()) == len(tree.state_strings) - 1
      and bool(np.all(tree.parents[1:] < np.arange(1, len(tree.parents))))
    )
  except _UNREADABLE:
    return None
  return tree if whole else None
