r"""DPO, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290: a baseline for IPO and CoPG.

`bandit` is ours: random bandits, with and without cycles in their preferences. `paper` is the TL;DR
run. Published settings: the data, beta 0.5 (0.1 elsewhere), batch 64, RMSprop at 1e-6 after 150
steps of linear warm-up (ours is Adam with b1 = 0, which differs only by the bias correction of the
first steps). Our choices: one epoch, no decay, the lengths, and a Llama of 7 billion parameters in
place of GPT-J (6 billion), which our decoder cannot read.

Command:   python -m experiments.main --config=dpo:sentiment --workdir=runs/dpo-sentiment
Hardware:  two CPU cores (bandit, tiny, sentiment); a TPU or GPU pod (paper)
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "bandit": base.Preset(
    "DPO and IPO on random bandits, with and without cycles, three beta",
    "1 minute",
    "DPO within 3e-6 of its optimum; with cycles the optimum depends on the pairs",
  ),
  "tiny": base.Preset(
    "a random two-layer character model; no weights needed", "20 seconds", "smoke test"
  ),
  "sentiment": base.Preset(
    "SmolLM2-135M writes positive continuations; best-against-worst pairs",
    "8 minutes",
    "win rate 0.89 against the reference, 6.7 nats from it",
  ),
  "paper": base.Preset(
    "TL;DR with a 7B policy; needs data.preferences and an accelerator",
    "hours",
    "not run",
  ),
}


def get_config(preset: str = "sentiment") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  if preset == "bandit":
    return base.random_bandits("dpo", algorithm={"beta": (0.3, 1.0, 3.0)})
  algorithm = {"beta": 0.1, "reduction": "sum", "num_microbatches": 1}
  if preset == "tiny":
    return base.tiny_language_model("dpo", algorithm=algorithm)
  config = base.language_model("dpo", preset, algorithm=algorithm)
  if preset == "paper":
    config.algorithm.update({"beta": 0.5, "num_microbatches": 8})
    config.network.update({"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16", "remat": True})
    config.data.update({"name": "tldr", "prompt_length": 512, "completion_length": 64})
    config.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 150, "final_scale": 1.0})
    config.optimizer.update({"b1": 0.0, "b2": 0.99})
    config.train.update({"num_steps": 1450, "batch_size": 64})  # 92,820 pairs
    config.eval.update({"every": 200, "num_prompts": 256})
    config.sharding.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.checkpoint.every = 200
  return config
