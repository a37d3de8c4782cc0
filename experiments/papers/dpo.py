"""DPO (arXiv:2305.18290), the baseline: the language-model run on the same pairs as IPO's."""

import pathlib
from typing import Any

from alignment.baselines import dpo
from experiments import language_model, training


def build(config: Any, workdir: pathlib.Path) -> training.Experiment:
  """Returns the experiment of one preset."""
  return language_model.build(config, workdir, algorithm=dpo, collate=language_model.pairs)
