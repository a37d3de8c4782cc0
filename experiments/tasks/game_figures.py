"""Figures of policies in games, for reports and notebooks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report import plots, results
from rl_theory import games, policy_arrays

_MAX_STATES = 60  # rows that a page still shows legibly


def policy_heat_map(
  game: games.Game,
  policy: Any,
  *,
  states: Sequence[int] | None = None,
  name: str = "policy",
) -> results.Figure:
  """Draws what is played at each information state: a panel for each player, a row for each state.

  Args:
    game: the game.
    policy: `[S, A]`.
    states: rows of the policy to draw, in this order; all of them by default.
    name: of the file.

  Returns:
    The figure; illegal actions are left white. Columns bear OpenSpiel's names where one number of
    action has one name throughout, else the number.

  Raises:
    ValueError: if the policy is none, a state is no row, or there are more than 60 of them.
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
      f"states must be {_MAX_STATES} at most to be legible, got {len(chosen)}: choose some"
    )
  owners = np.asarray(game.state_players)[chosen]
  players = np.unique(owners)
  labels = _action_labels(game)
  tallest = max(np.count_nonzero(owners == player) for player in players)
  size = 1.6 + 0.6 * len(labels), 1.2 + 0.22 * tallest
  figure, axes = plots.subplots(1, len(players), size=size)
  probs = np.where(np.asarray(game.legal), np.asarray(policy, float), np.nan)
  for axis, player in zip(axes[0], players, strict=True):
    rows = chosen[owners == player]
    image = axis.imshow(probs[rows], cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    strings = [" ".join(game.state_strings[row].split()) for row in rows]
    axis.set_yticks(range(len(rows)), [text[-28:] for text in strings], fontsize=7)
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.set_title(f"player {player}")
    axis.grid(False)
  figure.colorbar(image, ax=axes[0].tolist(), label="probability")
  caption = f"Probability of each action at information states of {game.layout.name}."
  return results.Figure(name, caption, figure)


def _action_labels(game: games.Game) -> list[str]:
  found: list[set[str]] = [set() for _ in range(game.layout.num_actions)]
  for names in policy_arrays.action_names(game):
    for action, label in names.items():
      found[action].add(label)
  return [labels.pop() if len(labels) == 1 else str(action) for action, labels in enumerate(found)]
