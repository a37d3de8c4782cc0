"""Runs that keep their measurements in the state, so that figures need nothing else.

Many dynamics are fast at first and slow at the end. The times of measurement are therefore spaced
geometrically: one step of the training loop goes from one time to the next. All of it is one
compiled program, because the number of steps in between is data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import training
from experiments.report import results
from experiments.tasks import bandits
from sharding import checks


class Traced(NamedTuple):
  """State of the training loop.

  problem: arrays that stay as they are, such as the chains.
  learners: what changes.
  traces: by name, measurements `[train.num_steps + 1, ...]`; row 0 is before the first step.
  step: `[]` int32, how many rows beyond the first are filled.
  """

  problem: Any
  learners: Any
  traces: dict[str, jax.Array]
  step: jax.Array


def times(config: Any) -> np.ndarray:
  """Returns the steps at which a run is measured, `[train.num_steps + 1]` integers.

  They start at 0, 1 and end at `train.num_steps * train.inner_steps`. The first differ by one, the
  later ones by a constant factor.
  """
  num, last = config.train.num_steps, config.train.num_steps * config.train.inner_steps
  spaced = np.round(np.geomspace(1, last, num)) if num > 1 else np.array([last])
  return np.concatenate([[0], np.maximum(spaced, np.arange(1, num + 1))]).astype(int)


def even_times(config: Any) -> np.ndarray:
  """Returns every multiple of `train.inner_steps` in the run, `[train.num_steps + 1]` integers."""
  return config.train.inner_steps * np.arange(config.train.num_steps + 1)


def experiment(
  config: Any,
  *,
  start: Callable[[jax.Array], tuple[Any, Any]],
  advance: Callable[[Any, Any], Any],
  measure: Callable[[Any, Any], dict[str, jax.Array]],
  result: Callable[[Any, Any, dict[str, np.ndarray]], results.Result],
  figures: Callable[[results.Result], list[results.Figure]],
  headline: str,
  maximise: bool = False,
  even: bool = False,
) -> training.Experiment:
  """Returns an experiment that measures learners at the times of `times`.

  Args:
    config: the config; reads `train`.
    start: `start(key) -> (problem, learners)`.
    advance: `advance(problem, learners) -> learners`, one step.
    measure: `measure(problem, learners) -> {name: array}`.
    result: `result(problem, learners, traces)` on the host, of NumPy arrays. What it puts into
      `Result.arrays` reaches `figures`.
    figures: draws the figures from the result.
    headline: the name of a measurement, whose mean is logged.
    maximise: whether a higher headline is better.
    even: measure at `even_times` instead.
  """
  checks.count("config.train.inner_steps", config.train.inner_steps)
  grid = even_times(config) if even else times(config)

  def init(key):
    problem, learners = start(key)
    first = measure(problem, learners)
    traces = {
      name: jnp.zeros((len(grid), *value.shape), value.dtype).at[0].set(value)
      for name, value in first.items()
    }
    return Traced(problem, learners, traces, jnp.zeros((), jnp.int32))

  def update(runs, batch, key):
    del batch, key  # nothing is random after the start
    begin, end = jnp.asarray(grid)[runs.step], jnp.asarray(grid)[runs.step + 1]
    learners = jax.lax.fori_loop(
      begin, end, lambda _, learners: advance(runs.problem, learners), runs.learners
    )
    found = measure(runs.problem, learners)
    traces = {name: runs.traces[name].at[runs.step + 1].set(found[name]) for name in found}
    metrics = {headline: jnp.mean(found[headline])}
    return Traced(runs.problem, learners, traces, runs.step + 1), metrics

  def evaluate(runs):
    filled = int(runs.step) + 1
    traces = {name: np.asarray(value[:filled], float) for name, value in runs.traces.items()}
    problem, learners = jax.tree.map(np.asarray, (runs.problem, runs.learners))
    return result(problem, learners, traces)

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline=headline,
    maximise=maximise,
    evaluate=evaluate,
    figures=lambda history, result: figures(result),
  )


def curve(axis: Any, x: np.ndarray, rows: np.ndarray, **style: Any) -> Any:
  """Draws the mean over the last axis of `rows` `[T, runs]`, and a band over four fifths of it.

  The band reaches from the 10th to the 90th percentile. Returns the line.
  """
  (line,) = axis.plot(x, rows.mean(-1), **style)
  low, high = np.quantile(rows, [0.1, 0.9], axis=-1)
  axis.fill_between(x, low, high, color=line.get_color(), alpha=0.16, linewidth=0)
  return line


def spread(values: np.ndarray) -> results.Estimate:
  """Returns the mean of `[runs]` numbers with their 10th and 90th percentiles."""
  low, high = np.quantile(values, [0.1, 0.9])
  return results.Estimate(float(np.mean(values)), float(low), float(high), np.size(values))


def every(words: str, held: np.ndarray) -> tuple[str, bool]:
  """Returns a criterion on all runs; its text says for how many it holds."""
  return f"{words}: {int(held.sum())} of {held.size}", bool(held.all())
