"""Policies as files for people and other programs, JSON or CSV according to the file's suffix.

Both formats have one entry for each legal action of each information state:

  player,information_state,action,action_name,probability
  0,0pb,1,Bet,0.3333333333333333

JSON groups the entries by state and names the game. Probabilities keep every bit when they are
written and read back. The reader checks everything, and its errors name the line or the field.
"""

import csv
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rl_theory import games, policy_arrays
from sharding import checks

_COLUMNS = ["player", "information_state", "action", "action_name", "probability"]
_Entry = tuple[
  str, Any, Any, Any, Any
]  # place in the file, player, information state, action, prob
# The kinds of JSON fields, as error messages call them.
_KINDS: dict[str, Callable[[Any], bool]] = {
  "a string": lambda value: isinstance(value, str),
  "a list": lambda value: isinstance(value, list),
  "an integer": checks.is_integer,
  "a number": lambda value: isinstance(value, float) or checks.is_integer(value),
}


def write_policy(
  path: str | os.PathLike[str], game: games.Game, policy: Any, *, overwrite: bool = False
) -> None:
  """Writes a policy `[S, A]`; if that fails, an old file stays as it was.

  Args:
    path: a file name that ends in `.json` or `.csv`.
    game: the game.
    policy: `[S, A]`.
    overwrite: whether to replace a file that exists.

  Raises:
    ValueError: if the array is not a policy of the game, the suffix is another one, or the file
      exists.
    OSError: if the file cannot be written.

  Example:
    >>> write_policy("kuhn.csv", kuhn, solution.average_policy)  # doctest: +SKIP
    >>> read_policy("kuhn.csv", kuhn)  # doctest: +SKIP
  """
  path = _checked_path(path)
  policy_arrays.check(game, policy)
  if path.exists() and not overwrite:
    raise ValueError(f"path {path} exists already: choose another or set overwrite=True")
  states = _states(game, np.asarray(policy, float))
  text = _to_json(game, states) if path.suffix == ".json" else _to_csv(states)
  scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    scratch.write_bytes(text.encode())
    os.replace(scratch, path)
  finally:
    scratch.unlink(missing_ok=True)


def read_policy(path: str | os.PathLike[str], game: games.Game) -> jax.Array:
  """Returns the policy `[S, A]` of a file, from `write_policy` or another program.

  States may come in any order. Actions that are left out have probability 0. Action names are
  ignored.

  Raises:
    ValueError: if the file is for another game or does not hold a policy; the message names the
      line or the field.
    OSError: if the file cannot be read.
  """
  path = _checked_path(path)
  try:
    text = path.read_bytes().decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} must be UTF-8 text: {error}") from error
  entries = _from_json(text, game, path) if path.suffix == ".json" else _from_csv(text, path)
  keys = zip(np.asarray(game.state_players).tolist(), game.state_strings, strict=True)
  rows = {key: row for row, key in enumerate(keys)}
  legal = np.asarray(game.legal)
  probs = np.full(legal.shape, np.nan)
  for where, player, string, action, prob in entries:
    row = rows.get((player, string))
    if row is None:
      raise ValueError(
        f"{where}: player {player} has no information state {string!r} in {game.layout.name}"
      )
    if not 0 <= action < legal.shape[1] or not legal[row, action]:
      allowed = np.flatnonzero(legal[row]).tolist()
      raise ValueError(f"{where}: action must be one of the legal {allowed}, got {action}")
    if not np.isnan(probs[row, action]):
      raise ValueError(f"{where}: action {action} of state {string!r} appears twice")
    if not 0 <= prob <= 1:
      raise ValueError(f"{where}: probability must lie in [0, 1], got {prob}")
    probs[row, action] = prob
  absent = np.flatnonzero(np.isnan(probs).all(1))
  if absent.size:
    raise ValueError(
      f"{path} must have every information state of {game.layout.name}: {absent.size} missing, "
      f"such as {game.state_strings[absent[0]]!r}"
    )
  sums = np.nansum(probs, axis=1)
  worst = int(np.argmax(np.abs(sums - 1)))
  if abs(sums[worst] - 1) > policy_arrays.TOLERANCE:
    raise ValueError(
      f"{path}: probabilities must sum to 1 at every information state, got {sums[worst]:.6g} at "
      f"{game.state_strings[worst]!r}"
    )
  return jax.numpy.asarray(np.nan_to_num(probs), game.utilities.dtype)


def _checked_path(path: str | os.PathLike[str]) -> pathlib.Path:
  path = pathlib.Path(path)
  if path.suffix not in (".json", ".csv"):
    raise ValueError(f"path must end in .json or .csv, got {str(path)!r}")
  return path


def _states(game: games.Game, probs: np.ndarray) -> list[dict[str, Any]]:
  legal, players = np.asarray(game.legal), np.asarray(game.state_players).tolist()
  return [
    {
      "player": players[row],
      "information_state": game.state_strings[row],
      "actions": [
        {"action": action, "action_name": names.get(action, ""), "probability": probs[row, action]}
        for action in np.flatnonzero(legal[row]).tolist()
      ],
    }
    for row, names in enumerate(policy_arrays.action_names(game))
  ]


def _to_json(game: games.Game, states: list[dict[str, Any]]) -> str:
  lines = ",\n".join(
    json.dumps(state, ensure_ascii=False) for state in states
  )  # a line for each state
  return f'{{"game": {json.dumps(game.layout.name)},\n"states": [\n{lines}\n]}}\n'


def _to_csv(states: list[dict[str, Any]]) -> str:
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(_COLUMNS)
  for state in states:
    for entry in state["actions"]:
      writer.writerow([state["player"], state["information_state"], *entry.values()])
  return buffer.getvalue()


def _from_csv(text: str, path: pathlib.Path) -> Iterator[_Entry]:
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  try:
    header = next(reader, [])
    if header != _COLUMNS:
      raise ValueError(f"{path}, line 1: columns must be {','.join(_COLUMNS)}, got {header}")
    for row in reader:
      where = f"{path}, line {reader.line_num}"
      if len(row) != len(_COLUMNS):
        raise ValueError(f"{where}: must have {len(_COLUMNS)} fields, got {len(row)}")
      player, string, action, _, prob = row
      yield (
        where,
        _number(int, player, f"{where}: player"),
        string,
        _number(int, action, f"{where}: action"),
        _number(float, prob, f"{where}: probability"),
      )
  except csv.Error as error:
    raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _number(kind: type, text: str, where: str) -> Any:
  try:
    return kind(text)
  except ValueError:
    wanted = "an integer" if kind is int else "a number"
    raise ValueError(f"{where} must be {wanted}, got {text!r}") from None


def _from_json(text: str, game: games.Game, path: pathlib.Path) -> Iterator[_Entry]:
  try:
    content = json.loads(text)
  except ValueError as error:  # its text names line and column
    raise ValueError(f"{path} must be JSON: {error}") from error
  of_game = _field(content, "game", "a string", str(path))
  if of_game != game.layout.name:
    raise ValueError(f"{path} must be for game {game.layout.name!r}, got {of_game!r}")
  for number, state in enumerate(_field(content, "states", "a list", str(path))):
    where = f"{path}, states[{number}]"
    player = _field(state, "player", "an integer", where)
    string = _field(state, "information_state", "a string", where)
    for place, entry in enumerate(_field(state, "actions", "a list", where)):
      inner = f"{where}.actions[{place}]"
      action = _field(entry, "action", "an integer", inner)
      yield inner, player, string, action, _field(entry, "probability", "a number", inner)


def _field(content: Any, name: str, kind: str, where: str) -> Any:
  value = content.get(name) if isinstance(content, dict) else None
  if not _KINDS[kind](value):
    raise ValueError(f"{where}: {name} must be {kind}, got {value!r}")
  return value
