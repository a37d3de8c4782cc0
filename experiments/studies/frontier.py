"""Compares reward against sequence KL during the training of several algorithms."""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.loop import suite, training
from experiments.report import plots, results
from experiments.tasks import language_report

NAMES = {
  "copg": "CoPG",
  "dpo": "DPO",
  "dro": "DRO-V",
  "ipo": "IPO",
  "kto": "KTO",
  "nash_md": "Nash-MD-PG",
  "online_ipo": "online IPO",
  "rloo": "RLOO",
  "srpo": "SRPO",
}


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Trains each algorithm in its own folder and compares all of them in one report."""
  known = {name: f"{name}:{config.preset}" for name in NAMES}
  parts = suite.configs_of(
    "config.algorithms", config.algorithms, known, needs=("reward", "eval.num_prompts")
  )
  for part in parts.values():
    part.seed = config.seed
    for section in ("eval", "sharding", "train", "checkpoint"):
      part[section].update(config[section])
  return suite.run(config, workdir, parts, _summarise)


def _summarise(parts: Mapping[str, suite.Part]) -> suite.Summary:
  records = {name: part.history.evals for name, part in parts.items()}
  rows = []
  found = {}
  for name, evaluations in records.items():
    last = evaluations[-1]
    for key in ("win_rate", "reward", "kl"):
      found[f"{name}/{key}"] = language_report.estimate(last, key)
    for row in evaluations:
      cells = [language_report.estimate(row, key) for key in ("kl", "reward", "win_rate")]
      rows.append([_name(name), row["step"], *cells, row["length"], row["distinct_2"]])
  columns = ["algorithm", "step", "KL", "reward", "win rate", "length", "distinct-2"]
  table = results.Table(
    "Evaluations", columns, rows, caption="Brackets hold 95 % confidence intervals.", digits=3
  )
  return suite.Summary(
    results.Result(metrics=found, tables=[table]), f"{next(iter(parts))}/reward", [draw(records)]
  )


def draw(records: Mapping[str, list[dict[str, Any]]]) -> results.Figure:
  """Draws mean held-out reward against sequence KL, from the reference (KL 0) to the end."""
  figure, axes = plots.subplots(1, 1, size=(4.6, 3.6))
  axis = axes[0][0]
  for name, rows in records.items():
    kl, reward, reach = language_report.path_over_kl(rows, "reward")
    axis.errorbar(kl, reward, yerr=reach, marker="o", capsize=2, label=_name(name))
  axis.set(xlabel="sequence KL to the reference, nats", ylabel="mean reward on held-out prompts")
  axis.legend()
  caption = (
    "Each curve shows one algorithm and each point one evaluation. All curves start at the "
    "reference. Bars are 95 % intervals of the mean reward."
  )
  return results.Figure(name="reward_kl", caption=caption, figure=figure)


def _name(part: str) -> str:
  return NAMES.get(part, part)
