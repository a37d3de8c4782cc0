r"""The deep form of self-predictive learning, Tang et al. 2022, https://arxiv.org/abs/2212.03319.

A recurrent agent learns in a small partially observed world, with the forward (BYOL-RL) loss, with
the bidirectional losses, and with neither: ten seeds each, trained as one program. The paper adds
these losses to V-MPO and trains on the 30 tasks of DMLab-30. This is not that: the agent is a small
advantage actor-critic, and the worlds are games of OpenSpiel of which we hide a part
(`tasks/masked_worlds.py`). No preset repeats the paper's runs, so there is none called `paper`.

Command:   python -m experiments.main --config=latent_prediction:catch --workdir=runs/latent-catch
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "catch": base.Preset(
    "catch; the ball vanishes after two rows",
    "2 minutes",
    "2 of 2 criteria; return 0.97 without, 0.99 forward, 0.99 bidirectional; no difference",
  ),
  "screen": base.Preset(
    "catch; the ball passes behind a screen",
    "2 minutes",
    "2 of 2 criteria; return equal; hidden column read by a probe 0.83, 0.98, 0.99",
  ),
  "rooms": base.Preset(
    "four rooms, with a view of 3 x 3 cells",
    "4 minutes",
    "2 of 2 criteria; return equal; cell read by a probe 0.87, 0.95, 0.95",
  ),
  "tiny": base.Preset("catch on a small board, two seeds", "30 seconds", "smoke test"),
}
_WORLDS = {
  "catch": {"world": "catch", "rows": 10, "columns": 7, "hidden_rows": (2, 8)},
  "screen": {"world": "catch", "rows": 10, "columns": 7, "hidden_rows": (2, 7)},
  "rooms": {"world": "rooms", "length": 24},
  "tiny": {"world": "catch", "rows": 6, "columns": 3, "hidden_rows": (1, 4)},
}


def get_config(preset: str = "catch") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  tiny = preset == "tiny"
  return ml_collections.ConfigDict(
    {
      "paper": "latent_prediction",
      "preset": preset,
      "seed": 0,
      "algorithm": {
        "weight": 1.0,  # of each auxiliary loss, where the agent has it
        "horizon": 4,
        "target_decay": 0.99,
        "discount": 0.99,
        "trace_decay": 0.9,
        "value_weight": 0.5,
        "entropy_weight": 0.01,
      },
      "network": {"width": 8 if tiny else 32},
      "environment": {**_WORLDS[preset], "num_seeds": 2 if tiny else 10, "batch_size": 16},
      "optimizer": {"learning_rate": 3e-3},
      "sharding": {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 4 if tiny else 50, "inner_steps": 5 if tiny else 25, "log_every": 1},
      "eval": {"every": 0, "num_episodes": 64 if tiny else 1000},
      "checkpoint": {"every": 2 if tiny else 10, "keep": 1},
    }
  )
