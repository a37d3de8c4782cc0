r"""Supervised fine-tuning on {prompt, completion}: makes the reference of the alignment runs.

`summarise` fine-tunes SmolLM2 on one-sentence summaries of scientific abstracts, and measures
ROUGE-L with the human references of other abstracts. The command names all three files
(docs/results/human_preferences.md):

  bootstrax --config=sft:summarise --config.data.demonstrations=scitldr:TRAIN.jsonl.gz \
    --config.data.prompts=scitldr:DEV.jsonl.gz --config.reward=rouge_l:scitldr:DEV.jsonl.gz

Command:   python -m experiments.main --config=sft:tiny --workdir=runs/sft-tiny
Hardware:  two CPU cores
Wall time, expected result: in PRESETS below; --list prints them
"""

import ml_collections

from experiments.configs import base

PRESETS = {
  "tiny": base.Preset(
    "a random two-layer character model, random words", "20 seconds", "smoke test"
  ),
  "summarise": base.Preset(
    "SmolLM2-135M on abstracts and TLDRs; needs data.demonstrations and data.prompts",
    "9 minutes",
    "held-out ROUGE-L rises from 0.105 to 0.140 [0.129, 0.151]",
  ),
}


def get_config(preset: str = "summarise") -> ml_collections.ConfigDict:
  """Returns the config of one preset."""
  base.check_preset(preset, PRESETS)
  algorithm = {"reduction": "sum", "num_microbatches": 1}
  if preset == "tiny":
    config = base.tiny_language_model("sft", algorithm=algorithm)
    config.data.update({"demonstrations": "made_up:vowels", "completion_length": 20})
    return config
  config = base.language_model("sft", preset, algorithm=algorithm)
  config.data.update({"name": "summaries", "truncate": True})
  # The end of the abstract and "TL;DR:"; half of the human summaries have under 23 tokens.
  config.data.update({"prompt_length": 96, "completion_length": 32, "sample_batch_size": 32})
  config.optimizer.learning_rate = 5e-5
  config.eval.update({"every": 0, "num_prompts": 128})
  return config
