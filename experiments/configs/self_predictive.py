r"""Self-predictive learning, Tang et al. 2022, https://arxiv.org/abs/2212.03319.

Random Markov chains of 20 states, 30 of each family, all in one program. The paper's own numbers of
states, features and chains are not known to us. `collapse`, `ratio` and `ema` take 20,000 gradient
steps on the exact loss; the others integrate the dynamics in continuous time. `paper` runs all six
and writes one report.

Command:   python -m experiments.main --config=self_predictive:paper --workdir=runs/self-predictive
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "collapse": base.Preset(
    "figure (a): columns align without a fast predictor and a stop-gradient",
    "15 seconds",
    "5 of 5 criteria; |cosine| 0.001 (optimal predictor), 0.49 (slow)",
  ),
  "trace": base.Preset(
    "figure (b): the trace objective on four kinds of chains",
    "1 minute",
    "19 of 19 criteria; f never falls on symmetric chains",
  ),
  "bidirectional": base.Preset(
    "figure (c): bidirectional learning finds the SVD",
    "1 minute",
    "28 of 28 criteria; f above 0.999 f* on all 270 runs",
  ),
  "ratio": base.Preset(
    "figure (d): the slower the predictor, the more columns align",
    "15 seconds",
    "6 of 6 criteria; |cosine| 0.004 to 0.49",
  ),
  "ema": base.Preset(
    "figure (e): a moving average does not repair a slow predictor",
    "15 seconds",
    "12 of 12 criteria; |cosine| 0.49 to 0.50 for every decay",
  ),
  "values": base.Preset(
    "figure (f): value functions of random rewards, before and after",
    "1 minute",
    "35 of 39 criteria; slow symmetric chains are not at their limit",
  ),
  "paper": base.Preset("figures (a) to (f) in one report", "4 minutes", "105 of 109 criteria"),
  "tiny": base.Preset("figure (b) on chains of 6 states", "15 seconds", "smoke test"),
}


def get_config(preset: str = "paper") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = base.bandit("self_predictive", preset, algorithm={})
  config.data = ml_collections.ConfigDict({"num_states": 20, "num_chains": 30})
  config.checkpoint.update({"every": 40, "keep": 1})
  if preset == "paper":
    config.runner = "paper_figures"
    config.data.figures = ("collapse", "trace", "bidirectional", "ratio", "ema", "values")
    return config
  config.data.name = "trace" if preset == "tiny" else preset
  if preset in ("collapse", "ratio", "ema"):
    config.algorithm.num_features = 2
    config.algorithm.predictor_ratio = (100.0, 10.0, 1.0, 0.1) if preset == "ratio" else (0.1,)
    if preset == "ema":
      config.algorithm.target_decay = (0.0, 0.9, 0.99, 0.999)
    config.train.update({"num_steps": 80, "inner_steps": 250})  # measurements, steps in between
    return config
  config.optimizer = ml_collections.ConfigDict()
  config.data.families = ("symmetric", "positive", "doubly stochastic", "arbitrary")
  config.algorithm.update({"num_features": (2, 4, 8), "directions": ("forward",), "step": 0.5})
  config.train.update({"num_steps": 80, "inner_steps": 100})
  if preset in ("bidirectional", "values"):
    config.algorithm.directions = ("forward", "bidirectional")
    config.train.update({"num_steps": 80, "inner_steps": 50 if preset == "bidirectional" else 25})
  if preset == "bidirectional":
    config.data.families = ("symmetric", "doubly stochastic", "arbitrary")
  if preset == "values":
    config.data.discount = 0.9
  if preset == "tiny":
    config.data.update({"num_states": 6, "num_chains": 3})
    config.algorithm.num_features = (2,)
    config.train.update({"num_steps": 10, "inner_steps": 20})
    config.checkpoint.every = 5
  return config
