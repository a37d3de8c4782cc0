"""Variants of a method on images, several seeds of each, and the orderings that they should have.

Each variant and seed is an ordinary run in a folder of its own; finished runs are not trained
again. A row of the table is one metric of one variant. A criterion names two rows and a margin. It
passes if the first row is better by more than the margin with 95 % confidence, by Student's
interval of the differences between runs of the same seed.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments.loop import presets, suite, training
from experiments.report import plots, results, statistics
from sharding import checks

_SHARED = ("sharding", "train", "eval", "checkpoint")


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains every variant with every seed and writes one report.

  If a signal stops it, the report has the finished runs.
  """
  return suite.run(
    config,
    workdir,
    parts(config),
    lambda finished: _summarise(config, finished),
    report_unfinished=True,
  )


def parts(config: Any) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of each run by its folder; all variants of the first seed come first."""
  checks.count("config.data.num_seeds", config.data.num_seeds)
  variants, rows = ([entry[0] for entry in config[name]] for name in ("variants", "rows"))
  for _, variant, _ in config.rows:
    checks.choice("a variant in config.rows", variant, variants)
  for better, worse, _ in config.criteria:
    for name in (better, worse):
      checks.choice("a name in config.criteria", name, rows)
  shared = [
    (f"{section}.{name}", value) for section in _SHARED for name, value in config[section].items()
  ]
  configs = {}
  for seed in range(config.seed, config.seed + config.data.num_seeds):
    for name, base, *changes in config.variants:
      sub = presets.resolve(base)
      for field, value in shared:
        section, field = field.split(".")
        if field in sub[section]:
          sub[section][field] = value
      if config.data.source:
        sub.data.source = config.data.source
      sub.data.directory = config.data.directory
      sub.seed = seed
      sub = presets.override(sub, [tuple(change.split("=", 1)) for change in changes])
      presets.check(sub)
      configs[f"{_folder(name)}-{seed}"] = sub
  return configs


def _summarise(config: Any, finished: Mapping[str, suite.Part]) -> suite.Summary:
  scores = {name: found for name, *where in config.rows if (found := _scores(finished, *where))}
  # Accuracies are shares; other metrics may be any number.
  methods = {row[0]: "logit" if row[-1].endswith("accuracy") else "t" for row in config.rows}
  means = {
    name: statistics.mean_interval(list(by_seed.values()), method=methods[name])
    for name, by_seed in scores.items()
  }
  criteria, differences = [], []
  for better, worse, margin in config.criteria:
    both = sorted(scores.get(better, {}).keys() & scores.get(worse, {}).keys())
    if not both:
      continue
    difference = statistics.mean_interval(
      [scores[better][seed] - scores[worse][seed] for seed in both]
    )
    passed = difference.low is not None and difference.low > margin
    by = f" by {100 * margin:g} points" if margin else ""
    criteria.append((f"{better} above {worse}{by}", passed))
    differences.append([better, worse, results.percent(difference)])
  tables = [
    results.checks_table("Criteria", criteria),
    results.Table(
      "Differences in percentage points",
      ["row", "minus", "difference"],
      differences,
      caption="Brackets hold 95 % intervals over the seeds.",
      digits=1,
    ),
    results.Table(
      "Test accuracy in percent",
      ["row", "mean", "seeds"],
      [
        [name, results.percent(means[name]), [100 * value for value in by_seed.values()]]
        for name, by_seed in scores.items()
      ],
      digits=1,
    ),
  ]
  metrics: dict[str, Any] = dict(means)
  headline = next(iter(metrics))
  if criteria:
    headline = "criteria_passed"
    metrics = {headline: statistics.fraction_passed(criteria), **metrics}
  result = results.Result(metrics=metrics, tables=tables if criteria else tables[2:])
  return suite.Summary(result, headline, [_figure(scores, means)])


def _scores(finished: Mapping[str, suite.Part], variant: str, metric: str) -> dict[int, float]:
  """Returns the metric of each finished run of a variant, by its seed."""
  parts = (part for name, part in finished.items() if name.rpartition("-")[0] == _folder(variant))
  return {part.config.seed: part.result.metrics[metric].value for part in parts}


def _folder(name: str) -> str:
  return re.sub(r"[^\w.]+", "-", name)


def _figure(scores: Any, means: Any) -> results.Figure:
  figure, axes = plots.subplots(1, 1, size=(4.2, 0.8 + 0.26 * len(scores)))
  axis, places = axes[0][0], np.arange(len(scores))[::-1]
  for place, (name, by_seed) in zip(places, scores.items(), strict=True):
    mean = means[name]
    axis.plot([100 * x for x in by_seed.values()], [place] * len(by_seed), "o", ms=3, color="0.6")
    if mean.low is not None and mean.high is not None:
      axis.plot([100 * mean.low, 100 * mean.high], [place] * 2, color=plots.PALETTE[0])
    axis.plot(100 * mean.value, place, "D", ms=5, color=plots.PALETTE[0])
  axis.set_yticks(places, list(scores))
  axis.set_xlabel("test accuracy, percent")
  caption = "Grey points are seeds, diamonds their means, and bars 95 % intervals."
  return results.Figure("comparison", caption, figure)
