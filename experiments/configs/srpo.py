r"""SRPO, Choi et al. 2024, https://arxiv.org/abs/2406.01660.

`bandit` is our own three-armed bandit in the spirit of the paper's, whose constants we do not know.
The data policy decides which arm IPO and DPO prefer, and does not change SRPO's optimum. The run
also computes, in closed form on ten ordered arms, what up to five revisions of an answer gain.
`sentiment` trains a model of 135 million parameters to continue a text and to revise its own
continuation. `paper` is the TL;DR run (7B). We know the paper's data, its evaluation and the idea
of its templates; beta, alpha and the optimiser come from an independent reproduction at 1B.

Command:   python -m experiments.main --config=srpo:sentiment --workdir=runs/srpo-sentiment
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "SRPO, IPO and DPO on data of three policies, and revisions",
    "1 minute",
    "SRPO within 0.01 of its closed form on all data; IPO's best arm changes",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "20 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M writes positive continuations and revises each three times",
    "not measured",
    "not run",
  ),
  "paper": base.Preset(
    "TL;DR with a 7B policy; needs data.preferences and an accelerator",
    "hours",
    "not run",
  ),
}


def get_config(preset: str = "bandit") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    return _bandit(preset)
  algorithm = {"beta": 0.1, "alpha": 0.5, "num_microbatches": 1}
  if preset == "tiny":
    config = base.tiny_language_model("srpo", algorithm=algorithm)
  else:
    config = base.language_model("srpo", preset, algorithm=algorithm)
  # The revision policy reads a first attempt and continues the prompt again.
  config.data.revision_template = (
    "A first attempt: {answer}\nA better one, from the start: {prompt}"
  )
  config.data.revision_length = 64  # of the filled template, in tokens
  config.eval.num_revisions = 3
  if preset == "tiny":
    config.data.revision_template = "{answer} < {prompt}"
    config.data.revision_length = 80  # a token is a character here
  elif preset == "paper":
    config.algorithm.update({"alpha": 0.8, "num_microbatches": 16})
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "tldr", "prompt_length": 576, "completion_length": 64})
    task = "Write a precise and concise summary of the following reddit POST"
    config.data.prompt_template = f"{task}.\n\nPOST: {{prompt}}\nTL;DR:"
    config.data.revision_template = (
      f"{task} that improves on the EXAMPLE SUMMARY.\n\n"
      "POST: {prompt}\nEXAMPLE SUMMARY: {answer}\nTL;DR:"
    )
    config.data.revision_length = 704
    # Batch 128, five epochs of the 93 k pairs, 150 warm-up steps and a cosine.
    config.optimizer.update({"learning_rate": 2e-5, "warmup_steps": 150, "weight_decay": 0.1})
    config.train.update({"num_steps": 3630, "batch_size": 128})
    config.eval.update({"every": 200, "num_prompts": 1024, "num_revisions": 5})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 200
  return config


def _bandit(preset: str) -> ml_collections.ConfigDict:
  algorithm = {"beta": 0.1, "alpha": 0.5, "ipo_tau": 0.1, "dpo_beta": 1.0}
  config = base.bandit("srpo", preset, algorithm=algorithm)
  config.data.update({"num_seeds": 5, "batch_size": 128, "num_pairs": 10_000})
  # 4,000 optimisation steps; the policies are averaged over the last 500.
  config.train.update({"num_steps": 8, "inner_steps": 500})
  config.checkpoint.every = 4
  return config
