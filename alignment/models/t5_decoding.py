"""Writing completions with `t5` token by token: the `start` and `decode` of an encoder-decoder.

Each layer is applied by itself, with a cache of its own: an array of all layers would be copied in
every step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignment.models import attention, decoder_layers, t5, transformer


class Decoder(NamedTuple):
  """What the steps of one generation share; see `transformer_decoding`.

  Attributes:
    layers: parameters of each layer, matrices in `config.dtype`.
    prompts: keys and values `[N, heads, P, head_dim]` of the prompts, for each layer.
    padding: `[N, 1, 1, P]` hides the padding of the prompts.
    positions: `[1, heads, T + 1, T + 1]` what distances add to the scores.
    embedding: `[V, D]`.
    final_norm: the parameters of the last norm.
    head: `[V, D]`.
  """

  layers: tuple[Any, ...]
  prompts: tuple[attention.KeysValues, ...]
  padding: jax.Array
  positions: jax.Array
  embedding: jax.Array
  final_norm: Any
  head: jax.Array


# One pair (keys, values) a layer, each [B, heads, 1 + T, head_dim]: slot 0 is the start token's.
Caches = tuple[attention.KeysValues, ...]


def start(
  params: t5.Params,
  prompt_tokens: jax.Array,
  prompt_mask: jax.Array,
  *,
  config: t5.T5Config,
  max_new_tokens: int,
  num_samples: int = 1,
) -> tuple[Decoder, jax.Array, Caches]:
  """Reads the prompts: `transformer_decoding.start` for an encoder-decoder."""
  model: Any = t5.T5(config).bind({"params": params})
  prompt = attention.justify_prompts(prompt_tokens, prompt_mask)
  states, padding = model.encode(*prompt)
  block: Any = t5.Block(config, is_decoder=True)
  # Norms keep their scales as they are, as in the training pass.
  stacked = jax.tree.map(
    lambda x: x.astype(config.dtype) if x.ndim > 2 else x, params["decoder"]["layers"]
  )
  layers = tuple(
    jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.num_decoder_layers)
  )
  slots = max_new_tokens + 1
  decoder = Decoder(
    layers=layers,
    prompts=tuple(
      block.apply({"params": layer}, states, method="prompt_keys_values") for layer in layers
    ),
    padding=padding,
    positions=model.decoder.positions(slots),
    embedding=params["embed"]["embedding"],
    final_norm=params["decoder"]["final_norm"],
    head=transformer.output_embedding(params).astype(config.dtype),
  )
  num_rows = num_samples * len(prompt_tokens)
  empty = jnp.zeros((num_rows, config.num_heads, slots, config.head_dim), config.dtype)
  caches = ((empty, empty),) * config.num_decoder_layers
  token = jnp.full(num_rows, config.start_id)
  logits, caches = decode(decoder, token, jnp.int32(0), caches, config=config)
  return decoder, logits, caches


def decode(
  decoder: Decoder, token: jax.Array, slot: jax.Array, caches: Caches, *, config: t5.T5Config
) -> tuple[jax.Array, Caches]:
  """Reads one more token a row: `transformer_decoding.decode` for an encoder-decoder.

  The row of `positions` hides the slots that are not written yet.
  """
  block: Any = t5.Block(config, is_decoder=True)
  norm: Any = decoder_layers.Norm(config)  # type: ignore[arg-type]
  x = decoder.embedding[token].astype(config.dtype)[:, None]
  positions = jax.lax.dynamic_slice_in_dim(decoder.positions, slot, 1, axis=2)
  updated = []
  for layer, prompt, cache in zip(decoder.layers, decoder.prompts, caches, strict=True):
    source = (prompt, decoder.padding)
    x, cache = block.apply({"params": layer}, x, positions, slot, cache, source, method="step")
    updated.append(cache)
  hidden = norm.apply({"params": decoder.final_norm}, x[:, 0])
  return transformer.output_logits(t5.output_states(hidden, config), decoder.head), tuple(updated)
