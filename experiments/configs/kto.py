r"""KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: a baseline of the DRO paper.

It learns from single completions. A completion is good if its reward is above the mean of the data,
and bad otherwise. `bandit` is ours: random bandits whose optimum an independent solver computes.
`paper` is the setting of the paper's comparisons. Published: beta 0.1, both weights 1, and a Llama
of 7 billion parameters among the models. From the authors' code: AdamW at 5e-6 after 150 steps of
warm-up, batch 32. Our choices: the lengths, the number of steps, no decay, and the definition of a
good completion.

Command:   python -m experiments.main --config=kto:sentiment --workdir=runs/kto-sentiment
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "KTO with two reference points on random bandits, three beta",
    "1 minute",
    "within 1.2e-3 of the optimum; bad arms get probability 0 at any beta",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "20 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M writes positive continuations; good and bad completions",
    "12 minutes",
    "win rate 0.95 against the reference, 21 nats from it",
  ),
  "paper": base.Preset(
    "a 7B policy; needs data.scored and an accelerator",
    "hours",
    "not run",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    config = base.random_bandits("kto", algorithm={"beta": (0.1, 0.3, 1.0)})
    config.optimizer.learning_rate = 0.1  # gradients vanish where the sigmoid saturates
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
  config.train.batch_size = 32  # completions, four for each prompt: as many steps a pass
  if preset == "paper":
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "feedback", "prompt_length": 512, "completion_length": 512})
    config.optimizer.update({"learning_rate": 5e-6, "warmup_steps": 150, "final_scale": 1.0})
    config.train.num_steps = 10_000
    config.eval.update({"every": 500, "num_prompts": 512})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 500
  return config
