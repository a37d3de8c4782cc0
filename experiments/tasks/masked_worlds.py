"""Small worlds of OpenSpiel in which the agent sees only a part of the observation.

The game, its rewards and its moves are OpenSpiel's. What is hidden, and where episodes start, is
ours:

| world | game | what the agent sees | where it starts |
|---|---|---|---|
| catch | catch | its paddle, and the ball outside of the hidden rows | as in the game |
| rooms | pathfinding, four rooms | walls and goal in the 3 x 3 cells around it | any cell |

In catch the agent must remember the column of the ball and count. In rooms it must work out where
it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rl_theory import decision_processes, openspiel_mdp
from sharding import checks

# a is the start of the game, A the goal. All rooms have the same size.
ROOMS = "a..*...\n.......\n...*...\n*.***.*\n...*...\n.......\n...*..A"


class World(NamedTuple):
  """A partially observed world.

  Attributes:
    process: whose observations are what the agent sees.
    length: the number of steps in which every episode ends.
    labels: name to `[S]` int, what a probe reads from the agent's state.
    probed: `[S]` bool, the states in which it does.
    seen: one sentence: what the agent sees.
  """

  process: decision_processes.DecisionProcess
  length: int
  labels: dict[str, np.ndarray]
  probed: np.ndarray
  seen: str


def make(config: Any) -> World:
  """Returns the world of the section `environment` of a config.

  Raises:
    ValueError: if a field is unknown or out of range.
  """
  checks.choice("config.environment.world", config.world, WORLDS)
  return WORLDS[config.world](config)


def _catch(config: Any) -> World:
  rows, columns, (first, last) = config.rows, config.columns, config.hidden_rows
  if not 0 < first <= last < rows - 1:
    raise ValueError(
      f"config.environment.hidden_rows must be two of the rows 1 to {rows - 2}, the first and the "
      f"last that hide the ball, got {config.hidden_rows}"
    )
  process = openspiel_mdp.compile_process(f"catch(rows={rows},columns={columns})")
  board = np.asarray(process.observations).reshape(-1, rows, columns)
  places = (
    board[:, :-1].reshape(len(board), -1).argmax(1)
  )  # of the ball; the last row is the paddle
  row, column = np.divmod(places, columns)
  seen = board.copy()
  seen[:, first : last + 1] = 0
  hidden = (row >= first) & (row <= last) & ~np.asarray(process.terminal)
  return World(
    _showing(process, seen),
    rows - 1,  # the ball starts in the first row
    {"column of the hidden ball": column, "row of the hidden ball": row},
    hidden,
    f"The ball of catch is hidden in rows {first + 1} to {last + 1} of {rows}. The paddle is "
    "always visible.",
  )


def _rooms(config: Any) -> World:
  late = 14  # moves after which the game's agent can be in any cell, as it may also stay
  lines = ROOMS.split("\n")
  horizon = late + config.length
  process = openspiel_mdp.compile_process(
    f"pathfinding(players=1,grid={ROOMS},horizon={horizon},"
    "solve_reward=1.0,group_reward=0.0,step_reward=-0.01)"
  )
  observations = np.asarray(process.observations)
  shape = (len(observations), 5, len(lines), len(lines[0]))
  planes = observations[:, -1 - np.prod(shape[1:]) : -1].reshape(
    shape
  )  # the last entry is the time
  walls, goal = planes[0, 3], planes[0, 2]
  cells = planes[:, 0].reshape(len(planes), -1)
  # Episodes start in a random cell: those are the game's states after some moves.
  started = np.isclose(observations[:, -1] * horizon, late) & ~np.asarray(process.terminal)
  process = dataclasses.replace(process, initial=jnp.asarray(started / started.sum(), jnp.float32))
  return World(
    _showing(process, _around(cells, np.stack([walls, goal]), outside=(1, 0))),
    config.length,
    {"cell": cells.argmax(1)},
    ~np.asarray(process.terminal),
    "The agent sees the walls and the goal in the 3 x 3 cells around it. It starts in any cell.",
  )


def _around(cells: np.ndarray, features: np.ndarray, outside: tuple[int, ...]) -> np.ndarray:
  """Returns the features `[C, H, W]` in the 3 x 3 cells around each position, `[S, 9 C]`.

  Args:
    cells: `[S, H W]`, one-hot positions.
    features: `[C, H, W]`.
    outside: the features beyond the edge.
  """
  height, width = features.shape[1:]
  wide = np.tile(np.array(outside, float)[:, None, None], (1, height + 2, width + 2))
  wide[:, 1:-1, 1:-1] = features
  views = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), axis=(1, 2))  # [C, H, W, 3, 3]
  views = np.moveaxis(views, 0, 2).reshape(height * width, -1)
  return views[cells.argmax(1)]


def _showing(
  process: decision_processes.DecisionProcess, seen: np.ndarray
) -> decision_processes.DecisionProcess:
  """Returns the process with other observations, which are 0 where the episode is over."""
  seen = seen.reshape(len(seen), -1) * ~np.asarray(process.terminal)[:, None]
  return dataclasses.replace(process, observations=jnp.asarray(seen, jnp.float32))


WORLDS: dict[str, Callable[[Any], World]] = {"catch": _catch, "rooms": _rooms}
