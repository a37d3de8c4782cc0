"""The arithmetic of attention: rotary positions, masks, grouped queries. No parameters in here."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from alignment.models import fused_attention

# Keys and values, each [B, num_kv_heads, S, head_dim].
KeysValues = tuple[jax.Array, jax.Array]

# A score so low that its softmax weight is exactly zero; finite, so that no row becomes NaN.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretch of the rotary wavelengths (the numbers of a `rope_type: llama3` config).

  Frequencies whose wavelength exceeds `original_max_length / low_frequency_factor` are divided by
  `factor`, those below `original_max_length / high_frequency_factor` are kept, with a linear blend
  in between.
  """

  factor: float
  low_frequency_factor: float
  high_frequency_factor: float
  original_max_length: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
  """Returns the `[head_dim / 2]` rotary frequencies, in radians per token."""
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = theta**-exponents
  if scaling is None:
    return frequencies
  turns = scaling.original_max_length * frequencies / (2 * math.pi)
  keep = (turns - scaling.low_frequency_factor) / (
    scaling.high_frequency_factor - scaling.low_frequency_factor
  )
  keep = jnp.clip(keep, 0.0, 1.0)
  return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_table(
  positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines `[B, T, 1, head_dim / 2]` for integer `positions` `[B, T]`."""
  frequencies = rope_frequencies(head_dim, theta, scaling)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def positions_of(mask: jax.Array) -> jax.Array:
  """Returns `[B, T]` positions: the number of real tokens before each one, 0 on leading padding."""
  return jnp.maximum(jnp.cumsum(mask > 0, axis=-1, dtype=jnp.int32) - 1, 0)


def justify_right(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Moves the padding of each row to its left, keeping the order of the real tokens.

  Args:
    tokens: `[B, P]` token ids.
    mask: `[B, P]` non-zero on real tokens, wherever they are.

  Returns:
    `(tokens, mask)` of the same shapes, every row ending in its last real token.
  """
  order = jnp.argsort(mask > 0, axis=-1, stable=True)
  return jnp.take_along_axis(tokens, order, -1), jnp.take_along_axis(mask, order, -1)


def justify_prompts(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The same for prompts, of which each must have a token to predict the next one from.

  A prompt without any real token becomes the start token `tokens[b, -1]`, which is then a token
  like others: later ones see it and count it.
  """
  tokens, mask = justify_right(tokens, mask)
  return tokens, mask.at[:, -1].set(True)


def attention_bias(mask: jax.Array) -> jax.Array:
  """Returns what is added to the scores, `[B, T, T]` float32: 0 where seen, else very negative.

  A real token sees the real tokens up to itself. A padded one sees only itself beside them, so that
  its softmax stays finite; nobody reads it.

  Args:
    mask: `[B, T]` non-zero on real tokens.
  """
  length = mask.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  allowed = (causal & (mask > 0)[:, None, :]) | jnp.eye(length, dtype=bool)
  return jnp.where(allowed, 0.0, HIDDEN)


class SharedPromptBias(NamedTuple):
  """What is added to the scores where K completions of length T follow one prompt in a row.

  Such a row holds P + K T tokens: the prompt, then the completions one after the other.

  Attributes:
    prompt: `[N, P, P]`, prompt tokens on their own prompt.
    completion: `[N K, T, P + T]`, completion tokens on the prompt and their own completion.
  """

  prompt: jax.Array
  completion: jax.Array


# What the queries may see: written out for all pairs of tokens, or for a kernel.
Visible = jax.Array | SharedPromptBias | fused_attention.Rows | fused_attention.SharedPromptRows


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, visible: Visible) -> jax.Array:
  """Grouped-query attention of queries `[B, T, H, head_dim]` on keys `[B, KV, T, head_dim]`.

  With a `SharedPromptBias` or `SharedPromptRows`, of completions that share a prompt. The kind of
  `visible` chooses the form: written out, or a fused kernel.
  """
  if isinstance(visible, fused_attention.Rows | fused_attention.SharedPromptRows):
    return fused_attention.attend(queries, keys, values, visible)
  bias = visible
  if not isinstance(bias, SharedPromptBias):
    return _attend(queries, keys, values, bias)
  num_prompts, prompt_length = bias.prompt.shape[:2]
  num_rows, length = bias.completion.shape[:2]
  group = num_rows // num_prompts

  def own(x):
    """Completion part of `[N, ..., P + K T, head_dim]` as `[N K, ..., T, head_dim]`."""
    split = x[..., prompt_length:, :].reshape(*x.shape[:-2], group, length, x.shape[-1])
    return jnp.moveaxis(split, -3, 1).reshape(num_rows, *x.shape[1:-2], length, x.shape[-1])

  def with_prompt(x):
    prompts = jnp.repeat(x[..., :prompt_length, :], group, axis=0)
    return jnp.concatenate([prompts, own(x)], axis=-2)

  prompt_keys, prompt_values = (x[..., :prompt_length, :] for x in (keys, values))
  of_prompt = _attend(queries[:, :prompt_length], prompt_keys, prompt_values, bias.prompt)
  own_queries = queries[:, prompt_length:].reshape(num_rows, length, *queries.shape[2:])
  of_completion = _attend(own_queries, with_prompt(keys), with_prompt(values), bias.completion)
  of_completion = of_completion.reshape(num_prompts, group * length, *queries.shape[2:])
  return jnp.concatenate([of_prompt, of_completion], axis=1)


def _attend(queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array) -> jax.Array:
  """Grouped-query attention.

  Args:
    queries: `[B, T, H, head_dim]`.
    keys: `[B, KV, S, head_dim]`; query head h reads key head h // (H / KV).
    values: `[B, KV, S, head_dim]`.
    bias: `[B, T, S]` float32, 0 for what a query may see and `HIDDEN` for the rest.

  Returns:
    `[B, T, H, head_dim]`.
  """
  batch, length, num_heads, head_dim = queries.shape
  num_kv_heads, span = keys.shape[1:3]
  groups = num_heads // num_kv_heads
  # Plain batched matrix products: one batch of B * KV, one contracted dimension.
  queries = queries.reshape(batch, length, num_kv_heads, groups, head_dim)
  queries = queries.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, groups * length, head_dim)
  scores = jnp.einsum("bkqd,bksd->bkqs", queries * head_dim**-0.5, keys)
  scores = scores.astype(accumulator(scores.dtype))
  # Added rather than selected: a sum needs no residual in the backward pass.
  scores = scores.reshape(batch, num_kv_heads, groups, length, span) + bias[:, None, None]
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  weights = weights.reshape(batch, num_kv_heads, groups * length, span)
  out = jnp.einsum("bkqs,bksd->bkqd", weights, values)
  out = out.reshape(batch, num_kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
  return out.reshape(batch, length, num_heads, head_dim)


def accumulator(dtype) -> jnp.dtype:
  """float32, or float64 where the whole computation is in float64."""
  return jnp.promote_types(dtype, jnp.float32)


def rotary_columns(
  kernel: jax.Array, num_heads: int, pairing: Literal["half", "adjacent"]
) -> jax.Array:
  """Returns a query or key kernel `[..., D, num_heads * head_dim]` in "half" order.

  Queries and keys reordered alike have the same products, and a matrix is often smaller than the
  activations: so "adjacent" becomes "half" here, and `rotate` knows only one kind.
  """
  if pairing == "half":
    return kernel
  pairs = kernel.reshape(*kernel.shape[:-1], num_heads, -1, 2)
  return pairs.swapaxes(-1, -2).reshape(kernel.shape)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates `[B, T, heads, head_dim]`, feature i paired with i + head_dim / 2."""
  cos, sin = rope
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
