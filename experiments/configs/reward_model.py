r"""Reward and preference models from labelled pairs, judged on held-out prompts.

`--config.algorithm.kind=bradley_terry` learns a reward, `pairwise` a preference model. `human` and
`paper` read `--config.data.preferences=SOURCE`: JSON lines of {prompt, chosen, rejected},
`tfds:NAME`, `hf:NAME` or `finegrained_rlhf:FILE` (experiments/data/rows.py). The folder `model` of
a finished Bradley-Terry run is a reward for other runs:
--config=copg:sentiment --config.reward=runs/reward_model-human/model

`bandit` fits tables to random preferences, to show what each model can represent.

Command:   python -m experiments.main --config=reward_model:human --config.data.preferences=SOURCE
Hardware:  two CPU cores (bandit, tiny, human); an accelerator (paper)
Wall time, expected result: in PRESETS below; --list prints them

Reference: Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 8 (92,820 TL;DR comparisons;
at 3B parameters the reward model's test accuracy is about 0.76, the preference model's 0.78).
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "Bradley-Terry and pairwise tables on random preferences, with cycles",
    "1 minute",
    "with cycles only the pairwise model reaches the entropy",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; more vowels win", "20 seconds", "smoke test"
  ),
  "human": base.Preset(
    "a linear head on frozen SmolLM2-135M; needs data.preferences",
    "5 minutes",
    "accuracy 0.614, 0.564, 0.536 on three splits",
  ),
  "paper": base.Preset(
    "TL;DR, all layers of a 7B model; needs data.preferences and an accelerator",
    "hours",
    "not run",
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
  # Sections, defaults and optimiser are those of the other language-model runs.
  config = base.language_model("reward_model", preset, algorithm=algorithm)
  config.unlock()
  del config.reward  # the run makes one
  config.network = {
    "model": "smollm2-135m-instruct",
    "num_layers": 0,  # of the body, counted from the input; 0 keeps all
    "train": "all",  # or "head": a linear model on frozen features, which are cached
    "dtype": "float32",
    "remat": False,
    "scan_layers": True,  # False: layers in a row, faster on GPUs, longer to compile
    **base.LORA,
  }
  config.data = {
    "name": "preferences",
    "preferences": "",
    "preference_fields": "prompt,chosen,rejected",  # their names in your data set
    "cache": "",  # folder of the features; empty: user cache
    "prompt_length": 64,  # tokens; a longer prompt loses its beginning
    "completion_length": 256,  # tokens with EOS; a longer completion loses its end
    "length_buckets": 1,  # above 1: batches of similar length, cut to so many sets of widths
  }
  for name in ("judges", "tasks", "task_limit", "num_fewshot"):  # they ask a policy
    del config.eval[name]
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
