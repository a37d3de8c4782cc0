r"""DRO, Richemond et al. 2024, https://arxiv.org/abs/2405.19107.

`bandit` has three prompts with five completions each. It is ours; the paper has no such experiment.
It shows that DRO needs a value for each prompt to learn from single completions. It runs DRO-V,
the variants of the paper's ablations (one value for all prompts, no value, DRO-P over a batch) and
KTO. `sentiment` trains DRO-V, a policy and a value, on single completions of a model of 135 million
parameters. `paper` has the published settings on UltraFeedback, which you supply as JSON lines. As
in the paper the networks start from FLAN-T5 with 770 million parameters; AdaFactor is replaced by
Adam.

Command:   python -m experiments.main --config=dro:sentiment --workdir=runs/dro-sentiment
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "DRO-V, one shared value, no value, DRO-P and KTO on three prompts",
    "1 minute",
    "DRO-V within 1e-7 of its closed form; one shared value is 0.33 off",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "20 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M writes positive continuations; single scored completions",
    "not measured",
    "not run",
  ),
  "paper": base.Preset(
    "UltraFeedback, FLAN-T5-L as policy and value; needs data.scored and an accelerator",
    "hours",
    "not run",
  ),
}


def get_config(preset: str = "bandit") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    return _bandit(preset)
  # In units of standardised rewards. 0.2 goes about as far as the presets of the other methods.
  algorithm = {"tau": 0.2, "rescale": True, "num_microbatches": 1}
  if preset == "tiny":
    return base.tiny_language_model("dro", algorithm=algorithm)
  config = base.language_model("dro", preset, algorithm=algorithm)
  config.train.batch_size = 32  # completions, four for each prompt: as many steps a pass
  if preset == "paper":
    config.algorithm.update({"tau": 1.0, "num_microbatches": 4})
    config.network.update({"model": "google/flan-t5-large", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "ultrafeedback", "prompt_length": 1024, "completion_length": 1024})
    # Batch 32, 40,000 steps at 1e-4 after 150 of warm-up; no decay is stated.
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 150, "final_scale": 1.0})
    config.train.num_steps = 40_000
    config.eval.update({"every": 2000, "num_prompts": 1000})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 2000
  return config


def _bandit(preset: str) -> ml_collections.ConfigDict:
  config = base.bandit("dro", preset, algorithm={"tau": (0.5, 1.0, 5.0)})
  config.data = ml_collections.ConfigDict({"name": "three_prompts"})
  # Full batches, so nothing is random: 12,000 Adam steps with a cosine decay.
  config.optimizer.learning_rate = 3e-2
  config.train.update({"num_steps": 60, "inner_steps": 200})
  config.checkpoint.every = 20
  return config
