r"""DPO, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290: the baseline beside IPO and CoPG.

Command:   python -m experiments.main --config=dpo:sentiment --workdir=runs/dpo-sentiment
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("random two-layer character model, no weights", "20 seconds", "runs"),
  "sentiment": base.Preset(
    "SmolLM2-135M towards positive continuations, best-against-worst pairs",
    "8 minutes",
    "win rate against the reference above 0.5 with its interval",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {"beta": 0.1, "reduction": "sum", "num_microbatches": 1}
  if preset == "tiny":
    return base.tiny_language_model("dpo", algorithm=algorithm)
  return base.language_model("dpo", preset, algorithm=algorithm)
