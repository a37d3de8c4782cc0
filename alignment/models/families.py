"""The families of language models, each as a row of a table: keys of config.json, names of tensors.

A `Family` is a list of parts. A part reads a few keys of a `config.json` into fields of
`TransformerConfig` and writes them back, so that families share what they have in common. Fields
that a family always has are `fixed`. `huggingface` reads and writes the files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignment.models import family_parts, layout, rope_parts
from alignment.models.decoder_config import TransformerConfig
from alignment.models.family_parts import Fields, Part
from sharding import checks


@dataclasses.dataclass(frozen=True)
class Family:
  """How one `model_type` is stored.

  Attributes:
    architecture: class of transformers.
    parts: keys of its `config.json`.
    tensors: names of its tensors.
    defaults: what transformers assumes for a key that is absent.
    fixed: fields of `TransformerConfig` that all models of the family have, where they are not
      Llama's.
    inert: keys that change no number in this family, beside those that change none in any.
    neutral: keys with the value, or a test for it, that changes nothing in this family.
  """

  architecture: str
  parts: tuple[Part, ...]
  tensors: layout.Tensors
  defaults: Fields = dataclasses.field(default_factory=dict)
  fixed: Fields = dataclasses.field(default_factory=dict)
  inert: frozenset[str] = frozenset()
  neutral: Fields = dataclasses.field(default_factory=dict)

  @property
  def keys(self) -> frozenset[str]:
    """The keys that are read."""
    return frozenset[str]().union(*(part.keys for part in self.parts))

  def read(self, fields: Fields) -> TransformerConfig:
    """Returns the config of the fields of a `config.json`; `ValueError` names a bad one."""
    fields = {**self.defaults, **fields}
    changes = dict(self.fixed)
    for part in self.parts:
      changes |= part.read(fields)
    return TransformerConfig(**changes)

  def write(self, config: TransformerConfig) -> dict[str, Any]:
    """Returns fields that `read` reads as `config`, if the family can say all of it."""
    fields: dict[str, Any] = {}
    for part in self.parts:
      fields |= part.write(config)
    return fields


# What all families but GPT-2 have under the same names.
_COMMON = (
  family_parts.counts(
    vocab_size="vocab_size",
    num_hidden_layers="num_layers",
    intermediate_size="mlp_width",
    max_position_embeddings="max_length",
  ),
  family_parts.flags(tie_word_embeddings="tied_head"),
  family_parts.DTYPE,
)
_RMS = (
  *_COMMON,
  family_parts.heads(),
  family_parts.numbers(rms_norm_eps="norm_epsilon"),
  family_parts.activation("hidden_act"),
)
_RMS_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}


# --- tensors --------------------------------------------------------------------------------------


_LLAMA_LAYER = {
  "attention_norm": "input_layernorm",
  "attention/query": "self_attn.q_proj",
  "attention/key": "self_attn.k_proj",
  "attention/value": "self_attn.v_proj",
  "attention/output": "self_attn.o_proj",
  "mlp_norm": "post_attention_layernorm",
  "mlp/gate": "mlp.gate_proj",
  "mlp/up": "mlp.up_proj",
  "mlp/down": "mlp.down_proj",
}


def _like_llama(changes: Mapping[str, str] | None = None) -> layout.Tensors:
  """Llama's names of tensors, with changes or additions in a layer."""
  layer = {**_LLAMA_LAYER, **(changes or {})}
  others = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
  return layout.Tensors(layout.names(layer, "model.layers.{}.", **others))


# --- families -------------------------------------------------------------------------------------


_BIASES = family_parts.flags(attention_bias="qkv_bias output_bias")


def _above_first(fields: Fields, layer: int) -> bool:
  checks.count("max_window_layers", fields["max_window_layers"], least=0)
  return layer >= fields["max_window_layers"]


def _all_but_every(fields: Fields, layer: int) -> bool:
  pattern = fields["sliding_window_pattern"]
  checks.count("sliding_window_pattern", pattern)
  return (layer + 1) % pattern != 0


def _names_phi3(found: Any) -> bool:
  return isinstance(found, Mapping) and all(
    "phi3." in str(place) for name, place in found.items() if name != "AutoTokenizer"
  )


_LAST_LAYERS = family_parts.typed_window(_above_first, "max_window_layers", switch=True)
_QWEN_DEFAULTS = {
  **_RMS_DEFAULTS,
  "max_position_embeddings": 32768,
  "num_key_value_heads": 32,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
_GEMMA = (
  *_COMMON,
  family_parts.heads(),
  family_parts.numbers(rms_norm_eps="norm_epsilon"),
  family_parts.activation("hidden_activation", "gelu_pytorch_tanh"),
  family_parts.numbers(
    True, final_logit_softcapping="logit_softcap", attn_logit_softcapping="attention_softcap"
  ),
  family_parts.gemma_scales(),
  _BIASES,
)
_GEMMA_DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "hidden_activation": "gelu_pytorch_tanh",
  "tie_word_embeddings": True,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
_GEMMA_FIXED = {"norm": "rms_plus_one", "norm_placement": "pre_and_post"}
_GEMMA_LAYER = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
_GPT_FIXED = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}

FAMILIES: dict[str, Family] = {
  "llama": Family(
    "LlamaForCausalLM",
    parts=(*_RMS, rope_parts.rope(), _BIASES, family_parts.flags(mlp_bias="mlp_bias")),
    tensors=_like_llama(),
    defaults={**_RMS_DEFAULTS, "max_position_embeddings": 2048},
  ),
  "mistral": Family(
    "MistralForCausalLM",
    parts=(*_RMS, rope_parts.rope(), family_parts.whole_window()),
    tensors=_like_llama(),
    defaults={
      **_RMS_DEFAULTS,
      "max_position_embeddings": 131072,
      "num_key_value_heads": 8,
      "sliding_window": 4096,
    },
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    parts=(*_RMS, rope_parts.rope(), _LAST_LAYERS),
    tensors=_like_llama(),
    defaults=_QWEN_DEFAULTS,
    fixed={"qkv_bias": True},
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    parts=(*_RMS, rope_parts.rope(), _LAST_LAYERS, _BIASES),
    tensors=_like_llama(_HEAD_NORMS),
    defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    fixed={"head_norms": True},
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    parts=(*_GEMMA, rope_parts.rope(), family_parts.typed_window(lambda fields, i: i % 2 == 0)),
    tensors=_like_llama(_GEMMA_LAYER),
    defaults={
      **_GEMMA_DEFAULTS,
      "max_position_embeddings": 8192,
      "final_logit_softcapping": 30.0,
      "attn_logit_softcapping": 50.0,
    },
    fixed=_GEMMA_FIXED,
    # The model reads `hidden_activation` and `sliding_window`.
    inert=frozenset({"hidden_act", "sliding_window_size"}),
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    parts=(
      *_GEMMA,
      rope_parts.two_ropes(1e6, 1e4),
      family_parts.typed_window(_all_but_every, "sliding_window_pattern"),
    ),
    tensors=_like_llama({**_GEMMA_LAYER, **_HEAD_NORMS}),
    inert=frozenset({"_sliding_window_pattern"}),  # transformers 5 writes `layer_types` beside it
    defaults={
      **_GEMMA_DEFAULTS,
      "max_position_embeddings": 131072,
      "sliding_window_pattern": 6,
    },
    fixed={**_GEMMA_FIXED, "head_norms": True},
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    parts=(
      *_RMS,
      rope_parts.rope(2e6),
      _BIASES,
      family_parts.flags(mlp_bias="mlp_bias"),
      rope_parts.rotary_layers(),
      family_parts.typed_window(lambda fields, i: not rope_parts.rotates(fields)[i], switch=True),
    ),
    tensors=_like_llama(),
    defaults={
      **_RMS_DEFAULTS,
      "max_position_embeddings": 32768,
      "num_key_value_heads": 4,
      "no_rope_layer_interval": 4,
      "tie_word_embeddings": True,
    },
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    parts=(*_RMS, rope_parts.phi3_rope(), family_parts.whole_window()),
    tensors=_like_llama(
      {
        **{f"attention/{name}": "self_attn.qkv_proj" for name in ("query", "key", "value")},
        **{f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
      }
    ),
    defaults={
      **_RMS_DEFAULTS,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096,
    },
    # Microsoft's files name their own copy of the class that transformers has, which does not know
    # the two keys of Phi-4-mini.
    neutral={"auto_map": _names_phi3, "full_attn_mod": 1, "interpolate_factor": 1},
  ),
  "gpt2": Family(
    "GPT2LMHeadModel",
    parts=(
      family_parts.counts(vocab_size="vocab_size", n_layer="num_layers", n_positions="max_length"),
      family_parts.own_heads("n_embd", "n_head"),
      family_parts.gpt2_inner(),
      family_parts.gpt2_scores(),
      family_parts.numbers(layer_norm_epsilon="norm_epsilon"),
      family_parts.activation("activation_function", "gelu_new"),
      family_parts.flags(tie_word_embeddings="tied_head"),
      family_parts.DTYPE,
    ),
    tensors=layout.Tensors(
      layout.names(
        {
          "attention_norm": "ln_1",
          **{f"attention/{name}": "attn.c_attn" for name in ("query", "key", "value")},
          "attention/output": "attn.c_proj",
          "mlp_norm": "ln_2",
          "mlp/up": "mlp.c_fc",
          "mlp/down": "mlp.c_proj",
        },
        "transformer.h.{}.",
        embed="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
      ),
      transposed=False,
      optional_prefix="transformer.",
    ),
    defaults={
      "n_positions": 1024,
      "layer_norm_epsilon": 1e-5,
      "activation_function": "gelu_new",
      "scale_attn_weights": True,
      "tie_word_embeddings": True,
    },
    fixed={**_GPT_FIXED, "positions": "learned", "qkv_bias": True, "output_bias": True},
    inert=frozenset({"n_ctx", "reorder_and_upcast_attn"}),
  ),
  "gpt_neox": Family(
    "GPTNeoXForCausalLM",
    parts=(
      *_COMMON,
      family_parts.own_heads("hidden_size", "num_attention_heads"),
      family_parts.numbers(layer_norm_eps="norm_epsilon"),
      family_parts.activation("hidden_act", "gelu"),
      rope_parts.rope(share=0.25, theta_key="rotary_emb_base", share_key="rotary_pct"),
      _BIASES,
      family_parts.parallel_residual(),
    ),
    tensors=layout.Tensors(
      layout.names(
        {
          "attention_norm": "input_layernorm",
          **{
            f"attention/{name}": "attention.query_key_value" for name in ("query", "key", "value")
          },
          "attention/output": "attention.dense",
          "mlp_norm": "post_attention_layernorm",
          "mlp/up": "mlp.dense_h_to_4h",
          "mlp/down": "mlp.dense_4h_to_h",
        },
        "gpt_neox.layers.{}.",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
      ),
      by_head=True,
    ),
    defaults={
      "layer_norm_eps": 1e-5,
      "hidden_act": "gelu",
      "max_position_embeddings": 2048,
      "attention_bias": True,
      "use_parallel_residual": True,
    },
    fixed=_GPT_FIXED,
  ),
}


def family_of(config: TransformerConfig) -> str:
  """Returns the first family whose `config.json` can say all of a config.

  Raises:
    ValueError: there is none.
  """
  # What the file does not hold: how this library computes, and pairs that are reordered on saving.
  config = dataclasses.replace(
    config,
    rope_pairing="half",
    dtype="float32",
    remat=False,
    fused_attention=None,
    scan_layers=True,
  )
  family_parts.check_width(config.width, config.num_heads)
  for name, family in FAMILIES.items():
    try:
      if family.read(family.write(config)) == config:
        return name
    except ValueError:  # a value that this family does not have
      continue
  raise ValueError(
    f"no family of models that transformers knows ({', '.join(FAMILIES)}) has all choices of this "
    f"config, so that a folder cannot hold it: {config}"
  )
