r"""KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: a baseline of DRO's paper.

It learns from single completions, each good (its reward above the mean of the data) or bad.
`bandit` is ours: random bandits whose optimum an independent solver knows. `paper` is the setting
of the paper's comparisons. Published: beta 0.1, both weights 1, a Llama of 7 billion among its
models. From the authors' code: AdamW at 5e-6 after 150 steps of warm-up, batch 32. Ours: the
lengths, the number of steps, no decay, and what is good (scored above the mean of the data).

Command:   python -m experiments.main --config=kto:sentiment --workdir=runs/kto-sentiment
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: the table PRESETS below, also printed by --list
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "KTO with two points of reference on random bandits, three beta",
    "1 minute",
    "the optimum of an independent solver: bad arms get nothing at any beta",
  ),
  "tiny": base.Preset("random two-layer character model, no weights", "20 seconds", "runs"),
  "sentiment": base.Preset(
    "SmolLM2-135M towards positive continuations, good and bad completions",
    "12 minutes",
    "win rate 0.95, far from the reference (21 nats)",
  ),
  "paper": base.Preset(
    "single good and bad completions, 7B policy; needs --config.data.scored=FILE and an "
    "accelerator",
    "hours",
    "unrun",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    config = base.random_bandits("kto", algorithm={"beta": (0.1, 0.3, 1.0)})
    config.optimizer.learning_rate = 0.1  # its gradients fade where the sigmoid saturates
    return config
  algorithm = {
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "num_microbatches": 1,
  }
  if preset == "tiny":
    return base.tiny_language_model("kto", algorithm=algorithm)
  config = base.language_model("kto", preset, algorithm=algorithm)
  config.train.batch_size = 32  # completions, four a prompt: the pass over the data stays as long
  if preset == "paper":
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "feedback", "prompt_length": 512, "completion_length": 512})
    config.optimizer.update({"learning_rate": 5e-6, "warmup_steps": 150, "final_scale": 1.0})
    config.train.num_steps = 10_000
    config.eval.update({"every": 500, "num_prompts": 512})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 500
  return config
