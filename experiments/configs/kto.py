r"""KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: a baseline of DRO's paper.

It learns from single completions, each good (its reward above the mean of the data) or bad.

Command:   python -m experiments.main --config=kto:sentiment --workdir=runs/kto-sentiment
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("random two-layer character model, no weights", "20 seconds", "runs"),
  "sentiment": base.Preset(
    "SmolLM2-135M towards positive continuations, good and bad completions",
    "12 minutes",
    "win rate 0.95, far from the reference (21 nats)",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "num_microbatches": 1,
  }
  if preset == "tiny":
    return base.tiny_language_model("kto", algorithm=algorithm)
  config = base.language_model("kto", preset, algorithm=algorithm)
  config.train.batch_size = 32  # completions, four a prompt: the pass over the data stays as long
  return config
