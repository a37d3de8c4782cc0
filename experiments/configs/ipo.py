r"""IPO, Azar et al. 2023, https://arxiv.org/abs/2310.12036.

`paper` reproduces the paper's only experiments, the three-armed bandits of its figures 1 and 2
(18,000 Adam steps of nine pairs, ten seeds); `bandit` is the same run. `sentiment` aligns a
135-million-parameter language model on pairs made from its own samples.

Command:   python -m experiments.main --config=ipo:paper --workdir=runs/ipo-paper
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "IPO against DPO on three-armed bandits (figures 1 and 2)",
    "1 minute",
    "IPO within 3 sd of its closed form; DPO degenerates for every tau",
  ),
  "tiny": base.Preset("random two-layer character model, no weights", "20 seconds", "runs"),
  "sentiment": base.Preset(
    "SmolLM2-135M towards positive continuations, best-against-worst pairs",
    "8 minutes",
    "win rate against the reference above 0.5 with its interval",
  ),
  "paper": base.Preset("the paper's bandits, exact protocol (same as bandit)", "1 minute", "above"),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset in ("bandit", "paper"):
    return base.bandit("ipo", preset, algorithm={"tau": (0.1, 0.5, 1.0), "reduction": "sum"})
  algorithm = {"tau": 0.1, "reduction": "sum", "num_microbatches": 1}
  if preset == "tiny":
    return base.tiny_language_model("ipo", algorithm=algorithm)
  return base.language_model("ipo", preset, algorithm=algorithm)
