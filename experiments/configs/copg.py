r"""CoPG, Flet-Berliac et al. 2024, https://arxiv.org/abs/2406.19185.

`bandit` is the paper's three-armed bandit with off-policy pairs. `sentiment` trains all of a small
language model, and `demo` (`make demo`) low-rank adapters on it, which takes less time.
`paper` is the TL;DR run (a 7B policy, pairs scored by a reward model) with the published optimiser
settings; you supply the data as JSON lines.

Command:   python -m experiments.main --config=copg:sentiment --workdir=runs/copg-sentiment
Hardware:  two CPU cores (bandit, tiny, demo, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "CoPG, IPO and two policy gradients on off-policy pairs (the paper's toy figure)",
    "1 minute",
    "regret 0.0000 after 300 epochs (paper: 100); IPO 0.153, policy gradients 0.636 and 0.014",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "20 seconds", "smoke test"
  ),
  "demo": base.Preset(
    "SmolLM2-135M writes positive continuations, with LoRA (`make demo`)",
    "7 minutes",
    "win rate 0.85 against the reference, 4.3 nats from it",
  ),
  "sentiment": base.Preset(
    "the same, with all parameters trained",
    "10 minutes",
    "win rate 0.81 against the reference, 4.5 nats from it",
  ),
  "paper": base.Preset(
    "TL;DR with a 7B policy; needs data.scored and an accelerator", "hours", "not run"
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    config = base.bandit("copg", preset, algorithm={"beta": 0.5})
    config.data.update({"num_seeds": 5, "batch_size": 512, "num_pairs": 10_000})
    config.optimizer.learning_rate = 1e-3
    # One step of the loop is one epoch of 19 full batches.
    config.train.update({"num_steps": 300, "inner_steps": 19})
    config.checkpoint.every = 100
    return config
  algorithm = {"beta": 0.05, "num_microbatches": 1}
  if preset == "tiny":
    return base.tiny_language_model("copg", algorithm=algorithm)
  config = base.language_model("copg", preset, algorithm=algorithm)
  if preset == "demo":
    config.network.lora_rank = 16
    config.optimizer.learning_rate = 1e-3
  elif preset == "paper":
    config.algorithm.update({"beta": 0.06, "num_microbatches": 16})
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "tldr", "num_samples": 2})
    config.data.update({"prompt_length": 512, "completion_length": 64})
    # Batch 128, Adam 1e-6, 10 % warm-up (no decay is stated), two epochs of the 93 k prompts.
    config.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 145, "final_scale": 1.0})
    config.train.update({"num_steps": 1450, "batch_size": 128})
    config.eval.update({"every": 50, "num_prompts": 1024})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 100
  return config
