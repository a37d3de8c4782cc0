"""ARMAC beside NFSP, MCCFR and CFR on one game: a run for each of `methods`, and one figure."""

import pathlib
from typing import Any

from experiments import evaluation, metrics, presets, report, several, solving, training

METHODS = {
  "armac": "armac:{preset}",
  "nfsp": "nfsp:{preset}",
  "mccfr": "cfr:{preset}_sampled",
  "cfr": "cfr:{preset}",
}


def run(config: Any, workdir: pathlib.Path) -> training.Outcome:
  """Runs each method in a folder of its own, then draws all of them into one report.

  Returns:
    The outcome of the run that a signal stopped, or the last one's with the final numbers of all.
  """
  unknown = sorted(set(config.methods) - set(METHODS))
  if unknown or not config.methods:
    raise ValueError(
      f"config.methods={tuple(config.methods)}: choose one or more of {', '.join(METHODS)}"
    )
  configs = {}
  for name in config.methods:
    configs[name] = presets.resolve(METHODS[name].format(preset=config.preset))
    configs[name].seed = config.seed
  outcome, records = several.train_each(configs, workdir)
  if outcome.result is None:
    return outcome
  result = _result(records)
  report.write_run(workdir, _Figures(records), config, metrics.History(), result)
  return outcome._replace(result=result)


class _Figures:
  """What a report asks of an experiment."""

  def __init__(self, records: dict[str, metrics.History]):
    self._records = records
    self.headline = f"nash_conv/{next(iter(records))}"

  def figures(self, history: Any, result: Any) -> list[report.Figure]:
    del history, result
    return [solving.curves(self._records)]


def _result(records: dict[str, metrics.History]) -> evaluation.Result:
  """Returns every method's distance at its end and where the shortest of them ended."""
  shortest = min(history[-1]["env_steps"] for history in records.values())
  found, rows = {}, []
  for name, history in records.items():
    last = history[-1]
    # The last measurement that had seen no more than the shortest run.
    within = [row for row in history if row["env_steps"] <= shortest] or [history[0]]
    for row in (within[-1], last):
      cells = [f"{row[key]:.4f}" for key in ("nash_conv", "nash_conv/low", "nash_conv/high")]
      rows.append([name, f"{row['env_steps']:.3g}", f"{row['seconds']:.0f}", *cells])
    found[f"nash_conv/{name}"] = evaluation.Estimate(
      within[-1]["nash_conv"],
      within[-1]["nash_conv/low"],
      within[-1]["nash_conv/high"],
      note=f"after {within[-1]['env_steps']:.3g} decisions",
    )
  columns = ["method", "decisions", "seconds", "NashConv", "best seed", "worst seed"]
  title = "At the number of decisions that all have played, and at the end of each"
  return evaluation.Result(metrics=found, tables=[report.Table(title, columns, rows)])
