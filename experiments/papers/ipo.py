"""IPO (arXiv:2310.12036): a language model that learns from labelled pairs, or the bandits."""

from typing import Any

from alignment import ipo
from experiments.loop import training
from experiments.papers import ipo_bandit
from experiments.tasks import language


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "ipo_bandit":
    return ipo_bandit.build(config)
  return language.build(config, algorithm=ipo, collate=language.pairs)
