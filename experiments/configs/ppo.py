r"""PPO with a magnet (arXiv:2206.05825, arXiv:2502.08938): policy gradients as a baseline of ARMAC.

Self-play with the networks of NFSP and as many decisions as ARMAC's preset of the game has. The
temperatures are in units of utility and are our own choice.

Command:   python -m experiments.main --config=ppo:kuhn --workdir=runs/ppo-kuhn
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import armac, base

_MEASURED = {
  "tiny": ("20 seconds", "smoke test"),
  "kuhn": ("40 seconds", "NashConv 0.065, seeds 0.058 to 0.073"),
  "leduc": ("not measured", "not run to the end; docs/results/games.md has the first half"),
}
PRESETS = {
  name: base.Preset(
    f"{title}, {'two' if name == 'tiny' else 'three'} seeds",
    *_MEASURED.get(name, ("not measured", "not run")),
  )
  for name, title in armac.TITLES.items()
}


def get_config(preset: str = "kuhn") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {
    "temperature_start": 0.5,
    "temperature_end": 0.1,  # at 0.02 the policies begin to cycle again
    "temperature_decay": 1e5,
    "clip": 0.2,
    "value_weight": 0.5,
    "trace_decay": 0.95,
    "num_episodes": 512,
    "batch_size": 128,
    "num_steps": 16,
  }
  config = base.game("ppo", preset, armac.GAMES[preset], algorithm=algorithm)
  config.network.widths = (64,)
  config.optimizer.update({"learning_rate": 1e-3, "final_scale": 0.02, "clip_norm": 1.0})
  config.train.num_steps = 400
  config.checkpoint.every = 100
  if preset == "tiny":
    config.environment.num_seeds = 2
    config.algorithm.update({"num_episodes": 64, "batch_size": 32, "num_steps": 8})
    config.network.widths = (16,)
    config.optimizer.learning_rate = 1e-2
    config.train.num_steps = 12
    config.checkpoint.every = 6
  elif preset != "kuhn":
    config.algorithm.update({"num_episodes": 1024, "batch_size": 256, "temperature_decay": 1e6})
    config.network.widths = (128,)
    config.train.num_steps = 1200 if preset == "leduc" else 600
    if preset == "leduc":
      config.algorithm.update({"temperature_start": 1.0, "temperature_end": 0.3})
  return config
