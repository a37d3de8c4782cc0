r"""NFSP, Heinrich and Silver 2016, https://arxiv.org/abs/1603.01121: a baseline of the ARMAC paper.

The presets use larger learning rates and smaller memories than the published settings, and learn
faster. `paper` has the published settings (OpenSpiel's, the defaults of `nfsp.Config`) on Leduc
poker.

Command:   python -m experiments.main --config=nfsp:kuhn --workdir=runs/nfsp-kuhn
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import armac, base

PRESETS = {
  "tiny": base.Preset("Kuhn poker, two seeds, a few epochs", "30 seconds", "smoke test"),
  "kuhn": base.Preset(
    "Kuhn poker, three seeds", "70 seconds", "NashConv 0.041, seeds 0.039 to 0.044"
  ),
  "leduc": base.Preset(
    "Leduc poker, three seeds", "7 minutes", "NashConv 1.12, seeds 1.11 to 1.13"
  ),
  "liars_dice": base.Preset(
    "Liar's dice, one die of four sides each", "6 minutes", "NashConv 0.53, seeds 0.49 to 0.59"
  ),
  "goofspiel": base.Preset(
    "Goofspiel, four cards, imperfect information",
    "11 minutes",
    "NashConv 0.215, seeds 0.210 to 0.224",
  ),
  "paper": base.Preset("Leduc poker with the published settings", "hours", "not run"),
}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "anticipatory": 0.1,
    "epsilon_start": 0.06,
    "epsilon_end": 0.001,
    "epsilon_decay": 1e6,
    "num_episodes": 128,
    "batch_size": 128,
    "learn_every": 64,
    "learning_starts": 100,
    "target_period": 300,
    "replay_capacity": 20_000,
    "reservoir_capacity": 20_000,
  }
  game = "leduc_poker" if preset == "paper" else armac.GAMES[preset]
  config = base.game("nfsp", preset, game, algorithm=algorithm)
  config.network.widths = (64,)
  config.optimizer.update({"values_learning_rate": 0.1, "learning_rate": 0.1})
  config.train.update({"num_steps": 200, "inner_steps": 20})
  if preset == "tiny":
    config.environment.num_seeds = 2
    config.algorithm.update({"num_episodes": 32, "batch_size": 16})
    config.train.update({"num_steps": 10, "inner_steps": 5})
  elif preset != "kuhn":
    # Tried on Leduc only. The memories are the defaults of `nfsp.Config`.
    config.algorithm.update({"epsilon_decay": 1e7, "learning_starts": 1000})
    config.algorithm.update({"replay_capacity": 200_000, "reservoir_capacity": 200_000})
    config.network.widths = (128,)
    config.optimizer.learning_rate = 0.005
    config.train.update({"num_steps": 200, "inner_steps": 50})
  if preset == "paper":
    config.algorithm.update({"epsilon_decay": 3e6, "reservoir_capacity": 2_000_000})
    config.optimizer.update({"values_learning_rate": 0.01, "learning_rate": 0.01})
    config.train.update({"num_steps": 1000, "inner_steps": 80})
  return config
