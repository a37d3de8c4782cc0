"""Figures of policies in games, for reports and notebooks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report import plots, results
from rl_theory import games, policy_arrays

_MAX_STATES = 60  # more rows are not legible on a page
_LABEL_LENGTH = 28  # characters of a state's string that fit beside its row


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
