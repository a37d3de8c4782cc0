r"""GRACE, Zhu et al. 2020, https://arxiv.org/abs/2006.04131: the baseline of BGRL.

Data, corruptions, encoder and optimiser are those of the `bgrl` preset of the same name; only the
loss differs. The projector is as wide as the embeddings. With `algorithm.num_negatives` = k each
node is compared with k others in a step; 0 compares it with all others, which needs two arrays of
[2N, 2N] for N nodes.

Command:   python -m experiments.main --config=grace:csbm --workdir=runs/grace-csbm
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base, bgrl

PRESETS = {
  "tiny": base.Preset("a block model of 300 nodes, 30 steps", "30 seconds", "smoke test"),
  "csbm": base.Preset(
    "a block model of 2,000 nodes, 1,000 steps",
    "13 minutes",
    "accuracy 0.746 +- 0.006 (untrained 0.622; BGRL 0.720)",
  ),
  "amazon_photo": base.Preset(
    "co-purchases, 7,650 nodes, all negatives", "not measured", "not run"
  ),
}


def get_config(preset: str = "csbm") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = bgrl.get_config(preset)
  config.paper = "grace"
  del config.algorithm.target_decay
  config.algorithm.update({"temperature": 0.5, "num_negatives": 0})
  config.network.predictor_width = config.network.widths[-1]
  return config
