"""What each key of a model file does here: it is honoured, inert, or refused by name.

`transformers` ignores keys that its class of a model does not know, and a fork of a family keeps
its class name and adds keys that its own code reads. So a key that nobody here knows may change the
function that the weights compute, and `check` refuses it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

# Read by `huggingface.from_config_json` for every family, or by `tokenizer.load`. Each family reads
# others too (`families.Family.keys`).
HONOURED = frozenset(
  "model_type quantization_config bos_token_id eos_token_id pad_token_id".split()
)

# Bookkeeping, training and generation: the logits do not depend on them.
INERT = frozenset(
  """
  architectures transformers_version _name_or_path name_or_path _commit_hash is_llama_config
  use_cache initializer_range initializer_factor pretraining_tp attention_dropout hidden_dropout
  resid_pdrop embd_pdrop attn_pdrop gradient_checkpointing tokenizer_class unk_token_id sep_token_id
  mask_token_id cls_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
  suppress_tokens begin_suppress_tokens bad_words_ids prefix task_specific_params problem_type
  finetuning_task id2label label2id num_labels return_dict output_attentions output_hidden_states
  output_scores return_dict_in_generate torchscript tf_legacy_loss use_bfloat16
  chunk_size_feed_forward
  pruned_heads is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
  tie_encoder_decoder do_sample temperature top_k top_p typical_p min_length max_length
  max_new_tokens num_beams num_beam_groups num_return_sequences diversity_penalty early_stopping
  length_penalty repetition_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size
  exponential_decay_length_penalty remove_invalid_values epsilon_cutoff eta_cutoff
  _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
  use_flash_attention use_flash_attention_2 unsloth_version unsloth_fixed unsloth_tied_embeddings
  transformers.js_config cache_implementation classifier_dropout summary_type summary_use_proj
  summary_activation summary_proj_to_labels summary_first_dropout neftune_noise_alpha
  keys_to_ignore_at_inference max_window_layers
  max_sequence_length model_max_length license tags language
  """.split()
)


def _all(value: Any) -> Callable[[Any], bool]:
  return lambda found: isinstance(found, list) and all(x == value for x in found)


# Keys of some families, each with the value (or a test for it) that changes nothing in the others.
NEUTRAL: dict[str, Any] = {
  **dict.fromkeys(
    """
    qk_norm use_qk_norm qk_layernorm qk_layer_norm use_qk_layernorm query_key_norm qkv_bias
    use_qkv_bias use_bias bias bias_o add_bias_linear add_qkv_bias lm_head_bias linear_bias
    out_bias o_bias norm_bias alibi parallel_attn use_parallel_residual use_sliding_window
    rope_interleaved interleaved_rope use_post_norm post_norm sandwich_norm use_layernorm
    use_moe moe attn_temperature_tuning scale_attn_by_inverse_layer_idx use_mup
    use_mla use_attention_sinks attention_sinks value_residual weight_norm gated_attention
    use_gated_attention headwise_attn_output_gate elementwise_attn_output_gate attention_bias
    mlp_bias use_mrope use_bidirectional_attention
    """.split(),
    False,
  ),
  **dict.fromkeys(
    """
    logits_scaling logit_scale embedding_multiplier residual_multiplier scale_emb lm_head_multiplier
    key_multiplier mup_width_multiplier embedding_scale residual_scale rotary_pct
    rotary_emb_fraction
    """.split(),
    1,
  ),
  **dict.fromkeys(
    """
    num_experts num_local_experts n_routed_experts n_shared_experts num_nextn_predict_layers
    """.split(),
    0,
  ),
  "layer_types": _all("full_attention"),
  "no_rope_layers": _all(1),  # as SmolLM3 writes it: 1 for a layer with rotary positions
  "hidden_activation": "silu",
  "partial_rotary_factor": 1,
  "mlp_hidden_act": "silu",
  "normalization_type": "rmsnorm",
}


# The same for the header of a GGUF file: what `gguf` reads of an architecture and its tokenizer,
# and what changes no number. llama.cpp reads no key outside these two groups. Keys of other
# architectures begin with their name in place of "llama".
GGUF_HONOURED = frozenset(
  """
  llama.block_count llama.context_length llama.embedding_length llama.feed_forward_length
  llama.attention.head_count llama.attention.head_count_kv llama.attention.key_length
  llama.attention.value_length llama.attention.layer_norm_rms_epsilon llama.rope.freq_base
  llama.rope.dimension_count llama.rope.scaling.type llama.rope.scaling.factor
  llama.rope.scale_linear llama.expert_count llama.vocab_size
  tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type
  tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id
  tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id tokenizer.ggml.padding_token_id
  tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token tokenizer.chat_template
  tokenizer.ggml.scores tokenizer.ggml.unknown_token_id
  """.split()
)
GGUF_INERT = frozenset(
  """
  llama.tensor_data_layout llama.rope.scaling.original_context_length llama.rope.scaling.finetuned
  llama.expert_used_count
  tokenizer.ggml.seperator_token_id
  tokenizer.ggml.cls_token_id tokenizer.ggml.mask_token_id tokenizer.ggml.token_type_count
  tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id tokenizer.ggml.middle_token_id
  tokenizer.ggml.fim_pre_token_id tokenizer.ggml.fim_suf_token_id tokenizer.ggml.fim_mid_token_id
  tokenizer.ggml.fim_pad_token_id tokenizer.ggml.fim_rep_token_id tokenizer.ggml.fim_sep_token_id
  tokenizer.huggingface.json tokenizer.chat_templates
  """.split()
)
# Off in these states: no space before texts, no white space removed from byte-level texts.
GGUF_NEUTRAL = {
  "tokenizer.ggml.add_space_prefix": False,
  "tokenizer.ggml.add_sep_token": False,
  "tokenizer.ggml.remove_extra_whitespaces": False,
  "llama.logit_scale": 1,
  "llama.embedding_scale": 1,
  "llama.residual_scale": 1,
  "llama.attention.sliding_window": 0,
  "llama.attention.clamp_kqv": 0,
  "llama.attention.max_alibi_bias": 0,
  "llama.attention.causal": True,
  "llama.expert_shared_count": 0,
  "llama.nextn_predict_layers": 0,
}


def check(
  fields: Mapping[str, Any],
  *,
  honoured: Collection[str] = (),
  inert: Collection[str] = (),
  neutral: Mapping[str, Any] | None = None,
) -> None:
  """Raises `ValueError` for the first key that is neither honoured nor inert, with its value.

  `null` says nothing, so it is never refused. The keys of a fork, such as `clip_qkv`,
  `attention_multiplier` or `auto_map`, need no table: whatever is not in one is refused.

  Args:
    fields: of a `config.json`.
    honoured: keys that the family reads, beside `HONOURED`.
    inert: keys that change nothing in this family, beside `INERT`.
    neutral: as `NEUTRAL`, for this family; it goes before.

  Example:
    >>> check({"model_type": "llama", "use_cache": True, "qk_norm": False, "clip_qkv": None})
    >>> check({"model_type": "llama", "qk_norm": True})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: qk_norm=True is not supported ...
  """
  known, table = {*HONOURED, *INERT, *honoured, *inert}, {**NEUTRAL, **(neutral or {})}
  for name, value in fields.items():
    if name in known or value is None:
      continue
    if name in table:
      test = table[name]
      if test(value) if callable(test) else value == test:
        continue
      raise ValueError(
        f"{name}={_short(value)} is not supported in this family of models; choose another "
        "checkpoint"
      )
    raise ValueError(
      f"{name}={_short(value)} is not known here and may change what the weights compute: remove "
      "it from config.json if it does not"
    )


def check_gguf(
  metadata: Mapping[str, Any], architecture: str = "llama", own: Collection[str] = ()
) -> None:
  """The same for the header of a GGUF file.

  Args:
    metadata: its fields.
    architecture: the prefix of its keys.
    own: keys, without that prefix, that this architecture alone reads.

  Example:
    >>> check_gguf({"llama.block_count": 2, "general.name": "Tiny", "llama.logit_scale": 1.0})
  """
  for name, value in metadata.items():
    is_own = name.startswith(f"{architecture}.")
    key = f"llama.{name.removeprefix(f'{architecture}.')}" if is_own else name
    known = key in GGUF_HONOURED | GGUF_INERT or name.startswith("tokenizer.chat_template.")
    known |= is_own and key.removeprefix("llama.") in own
    if known or not (is_own or name.startswith("tokenizer.")):
      continue
    if key not in GGUF_NEUTRAL or value != GGUF_NEUTRAL[key]:
      raise ValueError(
        f"{name}={_short(value)} is not supported: load the model's Hugging Face folder, or choose "
        "another model"
      )


def _short(value: Any) -> str:
  return repr(value)[:80]
