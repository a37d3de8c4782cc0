r"""Online IPO, Calandriello et al. 2024, https://arxiv.org/abs/2403.08635: beside Nash-MD.

IPO-MD, whose completions come from a mixture, is `--config.data.mixture_beta=0.125`.

Command:   python -m experiments.main --config=online_ipo:sentiment --workdir=runs/online-ipo
Hardware:  two CPU cores
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset("random two-layer character model, no weights", "30 seconds", "runs"),
  "sentiment": base.Preset(
    "SmolLM2-135M towards continuations that beat its own, two a prompt",
    "not measured",
    "unrun",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = base.online_language_model(
    "online_ipo",
    preset,
    algorithm={"tau": 0.1, "num_microbatches": 1},
    num_samples=2,
    pairwise=True,
  )
  config.train.batch_size = 16  # as many completions a step as the other methods have
  return config
