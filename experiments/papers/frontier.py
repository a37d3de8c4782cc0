"""Reward against sequence KL along the training of several algorithms: runs of runs."""

import pathlib
from typing import Any

import numpy as np

from experiments import evaluation, metrics, presets, report, several, training

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
  """Trains each algorithm in a folder of its own, then draws all of them into one report.

  Returns:
    The outcome of the run that a signal stopped, or the last one's with the final numbers of all.
  """
  unknown = sorted(set(config.algorithms) - set(NAMES))
  if unknown or not config.algorithms:
    raise ValueError(
      f"config.algorithms={tuple(config.algorithms)}: choose one or more of {', '.join(NAMES)}"
    )
  configs = {}
  for name in config.algorithms:
    configs[name] = sub = presets.resolve(f"{name}:{config.preset}")
    sub.seed = config.seed
    for section in ("eval", "sharding", "train", "checkpoint"):
      sub[section].update(config[section])
  outcome, histories = several.train_each(configs, workdir)
  if outcome.result is None:
    return outcome
  records = {name: history.evals for name, history in histories.items()}
  result = _result(records)
  report.write_run(workdir, _Figures(records), config, metrics.History(), result)
  return outcome._replace(result=result)


class _Figures:
  """What a report asks of an experiment."""

  def __init__(self, records: dict[str, list[dict[str, Any]]]):
    self._records = records
    self.headline = f"{next(iter(records))}/reward"

  def figures(self, history: Any, result: Any) -> list[report.Figure]:
    del history, result
    return [draw(self._records)]


def draw(records: dict[str, list[dict[str, Any]]]) -> report.Figure:
  """Draws mean held-out reward against sequence KL, from the reference (KL 0) to the end."""
  figure, axes = report.subplots(1, 1, size=(4.6, 3.6))
  axis = axes[0][0]
  for name, rows in records.items():
    start = rows[0]["reward_reference"]
    kl = np.array([0.0, *(row["kl"] for row in rows)])
    reward = np.array([start, *(row["reward"] for row in rows)])
    low = np.array([start, *(row["reward_low"] for row in rows)])
    high = np.array([start, *(row["reward_high"] for row in rows)])
    axis.errorbar(
      kl, reward, yerr=[reward - low, high - reward], marker="o", capsize=2, label=NAMES[name]
    )
  axis.set(xlabel="sequence KL to the reference, nats", ylabel="mean reward, held-out prompts")
  axis.legend()
  caption = "One curve an algorithm, one point an evaluation; bars are 95 % intervals of the mean."
  return report.Figure(name="reward_kl", caption=caption, figure=figure)


def _result(records: dict[str, list[dict[str, Any]]]) -> evaluation.Result:
  rows = []
  found = {}
  for name, evaluations in records.items():
    last = evaluations[-1]
    for key in ("win_rate", "reward", "kl"):
      found[f"{name}/{key}"] = evaluation.Estimate(
        last[key], last.get(f"{key}_low"), last.get(f"{key}_high")
      )
    for row in evaluations:
      cells = (f"{row[key]:.3f}" for key in ("kl", "reward", "win_rate", "length", "distinct_2"))
      rows.append([NAMES[name], row["step"], *cells])
  columns = ["algorithm", "step", "KL", "reward", "win rate", "length", "distinct-2"]
  return evaluation.Result(metrics=found, tables=[report.Table("Evaluations", columns, rows)])
