r"""RLOO, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: the online baseline beside CoPG.

Command:   python -m experiments.main --config=rloo:sentiment --workdir=runs/rloo-sentiment
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("random two-layer character model, no weights", "30 seconds", "runs"),
  "sentiment": base.Preset(
    "SmolLM2-135M towards positive continuations, drawn and scored as it trains",
    "not measured",
    "unrun",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {"beta": 0.05, "baseline": "leave_one_out", "num_microbatches": 1}
  return base.online_language_model("rloo", preset, algorithm=algorithm, num_samples=4)
