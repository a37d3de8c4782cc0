"""Tiny random models, tokenizers and files in the formats that `alignment.models` reads."""

import pathlib
import string

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from alignment.models import tokenizer as tokenizer_lib
from alignment.models import transformer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ s", "Ġs o", "u p", "Ġso up"]
TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
  "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% endif %}"
)
# One character for each byte, as GPT-2 writes them.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*SPECIAL, *_BYTES, *(merge.replace(" ", "") for merge in MERGES)]
TOKENS = np.frombuffer(string.ascii_letters.encode(), np.uint8)[None, :40].astype(np.int32)


def make_tokenizer(template=TEMPLATE):
  """A byte-level BPE tokenizer of 267 tokens that cuts words as SmolLM2's does."""
  pairs = [tuple(merge.split(" ")) for merge in MERGES]
  vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(SPECIAL)
  return tokenizer_lib.Tokenizer(backend, eos_id=2, pad_id=2, bos_id=1, chat_template=template)


def make_config(**changes):
  """Grouped queries, widths of whole quantisation blocks (32)."""
  sizes = dict(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
  return transformer.TransformerConfig(
    **{"vocab_size": len(VOCABULARY), "max_length": 128, **sizes, **changes}
  )


def make_params(config, seed=0, scale=0.3):
  """Random NumPy parameters, large enough for positions to matter."""
  shapes = jax.eval_shape(lambda key: transformer.init_params(config, key), jax.random.key(0))
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = generator.standard_normal(leaf.shape).astype(np.float32)
    is_norm = path[-1].key == "scale"
    return ((1 + 0.2 * noise) if is_norm else scale * noise).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def logits(params, config, tokens=TOKENS):
  """Logits as a NumPy array; no padding."""
  with jax.default_matmul_precision("highest"):
    return np.asarray(
      transformer.logits(params, tokens, np.ones(tokens.shape, np.float32), config=config)
    )


def write_gguf(path, config, params, *, quantise=None, changes=None, drop=(), tensors=None):
  """Writes a model as llama.cpp's converter would: its rotary pairs are "adjacent" if a Llama's.

  Args:
    path: of the file.
    config: its shape.
    params: NumPy parameters.
    quantise: stored name -> GGMLQuantizationType; the others stay float32.
    changes: metadata to set in place of the default ones (None: left out).
    drop: stored names to leave out.
    tensors: further tensors by stored name.
  """
  types = [3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL))
  u32, f32 = gguf.GGUFWriter.add_uint32, gguf.GGUFWriter.add_float32
  text, array, flag = (
    gguf.GGUFWriter.add_string,
    gguf.GGUFWriter.add_array,
    gguf.GGUFWriter.add_bool,
  )
  fields = {
    "llama.block_count": (u32, config.num_layers),
    "llama.context_length": (u32, config.max_length),
    "llama.embedding_length": (u32, config.width),
    "llama.feed_forward_length": (u32, config.mlp_width),
    "llama.attention.head_count": (u32, config.num_heads),
    "llama.attention.head_count_kv": (u32, config.num_kv_heads),
    "llama.rope.freq_base": (f32, config.rope_theta),
    "llama.attention.layer_norm_rms_epsilon": (f32, config.norm_epsilon),
    "tokenizer.ggml.model": (text, "gpt2"),
    "tokenizer.ggml.pre": (text, "smollm"),
    "tokenizer.ggml.tokens": (array, VOCABULARY),
    "tokenizer.ggml.token_type": (array, types),
    "tokenizer.ggml.merges": (array, MERGES),
    "tokenizer.ggml.bos_token_id": (u32, 1),
    "tokenizer.ggml.eos_token_id": (u32, 2),
    "tokenizer.ggml.padding_token_id": (u32, 2),
    "tokenizer.ggml.add_bos_token": (flag, False),
    "tokenizer.chat_template": (text, TEMPLATE),
  }
  fields.update(changes or {})
  architecture = fields.pop("general.architecture", "llama")
  writer = gguf.GGUFWriter(pathlib.Path(path), architecture)
  for key, entry in fields.items():
    if entry is not None:
      add, value = entry
      if key.startswith("llama."):
        key = f"{architecture}.{key.removeprefix('llama.')}"
      add(writer, key, value)
  stored = {**_stored(config, params), **(tensors or {})}
  for name, weights in stored.items():
    if name not in drop:
      kind = (quantise or {}).get(name)
      weights = np.ascontiguousarray(weights)
      if kind is None:
        writer.add_tensor(name, weights)
      else:
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


_NORMS = {
  "attention_norm": "attn_norm",
  "attention_post_norm": "post_attention_norm",
  "mlp_norm": "ffn_norm",
  "mlp_post_norm": "post_ffw_norm",
}


def _stored(config, params):
  layers = params["layers"]
  plus = np.float32(config.norm == "rms_plus_one")
  stored = {
    "token_embd.weight": params["embed"]["embedding"],
    "output_norm.weight": params["final_norm"]["scale"] + plus,
  }
  if not config.tied_head:
    stored["output.weight"] = params["head"]["kernel"].T
  for i in range(config.num_layers):
    for ours, theirs in _NORMS.items():
      if ours in layers:
        stored[f"blk.{i}.{theirs}.weight"] = layers[ours]["scale"][i] + plus
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "output")):
      weights = layers["attention"][ours]
      stored[f"blk.{i}.attn_{theirs}.weight"] = weights["kernel"][i].T
      if "bias" in weights:
        stored[f"blk.{i}.attn_{theirs}.bias"] = weights["bias"][i]
      if f"{ours}_norm" in layers["attention"]:
        norm = layers["attention"][f"{ours}_norm"]["scale"]
        stored[f"blk.{i}.attn_{theirs}_norm.weight"] = norm[i] + plus
    for name in ("gate", "up", "down"):
      stored[f"blk.{i}.ffn_{name}.weight"] = layers["mlp"][name]["kernel"][i].T
  return stored


def assert_bit_equal(first, second):
  """Compares two trees of arrays: structure, dtypes, shapes and bytes."""
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
