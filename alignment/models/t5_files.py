"""T5 in Hugging Face folders: the fields of `config.json` and the names of the tensors.

`huggingface` reads and writes the folders. Of a tied head the logits are divided by the root of the
width. transformers 4 goes by `tie_word_embeddings` for both, transformers 5 by the tensors for the
head and by `scale_decoder_outputs` for the division. `to_config_json` writes both keys alike, so
that either computes the same. A tied head without the division, which version 5 makes for models
that are trained from the beginning, is refused: the head is missing.
"""

from collections.abc import Mapping
from typing import Any

from alignment.models import config_keys, family_parts, t5
from sharding import checks

MODEL_TYPE = "t5"
# Copies of the embedding that some files hold.
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Found in the first T5's files, and read by no release of transformers.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

_HONOURED = frozenset(
  """
  model_type vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads
  relative_attention_num_buckets relative_attention_max_distance layer_norm_epsilon
  feed_forward_proj tie_word_embeddings scale_decoder_outputs decoder_start_token_id dtype
  torch_dtype bos_token_id eos_token_id pad_token_id is_encoder_decoder
  """.split()
)
# No computation depends on them: the length of the training texts, dropout, and what transformers
# derives from `feed_forward_proj`.
_INERT = frozenset(
  "n_positions output_past dropout_rate classifier_dropout dense_act_fn is_gated_act".split()
)
_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}


def names(config: t5.T5Config) -> dict[str, str]:
  """Returns the stored name of each parameter, `{}` in place of the layer's number.

  Example:
    >>> shape = dict.fromkeys("vocab_size num_layers num_decoder_layers width num_heads".split(), 1)
    >>> names(t5.T5Config(**shape, head_dim=1, mlp_width=1))["decoder/layers/mlp/down/kernel"]
    'decoder.block.{}.layer.2.DenseReluDense.wo.weight'
  """
  gated = config.mlp.startswith("gated")
  mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
  result = {"embed/embedding": "shared.weight", "head/kernel": "lm_head.weight"}
  for stack in ("encoder", "decoder"):
    parts = {"attention": "SelfAttention"}
    if stack == "decoder":
      parts["cross_attention"] = "EncDecAttention"
    first = f"{stack}.block.0.layer.0.SelfAttention"  # all layers share its table
    result[f"{stack}/position_bias/embedding"] = f"{first}.relative_attention_bias.weight"
    for number, (part, stored) in enumerate((parts | {"mlp": "DenseReluDense"}).items()):
      layer = f"{stack}.block.{{}}.layer.{number}"
      result[f"{stack}/layers/{part}_norm/scale"] = f"{layer}.layer_norm.weight"
      for ours, theirs in (mlp if part == "mlp" else _ATTENTION).items():
        result[f"{stack}/layers/{part}/{ours}/kernel"] = f"{layer}.{stored}.{theirs}.weight"
    result[f"{stack}/final_norm/scale"] = f"{stack}.final_layer_norm.weight"
  return result


def from_config_json(fields: Mapping[str, Any]) -> t5.T5Config:
  """Returns the config of an encoder-decoder from the fields of a `config.json`.

  Raises:
    ValueError: a field is missing, or needs a computation that `t5` does not do.

  Example:
    >>> from_config_json({
    ...   "model_type": "t5", "vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16,
    ...   "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu",
    ...   "tie_word_embeddings": False,
    ... }).num_decoder_layers
    2
  """
  config_keys.check(fields, honoured=_HONOURED, inert=config_keys.INERT | _INERT)
  if not fields.get("is_encoder_decoder", True):
    raise ValueError(
      "is_encoder_decoder=False is not supported: an encoder alone gives no log-probabilities; "
      "choose a checkpoint of T5ForConditionalGeneration"
    )

  def integer(name: str, default: int | None = None) -> int:
    value: Any = fields.get(name)
    value = default if value is None else value
    checks.count(name, value)
    return value

  mlp, epsilon = fields.get("feed_forward_proj", "relu"), fields.get("layer_norm_epsilon", 1e-6)
  checks.choice("feed_forward_proj", mlp, t5.MLPS)
  epsilon = family_parts.number("layer_norm_epsilon", 1e-6 if epsilon is None else epsilon)
  scaled = True
  for name in ("tie_word_embeddings", "scale_decoder_outputs"):  # the second goes before
    if fields.get(name) is not None:
      scaled = family_parts.flag(name, fields[name])
  starts = (fields.get(name) for name in ("decoder_start_token_id", "pad_token_id"))
  start_id = next((index for index in starts if index is not None), 0)
  checks.count("decoder_start_token_id", start_id, least=0)
  stored = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
  return t5.T5Config(
    vocab_size=integer("vocab_size"),
    num_layers=integer("num_layers"),
    num_decoder_layers=integer("num_decoder_layers", integer("num_layers")),
    width=integer("d_model"),
    num_heads=integer("num_heads"),
    head_dim=integer("d_kv"),
    mlp_width=integer("d_ff"),
    num_buckets=integer("relative_attention_num_buckets", 32),
    max_distance=integer("relative_attention_max_distance", 128),
    mlp=mlp,
    norm_epsilon=epsilon,
    tied_head=scaled,
    start_id=start_id,
    param_dtype="bfloat16" if stored == "bfloat16" else "float32",
  )


def to_config_json(config: t5.T5Config) -> dict[str, Any]:
  """Returns the fields of a `config.json` for transformers 4 and 5, without the special ids."""
  return {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": MODEL_TYPE,
    "is_encoder_decoder": True,
    "vocab_size": config.vocab_size,
    "d_model": config.width,
    "d_kv": config.head_dim,
    "d_ff": config.mlp_width,
    "num_layers": config.num_layers,
    "num_decoder_layers": config.num_decoder_layers,
    "num_heads": config.num_heads,
    "relative_attention_num_buckets": config.num_buckets,
    "relative_attention_max_distance": config.max_distance,
    "layer_norm_epsilon": config.norm_epsilon,
    "feed_forward_proj": config.mlp,
    "tie_word_embeddings": config.tied_head,
    "scale_decoder_outputs": config.tied_head,
    "decoder_start_token_id": config.start_id,
    "dtype": config.param_dtype,
    "torch_dtype": config.param_dtype,
  }
