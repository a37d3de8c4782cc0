"""Figures of games and of policies, and policies in words, for reports and notebooks."""

import fractions
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report import plots, results
from rl_theory import games, policy_arrays

_MAX_STATES = 60  # more rows are not legible on a page
_LABEL_LENGTH = 28  # characters of a state's string that fit beside its row
_MAX_ENDS = 60  # leaves of a tree that are legible on a page


def policy_heat_map(
  game: games.Game,
  policy: Any,
  *,
  states: Sequence[int] | None = None,
  name: str = "policy",
) -> results.Figure:
  """Draws the policy: one panel for each player, one row for each information state.

  Args:
    game: the game.
    policy: probabilities `[S, A]`.
    states: rows of the policy to draw, in this order; all rows by default.
    name: name of the figure's file.

  Returns:
    The figure. Illegal actions are grey. A column has OpenSpiel's name of its action if that name
    is the same at all states, and the number of the action otherwise.

  Raises:
    ValueError: if `policy` is not a policy of the game, an entry of `states` is not a row number,
      or there are more than 60.
  """
  policy_arrays.check(game, policy)
  chosen = np.arange(len(game.state_strings)) if states is None else np.asarray(states)
  if not np.issubdtype(chosen.dtype, np.integer) or chosen.ndim != 1 or not chosen.size:
    raise ValueError(f"states must be a list of row numbers, got {states!r}")
  if chosen.min() < 0 or chosen.max() >= len(game.state_strings):
    raise ValueError(
      f"states must lie in [0, {len(game.state_strings)}) in {game.layout.name}, got {states!r}"
    )
  if len(chosen) > _MAX_STATES:
    raise ValueError(
      f"states must hold {_MAX_STATES} rows at most to be legible, got {len(chosen)}: choose fewer"
    )
  owners = np.asarray(game.state_players)[chosen]
  players = np.unique(owners)
  labels = _action_labels(game)
  tallest = max(np.count_nonzero(owners == player) for player in players)
  size = 1.6 + 0.6 * len(labels), 1.2 + 0.22 * tallest
  figure, axes = plots.subplots(1, len(players), size=size)
  probs = np.where(np.asarray(game.legal), np.asarray(policy, float), np.nan)
  strings = {row: " ".join(game.state_strings[row].split()) for row in chosen.tolist()}
  for axis, player in zip(axes[0], players, strict=True):
    rows = chosen[owners == player]
    image = axis.imshow(probs[rows], cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    labelled = [strings[row][-_LABEL_LENGTH:] for row in rows]
    axis.set_yticks(range(len(rows)), labelled, fontsize=7)
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.set_title(f"player {player}")
    axis.set_facecolor("0.85")  # shows where the action is illegal
    axis.grid(False)
  figure.colorbar(image, ax=axes[0].tolist(), label="probability")
  caption = (
    f"Each row is an information state of {game.layout.name}; its shades show the probability of "
    "each action."
  )
  if np.isnan(probs[chosen]).any():
    caption += " Illegal actions are grey."
  if max(map(len, strings.values())) > _LABEL_LENGTH:
    caption += f" Labels are the last {_LABEL_LENGTH} characters of OpenSpiel's state strings."
  if len(chosen) < len(game.state_strings):
    caption += f" The figure has {len(chosen)} of {len(game.state_strings)} states."
  return results.Figure(name, caption, figure)


def _action_labels(game: games.Game) -> list[str]:
  found: list[set[str]] = [set() for _ in range(game.layout.num_actions)]
  for names in policy_arrays.action_names(game):
    for action, label in names.items():
      found[action].add(label)
  return [labels.pop() if len(labels) == 1 else str(action) for action, labels in enumerate(found)]


def draw_tree(game: games.Game, policy: Any = None, *, name: str = "tree") -> results.Figure:
  """Draws the whole tree of a small game from left to right, with player 0's utility at each end.

  Args:
    game: the game, with at most 60 ends.
    policy: `[S, A]`; if given, the width of a line is the probability of the move.
    name: name of the figure's file.

  Returns:
    The figure. A colour is a player, and histories with the same label and colour are one
    information state. Moves of chance are grey and have their probabilities.

  Raises:
    ValueError: if `policy` is not a policy of the game, or the game has more than 60 ends.
  """
  if policy is not None:
    policy_arrays.check(game, policy)
  if len(game.terminals) > _MAX_ENDS:
    raise ValueError(
      f"game must have {_MAX_ENDS} ends at most to be legible, got {len(game.terminals)} in "
      f"{game.layout.name}"
    )
  parents, players = np.asarray(game.parents), np.asarray(game.players)
  states, actions = np.asarray(game.info_states), np.asarray(game.actions)
  probs, utilities = np.asarray(game.chance_probs), np.asarray(game.utilities)
  names = policy_arrays.action_names(game)
  heights, depths = _places(game)
  figure, axes = plots.subplots(size=(1.1 * (depths.max() + 1), 0.8 + 0.24 * len(game.terminals)))
  axis = axes[0][0]
  for node in range(1, len(parents)):
    parent = parents[node]
    mover, state, action = players[parent], states[parent], int(actions[node])
    if mover < 0:
      share = float(probs[node])
      label, colour = str(fractions.Fraction(share).limit_denominator(1000)), "0.6"
    else:
      share = 1.0 if policy is None else float(np.asarray(policy)[state, action])
      label, colour = names[state].get(action, str(action)), plots.PALETTE[mover]
    x, y = depths[[parent, node]], heights[[parent, node]]
    axis.plot(x, y, color=colour, linewidth=0.4 + 3 * share, solid_capstyle="round", zorder=1)
    axis.text(x.mean(), y.mean(), label, fontsize=6, ha="center", va="center", zorder=3)
  for node, player in enumerate(players.tolist()):
    x, y = depths[node], heights[node]
    if player == games.TERMINAL:
      axis.text(x + 0.05, y, f"{utilities[node, 0]:g}", fontsize=7, va="center")
      continue
    colour = "0.6" if player < 0 else plots.PALETTE[player]
    axis.plot(x, y, "s" if player < 0 else "o", color=colour, markersize=5, zorder=2)
    if player >= 0:
      axis.text(x, y + 0.45, game.state_strings[states[node]], fontsize=6, ha="center")
  for text in axis.texts:
    text.set_in_layout(False)  # labels overlap the lines, so they need no room beside the axes
  axis.margins(x=0.08, y=0.03)
  axis.set_axis_off()
  caption = (
    f"All {len(parents)} histories of {game.layout.name}; the ends have player 0's utility. A "
    "colour is a player, grey is chance. Nodes of one colour and label are one information state."
  )
  if policy is not None:
    caption += " The width of a line is the probability of the move."
  return results.Figure(name, caption, figure)


def _places(game: games.Game) -> tuple[np.ndarray, np.ndarray]:
  """Returns the height and the depth of each history in a drawing of the tree."""
  parents, first = np.asarray(game.parents), np.asarray(game.first_children)
  counts = np.asarray(game.num_children)
  depths, heights = np.zeros(len(parents)), np.zeros(len(parents))
  waiting, ends = [0], 0
  while waiting:  # depth first, so that lines do not cross
    node = waiting.pop()
    if node:
      depths[node] = depths[parents[node]] + 1
    if not counts[node]:
      heights[node], ends = -ends, ends + 1
    waiting += range(first[node] + counts[node] - 1, first[node] - 1, -1)
  for node in range(len(parents) - 1, -1, -1):  # children come after their parents
    if counts[node]:
      heights[node] = heights[first[node] : first[node] + counts[node]].mean()
  return heights, depths


def policy_in_words(game: games.Game, policy: Any, *, least: float = 0.005) -> list[str]:
  """Returns one sentence for each information state: who decides, where, and how often what.

  Args:
    game: the game. The names of states and moves are those of its description or of OpenSpiel.
    policy: `[S, A]`.
    least: moves with a smaller probability are left out.

  Raises:
    ValueError: if `policy` is not a policy of the game.
  """
  policy_arrays.check(game, policy)
  probs, players = np.asarray(policy, float), np.asarray(game.state_players).tolist()
  sentences = []
  for state, names in enumerate(policy_arrays.action_names(game)):
    row = probs[state]
    played = sorted(np.flatnonzero(row >= least).tolist(), key=lambda action: -row[action])
    named = [(names.get(action, f"action {action}"), row[action]) for action in played]
    often = " and ".join(f"{name} {share:.0%} of the time" for name, share in named)
    if len(named) == 1:
      often = f"always {named[0][0]}"
    place = " ".join(game.state_strings[state].split())
    sentences.append(f"Player {players[state]} at {place!r}: {often}.")
  return sentences
