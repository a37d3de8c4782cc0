"""All figures of a paper in one report; each is a run in a folder of its own."""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.loop import presets, suite, training
from experiments.report import results, statistics
from sharding import checks


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Draws every figure of `config.data.figures`, with the seed and the other data of the config."""
  shared = {name: value for name, value in config.data.items() if name != "figures"}
  parts = {}
  for name in config.data.figures:
    part = presets.resolve(f"{config.paper}:{name}")
    if "runner" in part:
      raise ValueError(f"config.data.figures={config.data.figures} must not contain {name!r}")
    part.seed = config.seed
    part.data.update(shared)
    parts[name] = part
  checks.count("the number of config.data.figures", len(parts))
  return suite.run(config, workdir, parts, _summarise)


def _summarise(parts: Mapping[str, suite.Part]) -> suite.Summary:
  """Returns all criteria and figures; the tables of each part are in its own report."""
  rows, figures = [], []
  for name, part in parts.items():
    found = part.result
    rows += [
      (f"{name}: {criterion}", passed == "pass") for criterion, passed in found.tables[0].rows
    ]
    draw = presets.build(part.config, pathlib.Path()).figures
    figures += draw(part.history, found)
  metrics = {"criteria_passed": statistics.fraction_passed(rows)}
  tables = [results.checks_table("Pass criteria", rows)]
  tables += [table for part in parts.values() for table in part.result.tables[1:]]
  return suite.Summary(results.Result(metrics=metrics, tables=tables), "criteria_passed", figures)
