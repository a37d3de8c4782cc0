"""Self-predictive learning (arXiv:2212.03319) on random Markov chains."""

from typing import Any

from experiments.loop import training
from experiments.papers import self_predictive_flows, self_predictive_steps, self_predictive_values

_FIGURES = {
  "collapse": self_predictive_steps,
  "ratio": self_predictive_steps,
  "ema": self_predictive_steps,
  "trace": self_predictive_flows,
  "bidirectional": self_predictive_flows,
  "values": self_predictive_values,
}


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  return _FIGURES[config.data.name].build(config)
