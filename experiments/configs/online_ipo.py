r"""Online IPO, Calandriello et al. 2024, https://arxiv.org/abs/2403.08635: a baseline of Nash-MD.

For IPO-MD, whose completions come from a mixture, add `--config.data.mixture_beta=0.125`. `bandit`
is ours: random games with cycles. `paper` is the TL;DR run. Published: the task, tau 1, batch 32
and a learning rate of 1e-4. Our choices: the number of steps, the judge, Adam in place of
AdaFactor, and FLAN-T5-L in place of a T5-L tuned on summaries.

Command:   python -m experiments.main --config=online_ipo:sentiment --workdir=runs/online-ipo
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "online IPO, IPO-MD and offline IPO on random games, three tau",
    "1 minute",
    "exploitability 2e-6 online, 0.012 offline (tau 0.1)",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "30 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M against itself, two samples for each prompt",
    "not measured",
    "not run",
  ),
  "paper": base.Preset(
    "TL;DR with FLAN-T5-L; needs data.prompts, preference and an accelerator",
    "hours",
    "not run",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    config = base.random_bandits("online_ipo", algorithm={"tau": (0.1, 0.3, 1.0)})
    config.data.mixture_beta = 0.25
    return config
  config = base.online_language_model(
    "online_ipo",
    preset,
    algorithm={"tau": 0.1, "num_microbatches": 1},
    num_samples=2,
    pairwise=True,
  )
  config.train.batch_size = 16  # as many completions a step as in the other presets
  if preset == "paper":
    config.algorithm.tau = 1.0
    config.network.update({"model": "google/flan-t5-large", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "tldr", "num_prompts": 92_000})
    config.data.update({"prompt_length": 512, "completion_length": 64})
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 0, "final_scale": 1.0})
    config.train.update({"num_steps": 10_000, "batch_size": 32})
    config.eval.update({"every": 500, "num_prompts": 1000})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 500
  return config
