r"""Nash-MD, Munos et al. 2023, https://arxiv.org/abs/2312.00886.

`bandit` has no counterpart in the paper, which shows its theorem and its language models but no
table: mirror descent on two cyclic games beside the theorem's bound, last and average policies of
large steps, and where the exact policy gradient stops for each mixture.

Command:   python -m experiments.main --config=nash_md:bandit --workdir=runs/nash-md-bandit
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "Nash-MD, self-play, best response and moving averages on cyclic games",
    "1 minute",
    "KL to the equilibrium below the bound; exploitability rises with beta",
  ),
}


def get_config(preset: str = "bandit") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = base.bandit("nash_md", preset, algorithm={"tau": 0.1})
  config.data = ml_collections.ConfigDict({"name": "cyclic_games"})
  # 40,000 exact policy-gradient steps.
  config.optimizer.learning_rate = 0.5
  config.train.update({"num_steps": 40, "inner_steps": 1000})
  config.checkpoint.every = 20
  return config
