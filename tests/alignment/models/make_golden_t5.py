"""Writes the golden checkpoints and logits of `t5_files_test.py` with transformers and torch.

  pip install torch==2.14.1 transformers==5.24.0
  python tests/alignment/models/make_golden_t5.py

Run in an environment of its own; the results are committed. Every folder `golden_t5/<case>` holds a
random T5 as `save_pretrained` writes it, plus `logits.npy`, its float32 logits for `PROMPTS` with
`MASK` and `TOKENS`.
"""

import pathlib
import shutil

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden_t5"
# Longer than the largest distance of the configs, so that every bucket is used.
PROMPTS = (np.arange(56).reshape(2, 28) * 7 + 3) % 32
MASK = np.ones((2, 28), np.int64)
MASK[1, 19:] = 0
TOKENS = (np.arange(52).reshape(2, 26) * 5 + 1) % 32
TOKENS[:, 0] = 0

_PLAIN = {
  "vocab_size": 32,
  "d_model": 16,
  "d_kv": 6,
  "d_ff": 24,
  "num_layers": 2,
  "num_decoder_layers": 3,
  "num_heads": 2,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 20,
  "feed_forward_proj": "gated-gelu",
  "decoder_start_token_id": 0,
  "tie_word_embeddings": False,
}
CASES = {
  "v1_1": {},
  "first": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
  "sharded_bfloat16": {"num_decoder_layers": 1, "layer_norm_epsilon": 1e-3},
}


def make_model(changes, seed=0):
  """Returns a random torch T5 whose logits depend visibly on every part of it."""
  import torch
  import transformers

  torch.manual_seed(seed)
  config = transformers.T5Config(**{**_PLAIN, **changes})
  model = transformers.T5ForConditionalGeneration(config)
  if {**_PLAIN, **changes}["tie_word_embeddings"] is False:
    # transformers 5 ties the head of every new T5; files with a head of their own part them.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 1.0 if "relative" in name else 0.2
      parameter.copy_(scale * torch.randn_like(parameter) + float("norm" in name))
  return model.eval()


def torch_logits(model, prompts=PROMPTS, mask=MASK, tokens=TOKENS):
  """Returns float32 logits `[B, T, V]`."""
  import torch

  arrays = (torch.from_numpy(np.asarray(x, np.int64)) for x in (prompts, mask, tokens))
  with torch.no_grad():
    ids, attention_mask, decoder_ids = arrays
    out = model(input_ids=ids, attention_mask=attention_mask, decoder_input_ids=decoder_ids)
  return out.logits.float().numpy()


def main():
  import torch

  for seed, (case, changes) in enumerate(CASES.items()):
    folder = FOLDER / case
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(changes, seed)
    if case == "sharded_bfloat16":
      model = model.to(torch.bfloat16)
      model.save_pretrained(folder, max_shard_size="9KB")
      model = model.float()
    else:
      model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "logits.npy", torch_logits(model))
    print(case, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
  main()
