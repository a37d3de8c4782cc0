"""SRPO (arXiv:2406.01660): a language model that rewrites its answers, or the bandit."""

from typing import Any

from experiments.loop import training
from experiments.papers import srpo_bandit
from experiments.tasks import revision


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if config.data.name == "srpo_bandit":
    return srpo_bandit.build(config)
  return revision.build(config)
