r"""Reward against KL on the sentiment task: one run for each of `algorithms`, and one figure.

Each algorithm trains as its own preset does, and is evaluated on the way. Its path through the
plane of sequence KL and reward is one curve. Runs that are already finished in the work directory
are not repeated. Any method with a `sentiment` preset can be listed: `--config.algorithms="('srpo',
'nash_md')"`.

Command:   python -m experiments.main --config=frontier:sentiment --workdir=runs/frontier
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "sentiment": base.Preset(
    "reward against KL of CoPG, IPO and DPO, SmolLM2-135M",
    "30 minutes",
    "at equal KL the three are within each other's intervals",
  ),
  "tiny": base.Preset("the same on the random character model", "1 minute", "smoke test"),
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
