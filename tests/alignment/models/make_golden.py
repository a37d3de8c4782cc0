"""Writes golden checkpoints and logits with transformers and torch.

They are those of `huggingface_test.py` (Llama) and of `families_test.py` (the other families).

  pip install torch==2.13.0 transformers==5.23.0
  python tests/alignment/models/make_golden.py [case ...]

Run in an environment of its own; the results are committed. Every folder `golden/<case>` holds a
random model as `save_pretrained` writes it, plus `logits.npy`, its float32 logits for `TOKENS`.
"""

import json
import pathlib
import shutil
import sys

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


# The other families: `model_type` and what differs from `_PLAIN`. Windows are shorter than the 24
# tokens of a row, shares and scales are no round numbers.
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 10000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}
# The rows of 24 tokens are beyond the border of the first case, and within that of the second.
_LONGROPE = {
  "rope_type": "longrope",
  "rope_theta": 1e4,
  "partial_rotary_factor": 0.75,
  "short_factor": [1.0, 1.1, 1.3],
  "long_factor": [1.2, 2.5, 7.0],
}
FAMILY_CASES = {
  "linear_rope": (
    "llama",
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
  ),
  "yarn_rope": ("llama", {"rope_parameters": _YARN}),
  "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
  "mistral": ("mistral", {**_GROUPED, "sliding_window": 5}),
  "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
  "qwen2_windows": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen3": ("qwen3", _GROUPED),
  "gemma2": (
    "gemma2",
    {
      **_GROUPED,
      "query_pre_attn_scalar": 24,
      "sliding_window": 5,
      "attn_logit_softcapping": 3.0,
      "final_logit_softcapping": 4.0,
      "tie_word_embeddings": True,
    },
  ),
  "gemma3": (
    "gemma3_text",
    {
      **_GROUPED,
      "num_hidden_layers": 3,
      "query_pre_attn_scalar": 8,
      "sliding_window": 5,
      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
      "tie_word_embeddings": True,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
  ),
  "smollm3": ("smollm3", {"num_key_value_heads": 1, "no_rope_layer_interval": 2}),
  "phi3": (
    "phi3",
    {
      "sliding_window": 7,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
      },
    },
  ),
  "gpt2": ("gpt2", {"tie_word_embeddings": True}),
  "pythia": ("gpt_neox", {"rope_parameters": None}),
  "pythia_serial": (
    "gpt_neox",
    {"rope_parameters": None, "use_parallel_residual": False, "attention_bias": False},
  ),
  "longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16}),
  "longrope_short": (
    "phi3",
    {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32},
  ),
}
_GPT2 = {
  "hidden_size": "n_embd",
  "intermediate_size": "n_inner",
  "num_hidden_layers": "n_layer",
  "num_attention_heads": "n_head",
  "max_position_embeddings": "n_positions",
}
# Keys of `_PLAIN` that a family has not.
_WITHOUT = {
  "gpt2": ("num_key_value_heads", "rms_norm_eps", "rope_parameters"),
  "gpt_neox": ("num_key_value_heads", "rms_norm_eps", "rope_parameters"),
}


def make_model(changes, seed=0, kind="llama"):
  """Returns a random torch model whose logits depend visibly on every part of it."""
  import torch
  import transformers

  torch.manual_seed(seed)
  fields = {**_PLAIN, **changes}
  if kind != "llama":  # whose defaults lie outside of this vocabulary
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  for key in _WITHOUT.get(kind, ()):
    del fields[key]
  if kind == "gpt2":
    fields = {_GPT2.get(key, key): value for key, value in fields.items()}
  config = transformers.AutoConfig.for_model(kind, **fields)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      is_scale = ("norm" in name or ".ln_" in name) and name.endswith("weight")
      # The usual 0.02 would leave attention flat, and blind to wrong positions.
      noise = (0.2 if is_scale else 0.3) * torch.randn_like(parameter)
      parameter.copy_(noise + float(is_scale and "gemma" not in kind))
  return model.eval()


def torch_logits(model, tokens=TOKENS):
  """Returns float32 logits `[B, T, V]`."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.float().numpy()


def main():
  import torch

  cases = {case: ("llama", changes) for case, changes in CASES.items()} | FAMILY_CASES
  for seed, (case, (kind, changes)) in enumerate(cases.items()):
    if sys.argv[1:] and case not in sys.argv[1:]:
      continue
    folder = FOLDER / case
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(changes, seed, kind)
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
