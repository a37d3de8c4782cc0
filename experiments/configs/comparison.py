r"""All alignment methods on a small language of digits, compared at equal sequence KL.

A reference is trained by imitation and writes the offline pairs. Then each method trains with three
values of its regulariser, three seeds and two judges (a scalar reward and an intransitive
preference), all in one program. Each method is a run of its own, so you can interrupt the
comparison and continue it with the same command.

Command:   python -m experiments.main --config=comparison:digits --workdir=runs/comparison
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "digits": base.Preset(
    "sixteen methods, two judges, three settings, three seeds",
    "80 minutes",
    "24 of 24 criteria; docs/results/comparison.md",
  ),
  "tiny": base.Preset("two methods, a few steps", "1 minute", "smoke test"),
}

# Each paper has its own regulariser. They are not comparable, so we compare at equal KL.
REGULARISERS = {
  "dpo": {"beta": (3.0, 1.0, 0.3)},
  "ipo": {"tau": (0.5, 0.17, 0.05)},
  "ipo_mean": {"tau": (5.0, 1.7, 0.5)},
  "kto": {"beta": (1.0, 0.3, 0.1)},
  "srpo": {"beta": (0.5, 0.17, 0.05)},
  "dro": {"tau": (0.3, 0.1, 0.03)},
  "copg": {"beta": (0.3, 0.1, 0.03)},
  "rloo": {"beta": (0.3, 0.1, 0.03)},
  "online_ipo": {"tau": (0.5, 0.17, 0.05)},
  "ipo_md": {"tau": (0.5, 0.17, 0.05)},
  "self_play": {"tau": (0.5, 0.17, 0.05)},
  "nash_md_125": {"tau": (0.5, 0.17, 0.05)},
  "nash_md_250": {"tau": (0.5, 0.17, 0.05)},
  "nash_md_500": {"tau": (0.5, 0.17, 0.05)},
  "nash_ema": {"tau": (0.5, 0.17, 0.05)},
  "best_response": {"tau": (0.5, 0.17, 0.05)},
}


def get_config(preset: str = "digits") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = ml_collections.ConfigDict(
    {
      "paper": "comparison",
      "preset": preset,
      "seed": 0,
      "methods": tuple(REGULARISERS),
      "algorithm": REGULARISERS,
      "network": {"num_layers": 2, "width": 64},
      "data": {"num_prompts": 20_000, "num_seeds": 3},
      "optimizer": {
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "final_scale": 0.1,
        "clip_norm": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 0.0,
      },
      "sharding": {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}},
      # One step of the loop is a scan of `inner_steps` updates: 300 of them.
      "train": {"num_steps": 12, "inner_steps": 25, "batch_size": 32, "log_every": 1},
      "sft": {"num_steps": 120, "batch_size": 64, "learning_rate": 3e-3},
      "reward_model": {"num_steps": 24, "batch_size": 64, "learning_rate": 1e-3},
      "eval": {"every": 0, "num_prompts": 2000, "kl": 2.0, "num_revisions": 5},
      "checkpoint": {"every": 4, "keep": 1},
    }
  )
  if preset == "tiny":
    config.methods = ("srpo", "nash_md_125")
    config.network.width = 16
    config.data.num_prompts = 64
    config.train.update({"num_steps": 2, "inner_steps": 2, "batch_size": 4})
    for section in ("sft", "reward_model"):
      config[section].update({"num_steps": 2, "batch_size": 8})
    config.eval.update({"num_prompts": 32, "kl": 0.01, "num_revisions": 1})
  return config
