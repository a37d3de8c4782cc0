"""DPO (arXiv:2305.18290), a baseline: a language model and labelled pairs, or the bandit."""

from typing import Any

from alignment.baselines import dpo
from experiments.loop import training
from experiments.papers import dpo_bandit
from experiments.tasks import language


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "dpo_bandit":
    return dpo_bandit.build(config)
  return language.build(config, algorithm=dpo, collate=language.pairs)
