r"""ARMAC, Gruslys et al. 2020, https://arxiv.org/abs/2008.12234.

The games are OpenSpiel's: Kuhn and Leduc poker, Liar's dice with one die of four sides each, and
Goofspiel with four cards. `paper` is Liar's dice with six sides. The paper publishes no optimiser,
no batch sizes and no lambda; ours are our own choice. `solvers` runs NFSP, MCCFR and CFR beside it.

Command:   python -m experiments.main --config=armac:kuhn --workdir=runs/armac-kuhn
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("Kuhn poker, two seeds, a few epochs", "30 seconds", "smoke test"),
  "kuhn": base.Preset(
    "Kuhn poker, three seeds",
    "8 minutes",
    "NashConv 0.076, seeds 0.067 to 0.083; must be below 0.10",
  ),
  "leduc": base.Preset(
    "Leduc poker, three seeds",
    "40 minutes",
    "NashConv 0.571, seeds 0.557 to 0.597; must be below 0.60",
  ),
  "liars_dice": base.Preset(
    "Liar's dice, one die of four sides each",
    "50 minutes beside other work",
    "NashConv 0.319, seeds 0.278 to 0.360",
  ),
  "goofspiel": base.Preset(
    "Goofspiel, four cards, imperfect information",
    "22 minutes",
    "NashConv 0.52, seeds 0.35 to 0.66",
  ),
  "paper": base.Preset(
    "Liar's dice, six sides, an LSTM of 256; needs an accelerator", "hours", "not run"
  ),
}
GAMES = {
  "tiny": "kuhn_poker",
  "kuhn": "kuhn_poker",
  "leduc": "leduc_poker",
  "liars_dice": "liars_dice(numdice=1,dice_sides=4)",
  "goofspiel": "goofspiel(num_cards=4,imp_info=True,points_order=descending)",
  "paper": "liars_dice(numdice=1,dice_sides=6)",
}
# Names in the texts of --list.
TITLES = {
  "tiny": "Kuhn poker",
  "kuhn": "Kuhn poker",
  "leduc": "Leduc poker",
  "liars_dice": "Liar's dice, four sides",
  "goofspiel": "Goofspiel, four cards",
}
BARS = {"kuhn": 0.10, "leduc": 0.60}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "trace_decay": 1.0,
    "epsilon": 0.05,
    "recency": 0.0,
    "num_episodes": 512,
    "num_groups": 32,
    "batch_size": 64,
    "num_critic_steps": 64,
    "num_actor_steps": 64,
    "capacity": 512,
  }
  config = base.game("armac", preset, GAMES[preset], algorithm=algorithm, bar=BARS.get(preset, 0.0))
  config.network.update({"encoder": "mlp", "width": 64, "block_width": 64})
  config.optimizer.update({"learning_rate": 1e-3, "final_scale": 0.1, "clip_norm": 10.0})
  config.train.num_steps = 400
  config.checkpoint.every = 100
  if preset == "tiny":
    config.algorithm.update(
      {"num_episodes": 64, "num_groups": 16, "batch_size": 32, "capacity": 16}
    )
    config.algorithm.update({"num_critic_steps": 8, "num_actor_steps": 8})
    config.network.update({"width": 16, "block_width": 16})
    config.optimizer.learning_rate = 1e-2
    config.environment.num_seeds = 2
    config.train.num_steps = 12
    config.checkpoint.every = 6
  elif preset == "paper":
    config.algorithm.update({"num_episodes": 4096, "num_groups": 256, "batch_size": 256})
    config.algorithm.update({"num_critic_steps": 256, "num_actor_steps": 256, "capacity": 1024})
    config.network.update({"encoder": "lstm", "width": 256, "block_width": 128})
    config.environment.num_seeds = 1  # 1,024 past networks are 6 GB
    config.train.num_steps = 1000
  elif preset != "kuhn":
    config.algorithm.update({"num_episodes": 1024, "num_groups": 64, "capacity": 600})
    config.algorithm.recency = 1.0  # the paper has 0; 1 is a tenth better at equal decisions here
    config.network.width = 128
    config.train.num_steps = 600
    if preset == "leduc":
      config.algorithm.capacity = config.train.num_steps = 1200
  return config
