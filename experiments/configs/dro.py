r"""DRO, Richemond et al. 2024, https://arxiv.org/abs/2405.19107.

`bandit` is three prompts with five completions each (the paper has no such experiment): the value
is what lets every scored completion be used alone. Beside DRO-V, what the paper's ablations vary:
one value for all prompts, no value, DRO-P over a batch; and KTO.

Command:   python -m experiments.main --config=dro:bandit --workdir=runs/dro-bandit
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "DRO-V, a shared value, no value, DRO-P and KTO on three prompts, three tau",
    "1 minute",
    "DRO-V within 1e-4 of its closed form; a shared value and DRO-P share a biased one",
  ),
}


def get_config(preset: str = "bandit") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = base.bandit("dro", preset, algorithm={"tau": (0.5, 1.0, 5.0)})
  config.data = ml_collections.ConfigDict({"name": "three_prompts"})
  # Full batches, so nothing is random: 12,000 Adam steps with a cosine decay.
  config.optimizer.learning_rate = 3e-2
  config.train.update({"num_steps": 60, "inner_steps": 200})
  config.checkpoint.every = 20
  return config
