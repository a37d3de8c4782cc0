r"""Self-predictive learning, Tang et al. 2022, https://arxiv.org/abs/2212.03319.

Command:   python -m experiments.main --config=self_predictive:paper --workdir=runs/self-predictive
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "collapse": base.Preset("", "1 minute", ""),
  "ratio": base.Preset("", "1 minute", ""),
  "ema": base.Preset("", "1 minute", ""),
  "trace": base.Preset("", "1 minute", ""),
  "bidirectional": base.Preset("", "1 minute", ""),
}


def get_config(preset: str = "collapse") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = base.bandit("self_predictive", preset, algorithm={})
  config.data = ml_collections.ConfigDict({"name": preset, "num_states": 20, "num_chains": 30})
  config.checkpoint.update({"every": 40, "keep": 1})
  if preset in ("collapse", "ratio", "ema"):
    config.algorithm.num_features = 2
    config.algorithm.predictor_ratio = (100.0, 10.0, 1.0, 0.1) if preset == "ratio" else (0.1,)
    if preset == "ema":
      config.algorithm.target_decay = (0.0, 0.9, 0.99, 0.999)
    config.train.update({"num_steps": 80, "inner_steps": 250})
    config.optimizer.learning_rate = 0.01
    return config
  config.optimizer = ml_collections.ConfigDict()
  config.algorithm.update({"num_features": (2, 4, 8), "directions": ("forward",), "step": 0.5})
  config.data.families = ("symmetric", "positive", "doubly stochastic", "arbitrary")
  config.train.update({"num_steps": 80, "inner_steps": 100})
  if preset == "bidirectional":
    config.algorithm.directions = ("forward", "bidirectional")
    config.data.families = ("symmetric", "doubly stochastic", "arbitrary")
    config.train.update({"num_steps": 80, "inner_steps": 25})
  return config
