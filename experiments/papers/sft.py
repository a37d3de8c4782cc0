"""Supervised fine-tuning: the start of every alignment run, on demonstrations of your own.

The run compares the tuned model with the one it started from on held-out prompts, like the runs
of the alignment papers, whose `network.model` its exported folder can be.
"""

from typing import Any

from alignment.baselines import sft
from experiments.loop import training
from experiments.tasks import language


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  if not config.data.demonstrations:
    raise ValueError(
      "data.demonstrations is empty: give --config.data.demonstrations=FILE (JSON lines of prompt "
      "and completion), tfds:NAME, hf:NAME or scitldr:FILE"
    )
  return language.build(config, algorithm=sft, collate=language.demonstrations)
