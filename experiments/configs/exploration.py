r"""ARMAC (arXiv:2008.12234) as a single agent, with tables: exploration in OpenSpiel's deep sea.

The agent moves down `size` rows, left or right in each. One of the 2^size paths ends at the
treasure, and every step towards it has a cost. `algorithm.recency` has two values, which run side
by side: 0 is ARMAC, which learns from the advantages of all its past policies; with 1e6 only those
of the newest policy count.

Command:   python -m experiments.main --config=exploration:deep_sea --workdir=runs/exploration
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("deep seas of 2 and 3 rows, a few epochs", "15 seconds", "smoke test"),
  "deep_sea": base.Preset(
    "deep seas of 3 to 9 rows, eight seeds",
    "35 seconds",
    "4 of 4 criteria; return 0.92 to 0.58, newest policy only 0.45 to 0.09",
  ),
}


def get_config(preset: str = "deep_sea") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "trace_decay": 1.0,
    "epsilon": 0.05,
    "recency": (0.0, 1e6),
    "num_episodes": 64,
    "num_groups": 16,
    "batch_size": 64,
    "capacity": 200,
  }
  config = base.game("exploration", preset, "deep_sea", algorithm=algorithm)
  del config.environment.bar
  config.environment.update({"sizes": (3, 5, 7, 9), "num_seeds": 8})
  config.optimizer.learning_rate = (
    0.5  # step towards the Tree-Backup target; the game is deterministic
  )
  config.train.num_steps = 200
  if preset == "tiny":
    config.environment.update({"sizes": (2, 3), "num_seeds": 2})
    config.algorithm.capacity = config.train.num_steps = 20
    config.checkpoint.every = 10
  return config
