r"""Reward and preference models from labelled pairs, and what they predict on held-out prompts.

`--config.algorithm.kind=bradley_terry` learns a reward, `pairwise` a preference model. `human` and
`paper` read `--config.data.preferences=SOURCE`: JSON lines of {prompt, chosen, rejected},
`tfds:NAME`, `hf:NAME` or `finegrained_rlhf:FILE` (experiments/data/rows.py). The folder `model` of
a finished Bradley-Terry run is a reward:
--config=copg:sentiment --config.reward=runs/reward_model-human/model

`bandit` fits tables to random preferences, to show what either model can represent.

Command:   python -m experiments.main --config=reward_model:human --config.data.preferences=SOURCE
Hardware:  two CPU cores (bandit, tiny, human); an accelerator (paper)
Wall time, expected result: the table PRESETS below, also printed by --list

Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 8 (92,820 TL;DR comparisons;
test accuracy about 0.76 of the reward and 0.78 of the preference model, at 3B parameters).
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "Bradley-Terry and pairwise tables fitted to random preferences, three strengths of cycles",
    "1 minute",
    "rewards up to a constant; with cycles only the pairwise model reaches the entropy",
  ),
  "tiny": base.Preset(
    "random two-layer character model, made-up pairs (more vowels win)", "20 seconds", "runs"
  ),
  "human": base.Preset(
    "a linear head on frozen layers of SmolLM2-135M; needs --config.data.preferences=SOURCE",
    "5 minutes",
    "accuracy beside that of length: docs/results/human_preferences.md",
  ),
  "paper": base.Preset(
    "TL;DR comparisons, all of a 7B model; needs data.preferences and an accelerator",
    "hours",
    "unrun",
  ),
}


def get_config(preset: str = "human") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    config = base.random_bandits("reward_model", algorithm={})
    config.data.cycles = (0.0, 1.0, 2.0)  # strengths; the rewards are standard normal
    return config
  algorithm = {"kind": "bradley_terry", "centring": 0.0, "num_microbatches": 1}
  # The sections, their defaults and the optimiser are those of the other language-model runs.
  config = base.language_model("reward_model", preset, algorithm=algorithm)
  config.unlock()
  del config.reward  # it is what a run makes
  config.network = {
    "model": "smollm2-135m-instruct",
    "num_layers": 0,  # of the body, counted from below; 0 keeps all
    "train": "all",  # or "head": a linear model of frozen features, computed once and kept
    "dtype": "float32",
    "remat": False,
  }
  config.data = {
    "name": "preferences",
    "preferences": "",
    "preference_fields": "prompt,chosen,rejected",  # what the data set calls them
    "cache": "",  # where features are kept; empty: user cache
    "prompt_length": 64,  # tokens; a longer prompt loses its beginning
    "completion_length": 256,  # tokens with EOS; a longer completion loses its end
  }
  config.eval.num_prompts = 125  # held out with all their pairs
  if preset == "tiny":
    config.network.model = "tiny-random"
    config.data.update({"preferences": "made_up:vowels", "completion_length": 24})
    config.optimizer.learning_rate = 1e-2
    config.train.update({"num_steps": 150, "batch_size": 32})
    config.eval.update({"every": 50, "num_prompts": 128})
    config.checkpoint.every = 50
  elif preset == "human":
    config.network.update({"num_layers": 12, "train": "head"})
    config.data.prompt_length = 32
    # The lowest log-loss of 18 settings in cross-validation over the training prompts of seed 0.
    config.optimizer.update({"learning_rate": 1e-4, "weight_decay": 10.0})
    config.train.update({"num_steps": 300, "batch_size": 64})
    config.eval.every = 100
    config.checkpoint.every = 100
  else:
    config.algorithm.num_microbatches = 8
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "tldr", "prompt_length": 512, "completion_length": 64})
    # One epoch of the 92,820 comparisons; the paper states no optimiser settings.
    config.optimizer.update({"learning_rate": 1e-5, "warmup_steps": 70})
    config.train.update({"num_steps": 1450, "batch_size": 64})
    config.eval.update({"every": 200, "num_prompts": 1000})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 200
  config.lock()
  return config
