"""A run of runs: each in a folder of its own below the work directory, one after the other."""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import metrics, training
from experiments import workdir as run_folder


def train_each(
  configs: Mapping[str, Any], workdir: pathlib.Path
) -> tuple[training.Outcome, dict[str, metrics.History]]:
  """Trains each config in `workdir/<name>`; one that is finished there is not trained again.

  Returns:
    The last outcome, whose `result` is None if a signal stopped it (then the rest has not been
    trained), and the records by name.
  """
  records = {}
  for name, config in configs.items():
    folder = workdir / name
    run_folder.claim(config, folder)
    module = importlib.import_module(f"experiments.papers.{config.paper}")
    outcome = training.train(module.build(config, folder), config, folder)
    if outcome.result is None:
      break
    records[name] = metrics.JsonLines(folder / "metrics.jsonl").read()
  return outcome, records
