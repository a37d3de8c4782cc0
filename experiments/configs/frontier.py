r"""Reward against KL on the sentiment task: a run for each of `algorithms`, and one figure.

Each algorithm trains as its own preset does, evaluated along the way; its path through the plane of
sequence KL and reward is one curve. Runs already in the work directory are not repeated. Any method
with a `sentiment` preset can be listed: `--config.algorithms="('srpo', 'nash_md')"`.

Command:   python -m experiments.main --config=frontier:sentiment --workdir=runs/frontier
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "sentiment": base.Preset(
    "reward against KL of CoPG, IPO and DPO, SmolLM2-135M", "30 minutes", "one figure"
  ),
  "tiny": base.Preset("the same on the random character model", "1 minute", "runs"),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset; its sections replace those of the runs."""
  base.check_preset(preset, PRESETS)
  return ml_collections.ConfigDict(
    {
      "paper": "frontier",
      "preset": preset,
      "seed": 0,
      "algorithms": ("copg", "ipo", "dpo"),
      "eval": {"every": 10},
      "sharding": {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 40, "log_every": 1},
      "checkpoint": {"every": 20, "keep": 1},
    }
  )
