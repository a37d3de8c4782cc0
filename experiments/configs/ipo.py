r"""IPO, Azar et al. 2023, https://arxiv.org/abs/2310.12036.

`paper` reproduces the paper's only experiments, the three-armed bandits of its figures 1 and 2:
18,000 Adam steps of nine pairs, ten seeds. `bandit` is the same run. `sentiment` aligns a language
model of 135 million parameters on pairs made from its own samples.

Command:   python -m experiments.main --config=ipo:paper --workdir=runs/ipo-paper
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "IPO against DPO on three-armed bandits (figures 1 and 2)",
    "1 minute",
    "15 of 15 criteria: IPO at its closed form, DPO degenerate for every tau",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "20 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M writes positive continuations; best-against-worst pairs",
    "8 minutes",
    "win rate 0.74 against the reference, 2.8 nats from it",
  ),
  "paper": base.Preset("the paper's bandits; the same run as bandit", "1 minute", "as bandit"),
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
