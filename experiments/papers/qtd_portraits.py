"""Quantile TD (arXiv:2301.04462) with one quantile for each of two states: three phase portraits.

A table of two numbers is a point in the plane, so that the dynamics can be drawn. Rewards are
Gaussian in the first problem. In the other two they are constant, and the mean update jumps where
a target meets an estimate. In the third, both next states are equally likely, and the fixed points
fill a quadrilateral.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import spatial

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import markov_runs, traced_runs
from rl_theory import markov, qtd, quantile_dynamics
from sharding import checks

KINDS = ("gaussian", "dirac", "mixing")
TITLES = {
  "gaussian": "Gaussian rewards",
  "dirac": "constant rewards",
  "mixing": "constant rewards, uniform transitions",
}
LOW, HIGH = np.array([-1.5, -5.0]), np.array([6.5, 3.0])  # the corners of the drawn plane
LATE = 0.5  # the last half of the updates


def starts() -> np.ndarray:
  """Returns the starting points of the paths: corners and middles of the drawn plane's edges."""
  inner = LOW + 0.06 * (HIGH - LOW), HIGH - 0.06 * (HIGH - LOW)
  first, second = (np.linspace(inner[0][k], inner[1][k], 3) for k in range(2))
  points = [(a, b) for a in first for b in second if (a, b) != (first[1], second[1])]
  return np.array(points)


def fixed_points(kind: str) -> np.ndarray:
  """Returns the fixed points for lambda at the corners of [0, 1]^2, `[4, 2]`, in a circuit."""
  corners = np.array([(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)])[:, :, None]
  make = functools.partial(markov.two_states, kind)
  found = [markov_runs.fixed_point(make, num_quantiles=1, lam=lam) for lam in corners]
  return np.stack(found)[..., 0]


def distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
  """Returns the Euclidean distance of `points [..., 2]` to a convex polygon, `[...]`."""
  nearest = np.full(points.shape[:-1], np.inf)
  for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
    along = ((points - a) @ (b - a)) / max(((b - a) ** 2).sum(), 1e-12)
    foot = a + np.clip(along, 0, 1)[..., None] * (b - a)
    nearest = np.minimum(nearest, np.linalg.norm(points - foot, axis=-1))
  if np.ptp(corners, axis=0).min() > 1e-6:
    inside = spatial.Delaunay(corners).find_simplex(points) >= 0
    nearest = np.where(inside, 0.0, nearest)
  return nearest


def mean_update(mrp: markov.MarkovRewardProcess, points: np.ndarray) -> np.ndarray:
  """Returns the expected update of each state at `points [..., 2]`, over the step size.

  Where it jumps this is the middle of the jump.
  """
  low, high = jax.vmap(lambda point: quantile_dynamics.inclusion(mrp, point[:, None]))(
    jnp.asarray(points.reshape(-1, 2))
  )
  return np.asarray((low + high) / 2, float).reshape(points.shape)


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `portraits`."""
  checks.positive("config.optimizer.learning_rate", config.optimizer.learning_rate)
  checks.fractions("config.optimizer.decay", config.optimizer.decay)
  processes = {kind: markov.two_states(kind) for kind in KINDS}
  rate, decay = config.optimizer.learning_rate, config.optimizer.decay
  optimizer = optax.sgd(qtd.step_sizes("polynomial", scale=rate, power=decay))
  begin = starts()
  settings = {kind: qtd.Config(discount=mrp.discount) for kind, mrp in processes.items()}

  def begin_at(kind, table):
    return qtd.init(table, optimizer=optimizer, config=settings[kind])

  def start(key):
    tables = jnp.asarray(begin[:, :, None], jnp.float32)
    learners = {kind: jax.vmap(functools.partial(begin_at, kind))(tables) for kind in KINDS}
    return jax.random.key_data(key), learners

  def advance(key_data, learners):
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), learners[KINDS[0]].step[0])
    moved = {}
    for kind, mrp in processes.items():
      key, draw = jax.random.split(key)
      step = markov_runs.synchronous(mrp, optimizer=optimizer, config=settings[kind])
      moved[kind] = jax.vmap(step)(learners[kind], jax.random.split(draw, len(begin)))
    return moved

  corners = {kind: fixed_points(kind) for kind in KINDS}
  middles = {kind: jnp.asarray(points.mean(0), jnp.float32) for kind, points in corners.items()}

  def measure(key_data, learners):
    del key_data
    found = {kind: learners[kind].params[..., 0] for kind in KINDS}
    far = [jnp.abs(found[kind] - middles[kind]).max() for kind in KINDS[:2]]
    return {**found, "error": jnp.stack(far).max()}

  return traced_runs.experiment(
    config,
    start=start,
    advance=advance,
    measure=measure,
    result=lambda problem, learners, traces: _result(traced_runs.times(config), traces, corners),
    figures=lambda result: [_figure(result, processes, corners)],
    headline="error",
  )


def _result(times, traces, corners) -> results.Result:
  late = times[: len(traces["gaussian"])] >= LATE * times[-1]
  ends = {kind: traces[kind][-1] for kind in KINDS}
  far = {kind: distance(traces[kind], corners[kind]) for kind in KINDS}
  criteria = [
    (
      f"{TITLES[kind]}: every path ends within 0.1 of the fixed point",
      bool(far[kind][-1].max() < 0.1),
    )
    for kind in KINDS[:2]
  ]
  mixing = far["mixing"][late].max()
  spread = np.linalg.norm(ends["mixing"][:, None] - ends["mixing"][None], axis=-1).max()
  quadrilateral = np.array([(1, -2), (2, 0), (4, 1), (4, -2)])
  exact = np.abs(np.sort(corners["mixing"], axis=0) - np.sort(quadrilateral, axis=0)).max()
  criteria += [
    ("uniform transitions: the corners are (1, -2), (2, 0), (4, 1), (4, -2)", bool(exact < 1e-4)),
    ("every path is within 0.05 of the quadrilateral in the last half", bool(mixing < 0.05)),
    ("the paths end at different points, 0.5 apart or more", bool(spread > 0.5)),
  ]
  rows = [
    [
      TITLES[kind],
      "  ".join(f"({a:.3f}, {b:.3f})" for a, b in np.unique(corners[kind].round(4) + 0.0, axis=0)),
      float(far[kind][-1].max()),
      float(far[kind][late].max()),
    ]
    for kind in KINDS
  ]
  return results.Result(
    metrics={
      "criteria_passed": statistics.fraction_passed(criteria),
      "distance_to_the_fixed_points": float(max(far[kind][-1].max() for kind in KINDS)),
    },
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        "Fixed points, and the largest distance of a path to them",
        ["problem", "corners of the set of fixed points", "at the end", "in the last half"],
        rows,
      ),
    ],
    arrays={kind: traces[kind] for kind in KINDS},
  )


def _figure(result, processes, corners) -> results.Figure:
  figure, axes = plots.subplots(1, 3, size=(4.3, 4.2), sharey=True)
  grid = np.stack(np.meshgrid(*(np.linspace(LOW[k], HIGH[k], 23)[1:-1] for k in (0, 1))), axis=-1)
  for axis, kind in zip(axes[0], KINDS, strict=True):
    mrp, paths = processes[kind], result.arrays[kind]
    field = mean_update(mrp, grid)
    axis.grid(False)
    axis.quiver(
      grid[..., 0], grid[..., 1], field[..., 0], field[..., 1], np.linalg.norm(field, axis=-1),
      cmap="Greys", clim=(-0.25, 0.9), scale=14, width=0.0042, headwidth=4, headlength=4.5,
      zorder=1,
    )  # fmt: skip
    points = corners[kind]
    if np.ptp(points) and np.ptp(points, axis=0).min() > 1e-3:
      axis.fill(*points.T, facecolor=plots.PALETTE[1], alpha=0.28, linewidth=0, zorder=2)
      axis.fill(*points.T, fill=False, edgecolor=plots.PALETTE[1], linewidth=1.6, zorder=2)
    else:
      axis.plot(
        *points.mean(0), marker="*", markersize=17, color=plots.PALETTE[1],
        markeredgecolor="white", zorder=7,
      )  # fmt: skip
    for path in np.moveaxis(paths, 1, 0):
      axis.plot(*path.T, color=plots.PALETTE[0], linewidth=1, alpha=0.75, zorder=3)
      axis.plot(
        *path[0], marker="o", markersize=4.5, markerfacecolor="white",
        markeredgecolor=plots.PALETTE[0], zorder=4,
      )  # fmt: skip
      axis.plot(*path[-1], marker="o", markersize=4.5, color=plots.PALETTE[0],
                markeredgecolor="white", markeredgewidth=0.6, zorder=6)  # fmt: skip
    axis.set(
      title=TITLES[kind], xlabel=r"$\theta(x_1)$", xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]),
      aspect="equal",
    )  # fmt: skip
  axes[0][0].set_ylabel(r"$\theta(x_2)$")
  return results.Figure(
    "qtd_portraits",
    "Arrows show the mean update. Paths of quantile TD start at the open circles. The star is the "
    "only fixed point, and all paths end there. In the right panel all points of the quadrilateral "
    "are fixed points, and the paths end at different ones (filled circles).",
    figure,
  )
