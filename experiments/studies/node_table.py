"""The results table of a paper: one method on several graphs, with several initialisations each.

Each data set and seed is an ordinary run in its own folder. A run that is already in its folder is
not trained again, also if it was started on its own.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments import files
from experiments.data import graph_formats
from experiments.loop import presets, suite, training
from experiments.report import plots, results
from experiments.tasks import node_classification

# Mean and standard deviation of BGRL in percent, from arXiv:2102.06514 (ICLR version).
PUBLISHED = {
  "wikics": (79.98, 0.10),
  "amazon_computers": (90.34, 0.19),
  "amazon_photo": (93.17, 0.30),
  "coauthor_cs": (93.31, 0.13),
  "coauthor_physics": (95.73, 0.05),
}
ROWS = ("features", "SGC-2", "encoder, untrained", "encoder, trained")


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains on every data set with every seed and writes one report.

  If a signal stops it, the report has the finished runs.
  """
  configs = parts(config)
  _check_files(configs)
  return suite.run(config, workdir, configs, _summarise, report_unfinished=True)


def parts(config: Any) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of each run by its folder; all data sets of the first seed come first."""
  names, num_seeds = tuple(config.data.names), config.data.num_seeds
  if not names or num_seeds < 1:
    raise ValueError(
      f"config.data.names={names} and config.data.num_seeds={num_seeds} must be at least one each"
    )
  configs = {}
  for seed in range(config.seed, config.seed + num_seeds):
    for name in names:
      sub = presets.resolve(f"{config.paper}:{name}")
      sub.seed = seed
      sub.data.directory = config.data.directory
      for section in ("eval", "sharding", "train", "checkpoint"):
        sub[section].update(config[section])
      folder = config.data.folders.format(name=name, seed=seed)
      configs[str(files.local_path("config.data.folders", folder))] = sub
  if len(configs) < len(names) * num_seeds:
    raise ValueError(
      f"config.data.folders={config.data.folders!r} gives two runs one folder: it must contain "
      "{name} and {seed}, and config.data.names must not repeat a name"
    )
  return configs


def _check_files(configs: Mapping[str, Any]) -> None:
  """Raises `ValueError` that lists all missing data sets, before anything is trained."""
  missing = []
  for section in {sub.data.name: sub.data for sub in configs.values()}.values():
    if "csbm" not in section:
      try:
        graph_formats.find(section.name, section.directory)
      except ValueError as error:
        missing.append(str(error))
  if missing:
    raise ValueError("\n".join([*missing, "or leave them out of config.data.names"]))


class _Run(NamedTuple):
  """The results of one run.

  scores: mean and standard deviation over its splits in percent, by row.
  """

  scores: dict[str, tuple[float, float]]
  metric: str
  steps: int
  minutes: float
  peak: float | None  # GiB; None where the system does not measure it


def _run_of(part: suite.Part) -> _Run:
  table = next(t for t in part.result.tables if tuple(t.columns) == node_classification.COLUMNS)
  last, peak = part.history[-1], part.result.metrics.get("peak_memory_gib")
  return _Run(
    # Earlier runs kept the numbers as text; float() reads both.
    scores={
      name: next((float(r[1]), float(r[2])) for r in table.rows if r[0].startswith(name))
      for name in ROWS
    },
    metric=next(iter(part.result.metrics)),
    steps=last["step"] + 1,
    minutes=last["seconds"] / 60,
    peak=peak.value if peak else None,
  )


def pooled(scores: list[tuple[float, float]]) -> tuple[float, float]:
  """Returns mean and standard deviation over all splits of all runs, given those of each run."""
  means, deviations = np.transpose(scores)
  return float(means.mean()), float(np.sqrt((deviations**2).mean() + means.var()))


def _summarise(finished: Mapping[str, suite.Part]) -> suite.Summary:
  found: dict[str, list[_Run]] = {}
  for part in finished.values():
    found.setdefault(part.config.preset, []).append(_run_of(part))
  numbers, scores, costs, pooled_rows = {}, [], [], {}
  for name, runs in found.items():
    pooled_rows[name] = rows = {row: pooled([run.scores[row] for run in runs]) for row in ROWS}
    mean, deviation = rows["encoder, trained"]
    gain = mean - rows["encoder, untrained"][0]
    note = f"+- {deviation / 100:.4f} over splits x {len(runs)} initialisations"
    numbers[f"{name}/{runs[0].metric}"] = results.Estimate(mean / 100, note=note)
    numbers[f"{name}/gain"] = results.Estimate(gain / 100)
    cells = [number for pair in rows.values() for number in pair]
    scores.append([name, *cells, gain, *PUBLISHED.get(name, ("", ""))])
    peaks = [run.peak for run in runs if run.peak is not None]
    costs.append(
      [name, len(runs), runs[0].steps, float(np.mean([run.minutes for run in runs])),
       max(peaks) if peaks else ""]
    )  # fmt: skip
  tables = [
    results.Table(
      "Test score in percent, with standard deviations over splits x initialisations",
      ["data set", *(title for row in ROWS for title in (row, "+-")), "gain", "published", "+-"],
      scores,
      caption=(
        "The gain is the difference from the untrained encoder. The published numbers are those of "
        "BGRL, arXiv:2102.06514."
      ),
      digits=2,
    ),
    results.Table(
      "Cost",
      ["data set", "initialisations", "steps", "minutes per run", "peak GiB"],
      costs,
      digits=1,
    ),
  ]
  result = results.Result(metrics=numbers, tables=tables, figures=[_figure(pooled_rows)])
  return suite.Summary(result, next(iter(numbers)))


def _figure(pooled_rows: Mapping[str, Mapping[str, tuple[float, float]]]) -> results.Figure:
  figure, axes = plots.subplots(1, 1)
  axis, places = axes[0][0], np.arange(len(pooled_rows))
  for shift, row in enumerate(ROWS):
    means, deviations = np.transpose([rows[row] for rows in pooled_rows.values()])
    axis.errorbar(places + 0.12 * (shift - 2), means, deviations, fmt="o", ms=4, label=row)
  published = [(k, PUBLISHED[name]) for k, name in enumerate(pooled_rows) if name in PUBLISHED]
  if published:
    at = [k + 0.24 for k, _ in published]
    means, deviations = np.transpose([numbers for _, numbers in published])
    axis.errorbar(at, means, deviations, fmt="_", ms=9, color="0.4", label="BGRL, published")
  axis.set_xticks(places, [name.replace("_", "\n") for name in pooled_rows], fontsize=8)
  axis.set_ylabel("test score, percent")
  axis.legend(fontsize=7)
  caption = (
    "Points show the mean test score of each row, and bars the standard deviation over splits and "
    "initialisations."
  )
  return results.Figure("table", caption, figure)
