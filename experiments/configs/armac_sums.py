r"""ARMAC from sums over all episodes (`rl_theory.armac_sums`), on the games of `armac`.

Command:   python -m experiments.main --config=armac_sums:leduc --workdir=runs/armac-sums-leduc
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import armac, base

PRESETS = {
  "tiny": base.Preset("Kuhn poker, two seeds, a few epochs", "30 seconds", "smoke test"),
  "kuhn": base.Preset(
    "Kuhn poker, three seeds", "5 minutes", "NashConv 0.027, seeds 0.024 to 0.032"
  ),
  "leduc": base.Preset(
    "Leduc poker, three seeds",
    "55 minutes",
    "NashConv 0.170, seeds 0.162 to 0.175; must be below 0.40",
  ),
  "liars_dice": base.Preset(
    "Liar's dice, one die of four sides each, three seeds",
    "35 minutes beside other work",
    "NashConv 0.146, seeds 0.124 to 0.162",
  ),
  "goofspiel": base.Preset(
    "Goofspiel, four cards, imperfect information, three seeds",
    "18 minutes",
    "NashConv 0.084, seeds 0.073 to 0.091",
  ),
  "paper": base.Preset(
    "Liar's dice, six sides, the paper's game; needs an accelerator", "hours", "not run"
  ),
}
BARS = {"leduc": 0.40}


def get_config(preset: str = "leduc") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "trace_decay": 1.0,
    "recency": 1.0,  # 0: CFR in expectation; 1: linear CFR
    "num_episodes": 1024,
    "replay_epochs": 16,
    "num_rounds": 8,
    "batch_size": 512,
    "num_critic_steps": 64,
    "num_actor_steps": 64,
  }
  config = base.game(
    "armac_sums", preset, armac.GAMES[preset], algorithm=algorithm, bar=BARS.get(preset, 0.0)
  )
  config.network.update({"width": 128, "block_width": 64})
  config.optimizer.update({"learning_rate": 1e-3, "final_scale": 0.1, "clip_norm": 10.0})
  config.train.num_steps = 1200 if preset == "leduc" else 600
  config.checkpoint.every = 100
  if preset == "kuhn":
    config.algorithm.num_episodes = 512
    config.network.update({"width": 64, "block_width": 64})
    config.train.num_steps = 400
  elif preset == "paper":
    config.algorithm.update({"num_episodes": 4096, "batch_size": 4096})
    config.network.update({"width": 256, "block_width": 128})
  elif preset == "tiny":
    config.algorithm.update({"num_episodes": 64, "replay_epochs": 4, "batch_size": 64})
    config.algorithm.update({"num_rounds": 2, "num_critic_steps": 8, "num_actor_steps": 8})
    config.network.update({"width": 16, "block_width": 16})
    config.optimizer.learning_rate = 1e-2
    config.environment.num_seeds = 2
    config.train.num_steps = 12
    config.checkpoint.every = 6
  return config
