"""A method on several graphs, from several initialisations each: the table of its paper.

A run of runs: each data set and seed is an ordinary run in a folder of its own, which need not be
trained again if it is there, whoever trained it.
"""

import pathlib
import types
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments import evaluation, metrics, node_classification, presets, report, several, training
from experiments import workdir as run_folder
from experiments.data import graph_formats

# Mean and standard deviation of BGRL, arXiv:2102.06514 (version of ICLR), in percent.
PUBLISHED = {
  "wikics": (79.98, 0.10),
  "amazon_computers": (90.34, 0.19),
  "amazon_photo": (93.17, 0.30),
  "coauthor_cs": (93.31, 0.13),
  "coauthor_physics": (95.73, 0.05),
}
ROWS = ("features", "SGC-2", "encoder, untrained", "encoder, trained")


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains every data set from every seed, then draws all of them into one report.

  Returns:
    The outcome of the run that a signal stopped (the report then has what is finished), or the last
    one's with the numbers of all.
  """
  configs = parts(config)
  _check_files(configs)
  outcome, records = several.train_each(configs, workdir)
  if records:
    found: dict[str, list[_Run]] = {}
    for folder, history in records.items():
      results = run_folder.read_json(workdir / folder / "results.json")["result"]
      found.setdefault(configs[folder].preset, []).append(
        _Run(evaluation.Result.from_json(results), history)
      )
    result = _result(found)
    run_folder.write_json(workdir / "results.json", {"step": 0, "result": result.to_json()})
    writer = types.SimpleNamespace(figures=None, headline=next(iter(result.metrics)))
    report.write_run(workdir, writer, config, metrics.History(), result)
    if outcome.result is not None:
      outcome = outcome._replace(result=result)
  return outcome


def parts(config: Any) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of each run by its folder; the first seed of all data sets comes first."""
  names, num_seeds = tuple(config.data.names), config.data.num_seeds
  if not names or num_seeds < 1:
    raise ValueError(
      f"config.data.names={names}, config.data.num_seeds={num_seeds}: give one of each, or more"
    )
  configs = {}
  for seed in range(config.seed, config.seed + num_seeds):
    for name in names:
      sub = presets.resolve(f"{config.paper}:{name}")
      sub.seed = seed
      sub.data.directory = config.data.directory
      for section in ("eval", "sharding", "train", "checkpoint"):
        sub[section].update(config[section])
      configs[config.data.folders.format(name=name, seed=seed)] = sub
  if len(configs) < len(names) * num_seeds:
    raise ValueError(
      f"config.data.folders={config.data.folders!r} gives two runs one folder: it needs {{name}} "
      "and {seed}, and config.data.names each name once"
    )
  return configs


def _check_files(configs: Mapping[str, Any]) -> None:
  """Raises `ValueError` with all data sets that are not on disk, before anything is trained."""
  missing = []
  for section in {sub.data.name: sub.data for sub in configs.values()}.values():
    if "csbm" not in section:
      try:
        graph_formats.find(section.name, section.directory)
      except ValueError as error:
        missing.append(str(error))
  if missing:
    raise ValueError("\n".join([*missing, "or leave them out of config.data.names"]))


class _Run:
  """What one run came to."""

  def __init__(self, result: evaluation.Result, history: metrics.History):
    table = next(t for t in result.tables if tuple(t.columns) == node_classification.COLUMNS)
    # Mean and deviation over its splits, in percent to two digits.
    self.scores = {
      name: next((float(r[1]), float(r[2])) for r in table.rows if r[0].startswith(name))
      for name in ROWS
    }
    self.metric = next(iter(result.metrics))
    self.steps = history[-1]["step"] + 1
    self.minutes = history[-1]["seconds"] / 60
    peak = result.metrics.get("peak_memory_gib")  # absent where the system does not tell
    self.peak = peak.value if peak else None


def pooled(scores: list[tuple[float, float]]) -> tuple[float, float]:
  """Returns mean and standard deviation of all splits of all runs from those of each run."""
  means, deviations = np.transpose(scores)
  return float(means.mean()), float(np.sqrt((deviations**2).mean() + means.var()))


def _result(found: Mapping[str, list[_Run]]) -> evaluation.Result:
  numbers, scores, costs, pooled_rows = {}, [], [], {}
  for name, runs in found.items():
    pooled_rows[name] = rows = {row: pooled([run.scores[row] for run in runs]) for row in ROWS}
    mean, deviation = rows["encoder, trained"]
    gain = mean - rows["encoder, untrained"][0]
    published = "{:.2f} +- {:.2f}".format(*PUBLISHED[name]) if name in PUBLISHED else "-"
    note = f"+- {deviation / 100:.4f} over splits x {len(runs)} initialisations"
    numbers[f"{name}/{runs[0].metric}"] = evaluation.Estimate(mean / 100, note=note)
    numbers[f"{name}/gain"] = evaluation.Estimate(gain / 100)
    cells = ["{:.2f} +- {:.2f}".format(*rows[row]) for row in ROWS]
    scores.append([name, *cells, f"{gain:+.2f}", published])
    peaks = [run.peak for run in runs if run.peak is not None]
    costs.append(
      [name, len(runs), runs[0].steps, f"{np.mean([run.minutes for run in runs]):.1f}",
       f"{max(peaks):.2f}" if peaks else "-"]
    )  # fmt: skip
  return evaluation.Result(
    metrics=numbers,
    tables=[
      report.Table(
        "Percent, mean +- standard deviation over splits x initialisations",
        ["data set", *ROWS, "gain", "published"],
        scores,
        caption="Published: BGRL, arXiv:2102.06514. The gain is over the untrained encoder.",
      ),
      report.Table(
        "Cost", ["data set", "initialisations", "steps", "minutes a run", "peak GiB"], costs
      ),
    ],
    figures=[_figure(pooled_rows)],
  )


def _figure(pooled_rows: Mapping[str, Mapping[str, tuple[float, float]]]) -> report.Figure:
  figure, axes = report.subplots(1, 1)
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
  caption = "Means and standard deviations over splits and initialisations."
  return report.Figure("table", caption, figure)
