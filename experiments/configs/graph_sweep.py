r"""Accuracy of BGRL and GRACE against one hyper-parameter, or against the signal of the graph.

The graph is a contextual block model, so no files are needed. The x-axes are:

  masks      the probability of masking a column, and of dropping an edge (arXiv:2102.06514)
  decay      the decay tau of the target, held constant
  negatives  the number of negatives of GRACE (arXiv:2006.04131)
  threshold  the signal lambda^2 + mu^2 / gamma, half in the edges and half in the features; below 1
             no method without labels can tell the classes (arXiv:1807.08479)
  predictor  without and with batch normalisation in the predictor, over graph normalisation in the
             encoder

Command:   python -m experiments.main --config=graph_sweep:decay --workdir=runs/graph-decay
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "masks": base.Preset(
    "BGRL, 12 probabilities, 3 seeds", "4 minutes", "2 of 2 criteria; best at 0.3 to 0.5"
  ),
  "decay": base.Preset(
    "BGRL, 6 decays, 3 seeds", "2 minutes", "2 of 2 criteria; 0.764 (decay 0) to 0.721 (0.999)"
  ),
  "negatives": base.Preset(
    "GRACE, 6 numbers of negatives, 3 seeds", "7 minutes", "1 of 2 criteria; flat, 0.768 to 0.770"
  ),
  "threshold": base.Preset("BGRL, 8 graphs, 3 seeds", "4 minutes", "3 of 3 criteria"),
  "predictor": base.Preset(
    "BGRL, 2 predictors, 3 seeds",
    "2 minutes",
    "0 of 2 criteria; batch normalisation does not collapse here",
  ),
  "tiny": base.Preset("BGRL, 2 decays, 2 seeds, 200 nodes", "1 minute", "smoke test"),
}
# The swept hyper-parameters and their values.
_SWEEPS = {
  "masks": (("feature_mask_prob", "edge_drop_prob"), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)),
  "decay": (("target_decay",), (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)),
  "negatives": (("num_negatives",), (2, 8, 32, 128, 512, 0)),
  "threshold": (("signal",), (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)),
  "predictor": (("predictor_norm",), (0, 1)),
  "tiny": (("target_decay",), (0.5, 0.99)),
}


def get_config(preset: str = "decay") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  over, values = _SWEEPS[preset]
  tiny = preset == "tiny"
  return ml_collections.ConfigDict(
    {
      "paper": "graph_sweep",
      "preset": preset,
      "seed": 0,
      # The swept hyper-parameter and its values; 0 negatives means all.
      "sweep": {"over": over, "at": values, "num_seeds": 2 if tiny else 3},
      "method": "grace:csbm" if preset == "negatives" else "bgrl:csbm",
      "algorithm": {},
      "network": {
        "widths": (16, 8) if tiny else (64, 32),
        "norm": "graph" if preset == "predictor" else "batch",
      },
      "data": {
        "num_nodes": 200 if tiny else 1000,
        "num_features": 20 if tiny else 100,
        "mean_degree": 10.0,
        "edge_signal": 1.0,
        "feature_signal": 3.0,
        "seed": 0,
      },
      "optimizer": {"learning_rate": 2e-3, "warmup_steps": 30},
      "sharding": {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 20 if tiny else 300, "log_every": 10},
      "eval": {"every": 0, "num_splits": 2 if tiny else 5, "split_seed": 0},
      "checkpoint": {"every": 100, "keep": 1},
    }
  )
