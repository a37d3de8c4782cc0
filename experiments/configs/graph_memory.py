r"""Memory of a step of BGRL and of GRACE against the number of nodes.

Thakoor et al. 2021, https://arxiv.org/abs/2102.06514, compare it on their data sets. Here random
graphs grow at a constant mean degree, with the encoder of Amazon Computers. Steps are compiled and
not run, so any machine can measure any size.

Command:   python -m experiments.main --config=graph_memory:paper --workdir=runs/graph-memory
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "paper": base.Preset(
    "1,000 to 32,000 nodes, 18 compilations",
    "6 minutes",
    "3 of 3 criteria; slopes 1.00 (BGRL), 1.92 (GRACE), 1.01 (32 negatives)",
  ),
  "tiny": base.Preset("1,000 to 4,000 nodes, a small encoder", "1 minute", "3 of 3 criteria"),
}


def get_config(preset: str = "paper") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  tiny = preset == "tiny"
  return ml_collections.ConfigDict(
    {
      "paper": "graph_memory",
      "preset": preset,
      "seed": 0,
      "algorithm": {"num_negatives": 32},  # for the third curve
      "network": {
        "widths": (16, 8) if tiny else (256, 128),
        "predictor_width": 16 if tiny else 512,
      },
      "data": {
        "num_nodes": (1000, 2000, 4000) if tiny else (1000, 2000, 4000, 8000, 16_000, 32_000),
        "num_features": 16 if tiny else 128,
        "mean_degree": 10.0,
      },
      "optimizer": {},
      "sharding": {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 1, "log_every": 1},
      "eval": {"every": 0},
      "checkpoint": {"every": 0, "keep": 1},
    }
  )
