"""Writes the golden checkpoints and logits of `huggingface_test.py` with transformers and torch.

  pip install torch==2.13.0 transformers==5.23.0
  python tests/alignment/models/make_golden.py

Run in an environment of its own; the results are committed. Every folder `golden/<case>` holds a
random Llama as `save_pretrained` writes it, plus `logits.npy`, its float32 logits for `TOKENS`.
"""

import json
import pathlib
import shutil

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"
# Two rows of 24 tokens of a vocabulary of 32.
TOKENS = (np.arange(48).reshape(2, 24) * 7 + 3) % 32

_PLAIN = {
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": False,
  "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 128,  # one frequency kept, one blended, two divided
}
CASES = {
  "plain": {},
  "grouped_queries": {"num_attention_heads": 4, "num_key_value_heads": 2},
  "tied": {"tie_word_embeddings": True},
  "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
  "llama3_rope": {"rope_parameters": _LLAMA3, "max_position_embeddings": 1024},
  "head_dim": {"head_dim": 12},
  "sharded_bfloat16": {},
}


def make_model(changes, seed=0):
  """Returns a random torch Llama whose logits depend visibly on every part of it."""
  import torch
  import transformers

  torch.manual_seed(seed)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_PLAIN, **changes}))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # The usual 0.02 would leave attention flat, and blind to wrong positions.
      scale = 0.3 if "norm" not in name else 0.2
      parameter.copy_(scale * torch.randn_like(parameter) + float("norm" in name))
  return model.eval()


def torch_logits(model, tokens=TOKENS):
  """Returns float32 logits `[B, T, V]`."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.float().numpy()


def main():
  import torch

  for seed, (case, changes) in enumerate(CASES.items()):
    folder = FOLDER / case
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(changes, seed)
    if case == "sharded_bfloat16":
      model = model.to(torch.bfloat16)
      model.save_pretrained(folder, max_shard_size="6KB")
      # Not `.to(float32)`: that would keep rotary frequencies rounded to bfloat16.
      model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    else:
      model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "logits.npy", torch_logits(model))
    print(case, json.dumps(changes), sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
  main()
