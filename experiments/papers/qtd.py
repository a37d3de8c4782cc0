"""Quantile TD (arXiv:2301.04462): its figures, and the error of its value (arXiv:2305.18388)."""

from typing import Any

from experiments.loop import training
from experiments.papers import qtd_artefact, qtd_chain, qtd_portraits, qtd_statistics
from sharding import checks

FIGURES = {
  "chain": qtd_chain,
  "portraits": qtd_portraits,
  "artefact": qtd_artefact,
  "statistics": qtd_statistics,
}


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  checks.choice("config.data.name", config.data.name, tuple(FIGURES))
  return FIGURES[config.data.name].build(config)
