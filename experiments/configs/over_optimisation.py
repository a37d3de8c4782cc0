r"""How far to follow a learned reward: Gao et al. 2022 (arXiv:2210.10760) at the scale of a CPU.

A model is fine-tuned on summaries of abstracts. A judge that reads the human summaries compares
pairs of its own summaries, and a reward model learns from these labels; it sees no human summary.
RLOO then climbs the learned reward, and the judge scores the policy on the way. While both rise,
the reward is honest; once the judge falls, the reward is being over-optimised.

Command:   python -m experiments.main --config=over_optimisation:summaries \
             --workdir=runs/over_optimisation --config.data.demonstrations=scitldr:TRAIN.jsonl.gz \
             --config.data.prompts=scitldr:DEV.jsonl.gz
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "summaries": base.Preset(
    "SmolLM2-135M on abstracts; needs data.demonstrations and data.prompts",
    "1 hour",
    "ROUGE-L, which is not optimised, rises from 0.133 to 0.173 at 6.8 nats and does not fall",
  ),
  "tiny": base.Preset("random words, and vowels as the judge", "2 minutes", "smoke test"),
}


def get_config(preset: str = "summaries") -> ml_collections.ConfigDict:
  """Returns the config of one preset; its sections replace those of the runs."""
  base.check_preset(preset, PRESETS)
  tiny = preset == "tiny"
  return ml_collections.ConfigDict(
    {
      "paper": "over_optimisation",
      "preset": preset,
      "seed": 0,
      # Of completions: a reward that the learned one never sees. `rouge_l` reads the references of
      # the two sources below; any other reward is used as it is.
      "judge": "vowels" if tiny else "rouge_l",
      "methods": {
        "sft": "sft:tiny" if tiny else "sft:summarise",
        "reward_model": "reward_model:tiny" if tiny else "reward_model:human",
        "policy": "rloo:tiny" if tiny else "rloo:sentiment",
      },
      # All sections but the next two are those of the policy.
      "sft": {"train": {"num_steps": 4 if tiny else 40}},
      "reward_model": {
        "optimizer": {"learning_rate": 1e-2 if tiny else 1e-3},
        "train": {"num_steps": 20 if tiny else 100},
        "eval": {"num_prompts": 32 if tiny else 200},
      },
      "algorithm": {"beta": 0.01},
      "network": {"lora_rank": 2 if tiny else 16},
      "data": {
        # {prompt, completion}: to imitate, and the prompts of the pairs that the judge labels.
        "demonstrations": "made_up:vowels" if tiny else "",
        "prompts": "",  # {prompt, completion} of the policy and of the evaluations
        "num_pairs": 128 if tiny else 1800,
        "num_prompts": 64 if tiny else 360,
      },
      "optimizer": {"learning_rate": 3e-3 if tiny else 5e-4, "final_scale": 1.0},
      "sharding": {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 4 if tiny else 60, "batch_size": 8 if tiny else 4, "log_every": 1},
      "eval": {"every": 2 if tiny else 12, "num_prompts": 64 if tiny else 256},
      "checkpoint": {"every": 2 if tiny else 6, "keep": 1},
    }
  )
