r"""Quantile TD, Rowland et al. 2023, https://arxiv.org/abs/2301.04462.

`chain`, `portraits` and `artefact` are the three figures of the paper: a chain with Gaussian
returns, the vector fields of three two-state problems with the paths of quantile TD, and the
distribution that few quantiles settle on. `statistics` is the question of a later paper
(https://arxiv.org/abs/2305.18388): quantile TD, TD and categorical TD as estimators of the mean.
`paper` runs all four, each in its own folder. The papers leave some numbers open, such as the means
of the chain's rewards; rl_theory/markov.py names ours.

Command:   python -m experiments.main --config=qtd:chain --workdir=runs/qtd-chain
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("the chain, two seeds, 100 updates", "10 seconds", "smoke test"),
  "chain": base.Preset(
    "four states with Gaussian returns, five quantiles (the paper's first figure)",
    "15 seconds",
    "4 of 4 criteria; quantiles within 0.008 of the fixed point",
  ),
  "portraits": base.Preset(
    "two states, one quantile: vector fields, paths, sets of fixed points",
    "20 seconds",
    "5 of 5 criteria; every path ends within 0.06 of the fixed points",
  ),
  "artefact": base.Preset(
    "two states, 2 to 100 quantiles: the atom at the largest return",
    "30 seconds",
    "6 of 6 criteria; distance to the true returns 9.45 to 0.18",
  ),
  "statistics": base.Preset(
    "error of the value beside TD and categorical TD, 100 seeds",
    "110 seconds",
    "4 of 4 criteria; with t_2 rewards 0.11 to 0.17, TD 0.25 to 0.35",
  ),
  "paper": base.Preset("the four runs above and one report", "3 minutes", "19 of 19 criteria"),
}


def get_config(preset: str = "chain") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = base.bandit("qtd", preset, algorithm={})
  if preset == "paper":
    config.runner = "paper_figures"
    config.data = ml_collections.ConfigDict(
      {"figures": ("chain", "portraits", "artefact", "statistics")}
    )
    return config
  config.data = ml_collections.ConfigDict({"name": preset, "num_seeds": 20})
  if preset in ("tiny", "chain"):
    config.data.name = "chain"
    config.algorithm.num_quantiles = 5
    config.train.update({"num_steps": 200, "inner_steps": 50})
  elif preset == "portraits":
    del config.data.num_seeds
    # Step k is learning_rate / (1 + k) ** decay.
    config.optimizer.update({"learning_rate": 0.5, "decay": 0.6})
    config.train.update({"num_steps": 300, "inner_steps": 100})
  elif preset == "artefact":
    config.data.num_seeds = 5
    config.algorithm.update({"num_quantiles": (2, 5, 20, 100), "method": "pairs"})
    config.optimizer.update({"learning_rate": 2.0, "decay": 0.3})
    config.train.update({"num_steps": 100, "inner_steps": 400})
  else:
    config.data.update(
      {"num_seeds": 100, "num_states": 10, "branching": 3, "noise": 1.0, "discounts": (0.5, 0.97)}
    )
    config.algorithm.update({"num_quantiles": (2, 8, 32), "num_atoms": (2, 32)})
    # Each method takes the best step size of its grid for each problem.
    config.optimizer = ml_collections.ConfigDict(
      {
        "learning_rate": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0),  # TD and categorical TD
        "quantile_learning_rate": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
      }
    )
    config.train.update({"num_steps": 10, "inner_steps": 100})
  if preset == "tiny":
    config.data.num_seeds = 2
    config.train.update({"num_steps": 10, "inner_steps": 10})
  config.checkpoint.update({"every": config.train.num_steps // 2, "keep": 1})
  return config
