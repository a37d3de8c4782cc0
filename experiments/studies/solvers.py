"""Compares ARMAC with other solvers on one game: one run for each method, one figure."""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.configs import solvers
from experiments.loop import suite, training
from experiments.report import results
from experiments.tasks import game_runs


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains each method in its own folder and compares all of them in one report."""
  known = {name: text.format(preset=config.preset) for name, text in solvers.METHODS.items()}
  parts = suite.configs_of("config.methods", config.methods, known, needs=["environment.game"])
  for part in parts.values():
    part.seed = config.seed
    if config.game:
      part.environment.game = config.game
      if "bar" in part.environment:
        part.environment.bar = 0.0  # the criterion belongs to the preset's game
  return suite.run(config, workdir, parts, _summarise)


def _summarise(parts: Mapping[str, suite.Part]) -> suite.Summary:
  """Returns the NashConv of every method at its own end and at the end of the shortest run."""
  records = {name: part.history for name, part in parts.items()}
  game = next(iter(parts.values())).config.environment.game
  shortest = min(history[-1]["env_steps"] for history in records.values())
  found, rows = {}, []
  for name, history in records.items():
    last = history[-1]
    # The last measurement with no more decisions than the shortest run.
    within = [row for row in history if row["env_steps"] <= shortest] or [history[0]]
    for row in (within[-1], last):
      cells = [row[key] for key in ("nash_conv", "nash_conv/low", "nash_conv/high")]
      rows.append([name, round(row["env_steps"]), round(row["seconds"]), *cells])
    found[f"nash_conv/{name}"] = results.Estimate(
      within[-1]["nash_conv"],
      within[-1]["nash_conv/low"],
      within[-1]["nash_conv/high"],
      note=f"after {within[-1]['env_steps']:.3g} decisions",
    )
  columns = ["method", "decisions", "seconds", "NashConv", "best seed", "worst seed"]
  title = "NashConv after as many decisions as the shortest run has, and at the end of each run"
  table = results.Table(title, columns, rows, digits=4)
  return suite.Summary(
    results.Result(metrics=found, tables=[table]),
    f"nash_conv/{next(iter(parts))}",
    [game_runs.curves(records, game)],
  )
