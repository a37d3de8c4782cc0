"""Supervised fine-tuning on your own demonstrations, the usual first step before alignment.

Like the runs of the alignment papers, it compares the tuned model with its starting point on
held-out prompts. It exports a model folder, which those runs take as `network.model`.
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
