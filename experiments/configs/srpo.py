r"""SRPO, Choi et al. 2024, https://arxiv.org/abs/2406.01660.

`bandit` is a three-armed bandit of our own design in the spirit of the paper's (whose constants we
do not know): who wrote the data decides what IPO and DPO call best, and does not move SRPO. With
it, in closed form on ten ordered arms, what revising an answer up to five times brings.

Command:   python -m experiments.main --config=srpo:bandit --workdir=runs/srpo-bandit
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "SRPO, IPO and DPO on data of three behaviour policies, and revisions",
    "1 minute",
    "SRPO within 0.01 of its closed form whoever wrote the data; IPO's favourite changes",
  ),
}


def get_config(preset: str = "bandit") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {"beta": 0.1, "alpha": 0.5, "ipo_tau": 0.1, "dpo_beta": 1.0}
  config = base.bandit("srpo", preset, algorithm=algorithm)
  config.data.update({"num_seeds": 5, "batch_size": 128, "num_pairs": 10_000})
  # 4,000 optimisation steps; the policies are averaged over the last 500.
  config.train.update({"num_steps": 8, "inner_steps": 500})
  config.checkpoint.every = 4
  return config
