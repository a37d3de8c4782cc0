"""CoPG (arXiv:2406.19185): a language model and scored completions, or the bandit."""

from typing import Any

from alignment import copg
from experiments.loop import training
from experiments.papers import copg_bandit
from experiments.tasks import language


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "copg_bandit":
    return copg_bandit.build(config)
  return language.build(config, algorithm=copg, collate=language.groups)
