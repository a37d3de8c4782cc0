r"""RLOO, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: the online baseline of CoPG.

`bandit` is ours: random bandits, and the variance of the gradients. `paper` is the TL;DR run.
Published: the task, 4 samples for each prompt (also 2), beta 0.03 and a learning rate of 1e-6. All
other settings are our choice. A Llama of 7 billion parameters replaces Pythia (6.9 billion), which
our decoder cannot read. (The paper's loss is a mean over the samples and ours is a sum; Adam is
invariant to this factor.)

Command:   python -m experiments.main --config=rloo:sentiment --workdir=runs/rloo-sentiment
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "RLOO, REINFORCE and the variance of their gradients on random bandits",
    "1 minute",
    "RLOO within 1e-7 of its optimum (beta 1), REINFORCE 0.05",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "30 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M writes positive continuations, sampled while it trains",
    "not measured",
    "not run",
  ),
  "paper": base.Preset(
    "TL;DR with a 7B policy; needs data.prompts, reward and an accelerator",
    "hours",
    "not run",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    config = base.random_bandits("rloo", algorithm={"beta": (0.3, 1.0, 3.0)})
    # The mean reward under the reference decides how much variance a baseline removes at first.
    config.data.update({"batch_size": 16, "num_samples": 4, "mean_reward": 1.0})
    config.optimizer.learning_rate = 0.2  # constant, of plain gradient descent
    return config
  algorithm = {"beta": 0.05, "baseline": "leave_one_out", "num_microbatches": 1}
  config = base.online_language_model("rloo", preset, algorithm=algorithm, num_samples=4)
  if preset == "paper":
    config.algorithm.update({"beta": 0.03, "num_microbatches": 16})
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "tldr", "num_prompts": 92_000})
    config.data.update({"prompt_length": 512, "completion_length": 64})
    config.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 20, "final_scale": 1.0})
    config.train.update({"num_steps": 600, "batch_size": 128})
    config.eval.update({"every": 100, "num_prompts": 1000})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 100
  return config
