r"""All alignment methods on a small language of digits, compared at equal sequence KL.

A reference is trained by imitation and writes the offline pairs. Then each method trains with five
values of its regulariser, three seeds and two judges (a scalar reward and an intransitive
preference), all in one program. Last, an opponent is trained against each of eight policies. Each
of these is a run of its own, so you can interrupt the comparison and continue it with the same
command.

Command:   python -m experiments.main --config=comparison:digits --workdir=runs/comparison
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "digits": base.Preset(
    "eighteen methods, two judges, five settings, three seeds, and exploiters of eight policies",
    "4 hours of one core",
    "31 of 31 criteria; against RLOO an opponent wins 76 %, against Nash-MD at most 56 %",
  ),
  "tiny": base.Preset("two methods and an exploiter, a few steps", "1 minute", "smoke test"),
}

# Each paper has its own regulariser. They are not comparable, so we compare at equal KL.
REGULARISERS = {
  "dpo": {"beta": (3.0, 1.7, 1.0, 0.55, 0.3)},
  "ipo": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "ipo_mean": {"tau": (5.0, 3.0, 1.7, 0.9, 0.5)},
  "kto": {"beta": (1.0, 0.55, 0.3, 0.17, 0.1)},
  "srpo": {"beta": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "srpo_rewrites": {"beta": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "dro": {"tau": (0.3, 0.17, 0.1, 0.055, 0.03)},
  "copg": {"beta": (0.3, 0.17, 0.1, 0.055, 0.03)},
  "rloo": {"beta": (0.3, 0.17, 0.1, 0.055, 0.03)},
  "online_ipo": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "ipo_md": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "self_play": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "nash_md_125": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "nash_md_250": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "nash_md_500": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "nash_md_fitted": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "nash_ema": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
  "best_response": {"tau": (0.5, 0.3, 0.17, 0.09, 0.05)},
}
# Each gets an opponent that is trained to beat it, with the weakest regulariser of Nash-MD.
EXPLOITED = (
  *("rloo", "online_ipo", "self_play", "nash_md_125", "nash_md_250", "nash_md_500"),
  *("nash_md_fitted", "best_response"),
)


def get_config(preset: str = "digits") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  config = ml_collections.ConfigDict(
    {
      "paper": "comparison",
      "preset": preset,
      "seed": 0,
      "methods": tuple(REGULARISERS),
      "exploited": EXPLOITED,
      "algorithm": {**REGULARISERS, "exploiter": {"tau": (0.05,)}},
      "network": {"num_layers": 2, "width": 64},
      # In a third of its edits, the reference keeps what it is shown.
      "data": {"num_prompts": 20_000, "num_seeds": 3, "kept_edits": 1 / 3},
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
    config.methods = ("srpo_rewrites", "nash_md_fitted")
    for name, knob in (("srpo_rewrites", "beta"), ("nash_md_fitted", "tau")):
      config.algorithm[name][knob] = (0.5, 0.05)
    config.network.width = 16
    config.data.num_prompts = 64
    config.train.update({"num_steps": 2, "inner_steps": 2, "batch_size": 4})
    for section in ("sft", "reward_model"):
      config[section].update({"num_steps": 2, "batch_size": 8})
    config.eval.update({"num_prompts": 32, "kl": 0.01, "num_revisions": 1})
  return config
