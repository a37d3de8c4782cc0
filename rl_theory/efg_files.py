"""Reads games from files of Gambit's extensive form, `.efg`.

The file names the players and then lists the nodes of the tree in prefix order, as tokens between
which white space does not matter:

  EFG 2 R "title" { "player" ... } "comment"
  c "node" set "name" { "move" 1/2 ... } outcome "name" { utilities }      chance moves
  p "node" player set "name" { "move" ... } outcome "name" { utilities }   a player moves
  t "node" outcome "name" { utilities }                                    the end

The name, moves and utilities of a set or an outcome may be left out once they are known. Outcome 0
is worth nothing. An outcome before the end is added to the utilities of all ends below it. Any
number of players and general sums are read; which solvers converge there is another question.

An information state has the name of its set. Where two sets of a player have the same name or none,
it has the name and the number, such as "#3".

Format: "Game representation formats", the manual of Gambit.
"""

import fractions
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from rl_theory import described_games

_TOKEN = re.compile(r'\s+|,|"((?:[^"\\]|\\.)*)"|([{}])|([^\s{},"]+)', re.DOTALL)


def read_efg(path: str | os.PathLike[str]) -> tuple[Any, str]:
  """Returns the root of a game, for `games.compile_game`, and its title.

  Raises:
    ValueError: if the file is not a game, or cannot be read; the message names the line.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except OSError as error:
    raise ValueError(f"game={str(path)!r} cannot be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} must be UTF-8 text: {error}") from error
  return parse_efg(text, source=str(path))


def parse_efg(text: str, *, source: str = "text") -> tuple[Any, str]:
  """Returns the root of the game in a text, and its title.

  Args:
    text: the contents of a file.
    source: its name, for messages.

  Raises:
    ValueError: if the text is not a game; the message names the line.

  Example:
    >>> parse_efg('EFG 2 R "coin" {"A"} c "" 1 "" {"h" 1/2 "t" 1/2} 0 p "" 1 1 "x" {"go"} 0 '
    ...   't "" 1 "" {1} t "" 2 "" {0}')[0].moves["t"]
    (Fraction(1, 2), (Fraction(0, 1),))
  """
  return _Parser(_tokens(text, source), source).game()


class _Token(NamedTuple):
  """kind: "text" (in quotes), "brace", "word" or "end"; line: counted from 1."""

  kind: str
  value: str
  line: int


def _tokens(text: str, source: str) -> list[_Token]:
  found, place, line = [], 0, 1
  while place < len(text):
    match = _TOKEN.match(text, place)
    if match is None:  # only a quotation mark without its partner
      raise ValueError(f'{source}, line {line}: the text that starts with " has no end')
    for kind, value in zip(("text", "brace", "word"), match.groups(), strict=True):
      if value is not None:
        found.append(_Token(kind, re.sub(r"\\(.)", r"\1", value), line))
    line += match.group().count("\n")
    place = match.end()
  return [*found, _Token("end", "the end of the file", line)]


class _Set(NamedTuple):
  """An information set: its state's name and its moves, with probabilities if chance moves."""

  state: str
  moves: tuple[str, ...]
  probs: tuple[Any, ...]


class _Node(NamedTuple):
  """A node as read; `utilities` are what the outcomes up to here add up to."""

  player: int | None
  moves: _Set | None
  utilities: tuple[Any, ...]
  children: list["_Node"]


class _Parser:
  def __init__(self, tokens: list[_Token], source: str):
    self.tokens, self.source, self.place = tokens, source, 0
    self.sets: dict[tuple[int, int], _Set] = {}  # by player (0 is chance) and number
    self.states: set[tuple[int, str]] = set()
    self.outcomes: dict[int, tuple[Any, ...]] = {}
    self.num_players = 0

  def game(self) -> tuple[Any, str]:
    for word, choices in (("EFG", ("EFG",)), ("2", ("2",)), ("R", ("R", "D"))):
      token = self.take("word", f"the file starts with EFG 2 R: expected {word}")
      if token.value not in choices:
        raise self.wrong(token, f"the file starts with EFG 2 R: expected {word}")
    title = self.take("text", "expected the title of the game").value
    self.open()
    while not self.at("brace", "}"):
      self.take("text", "expected the name of a player")
      self.num_players += 1
    self.take("brace", "")
    if self.at("text"):
      self.take("text", "")  # the comment
    root = self.node((fractions.Fraction(0),) * self.num_players)
    order, waiting = [root], [root]
    while waiting:  # not recursive, because trees can be deep
      parent = waiting[-1]
      if parent.moves is None or len(parent.children) == len(parent.moves.moves):
        waiting.pop()
        continue
      child = self.node(parent.utilities)
      parent.children.append(child)
      order.append(child)
      waiting.append(child)
    token = self.tokens[self.place]
    if token.kind != "end":
      raise self.wrong(token, "the tree is complete: expected the end of the file")
    return _assemble(order), title

  def node(self, before: tuple[Any, ...]) -> _Node:
    token = self.take("word", "expected a node: c, p or t")
    if token.value not in ("c", "p", "t"):
      raise self.wrong(token, "expected a node: c, p or t")
    if self.at("text"):
      self.take("text", "")
    if token.value == "t":
      return _Node(None, None, self.outcome(before), [])
    player = 0
    if token.value == "p":
      place = self.tokens[self.place]
      player = self.count("the number of a player")
      if not 1 <= player <= self.num_players:
        raise self.wrong(place, f"the player must be one of 1 to {self.num_players}")
    moves = self.information_set(player)
    return _Node(player, moves, self.outcome(before), [])

  def information_set(self, player: int) -> _Set:
    token = self.tokens[self.place]
    number = self.count("the number of an information set")
    name = self.take("text", "").value if self.at("text") else ""
    known = self.sets.get((player, number))
    if not self.at("brace", "{"):
      if known is None:
        raise self.wrong(token, f"information set {number} needs its moves where it comes first")
      return known
    self.open()
    moves: list[str] = []
    probs: list[Any] = []
    while not self.at("brace", "}"):
      move = self.take("text", "expected the name of a move")
      unnamed = move.value or f"move {len(moves) + 1}"
      if unnamed in moves:
        raise self.wrong(move, f"two moves of information set {number} have this name")
      moves.append(unnamed)
      if not player:
        probs.append(self.number("the probability of a move"))
    closing = self.take("brace", "")
    if not moves:
      raise self.wrong(closing, f"information set {number} must have a move")
    if not player and (min(probs) <= 0 or abs(sum(probs) - 1) > 1e-5):
      given = ", ".join(map(str, probs))
      raise self.wrong(token, f"probabilities must be positive and sum to 1, got {given}")
    if known is not None:
      if (known.moves, known.probs) != (tuple(moves), tuple(probs)):
        raise self.wrong(token, f"information set {number} had other moves before: {known.moves}")
      return known
    state = name or f"#{number}"
    while (player, state) in self.states:
      state = f"{state}#{number}"
    self.states.add((player, state))
    self.sets[player, number] = _Set(state, tuple(moves), tuple(probs))
    return self.sets[player, number]

  def outcome(self, before: tuple[Any, ...]) -> tuple[Any, ...]:
    token = self.tokens[self.place]
    number = self.count("the number of an outcome")
    if self.at("text"):
      self.take("text", "")
    if self.at("brace", "{"):
      self.open()
      utilities = []
      while not self.at("brace", "}"):
        utilities.append(self.number("a utility"))
      self.take("brace", "")
      if len(utilities) != self.num_players:
        raise self.wrong(
          token, f"outcome {number} must have {self.num_players} utilities, got {len(utilities)}"
        )
      if not number and any(utilities):
        raise self.wrong(token, "outcome 0 is worth nothing: give it another number")
      if self.outcomes.setdefault(number, tuple(utilities)) != tuple(utilities):
        raise self.wrong(token, f"outcome {number} had other utilities before")
    if not number:
      return before
    if number not in self.outcomes:
      raise self.wrong(token, f"outcome {number} needs its utilities where it comes first")
    return tuple(a + b for a, b in zip(before, self.outcomes[number], strict=True))

  # --- tokens ---

  def at(self, kind: str, value: str | None = None) -> bool:
    token = self.tokens[self.place]
    return token.kind == kind and value in (None, token.value)

  def take(self, kind: str, problem: str) -> _Token:
    token = self.tokens[self.place]
    if token.kind != kind:
      raise self.wrong(token, problem)
    self.place += 1
    return token

  def open(self) -> None:
    token = self.take("brace", "expected {")
    if token.value != "{":
      raise self.wrong(token, "expected {")

  def number(self, what: str) -> fractions.Fraction:
    token = self.take("word", f"expected {what}")
    try:
      # The exact number of "1e999999999" would fill the memory.
      if "/" not in token.value and not math.isfinite(float(token.value)):
        raise ValueError("not finite")
      value = fractions.Fraction(token.value)
      float(value)  # the arrays hold floats
      return value
    except (ValueError, ZeroDivisionError, OverflowError) as error:
      raise self.wrong(token, f"expected {what}, a number such as 0.5 or 1/2") from error

  def count(self, what: str) -> int:
    token = self.take("word", f"expected {what}")
    if not token.value.isdecimal():
      raise self.wrong(token, f"expected {what}")
    return int(token.value)

  def wrong(self, token: _Token, problem: str) -> ValueError:
    return ValueError(f"{self.source}, line {token.line}: {problem}, got {token.value!r}")


def _assemble(order: list[_Node]) -> Any:
  """Returns the description of a tree whose nodes are given in prefix order."""
  made: dict[int, Any] = {}
  for node in reversed(order):  # children come after their parents
    after = [made.pop(id(child)) for child in node.children]
    if node.moves is None:
      made[id(node)] = node.utilities
    elif node.player:
      moves = dict(zip(node.moves.moves, after, strict=True))
      made[id(node)] = described_games.Decision(node.player - 1, node.moves.state, moves)
    else:
      outcomes = zip(node.moves.probs, after, strict=True)
      made[id(node)] = described_games.Chance(dict(zip(node.moves.moves, outcomes, strict=True)))
  return made[id(order[0])]
