"""The arithmetic of attention: masks, windows, grouped queries. No parameters in here."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignment.models import fused_attention

# Keys and values, each [B, num_kv_heads, S, head_dim].
KeysValues = tuple[jax.Array, jax.Array]

# A score so low that its softmax weight is exactly zero; finite, so that no row becomes NaN.
HIDDEN = -1e30


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


def attention_bias(mask: jax.Array, window: int | None = None) -> jax.Array:
  """Returns what is added to the scores, `[B, T, T]` float32: 0 where seen, else very negative.

  A real token sees the real tokens up to itself. A padded one sees only itself beside them, so that
  its softmax stays finite; nobody reads it.

  Args:
    mask: `[B, T]` non-zero on real tokens.
    window: if given, a token sees only itself and the `window - 1` real tokens before it.
  """
  length = mask.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))
  seen = causal & (mask > 0)[:, None, :]
  if window is not None:
    positions = positions_of(mask)
    seen &= positions[:, :, None] - positions[:, None, :] < window
  allowed = seen | jnp.eye(length, dtype=bool)
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


def attend(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  bias: jax.Array | SharedPromptBias,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Grouped-query attention of queries `[B, T, H, head_dim]` on keys `[B, KV, T, head_dim]`.

  With a `SharedPromptBias`, of completions that share a prompt.

  Args:
    queries: `[B, T, H, head_dim]`.
    keys: `[B, KV, T, head_dim]`.
    values: `[B, KV, T, head_dim]`.
    bias: what is added to the scores; see `attention_bias`.
    scale: factor of the scores.
    softcap: c, scores become c tanh(scores / c) before the bias; None for no cap.
  """
  single = functools.partial(_attend, scale=scale, softcap=softcap)
  if not isinstance(bias, SharedPromptBias):
    return single(queries, keys, values, bias)
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
  of_prompt = single(queries[:, :prompt_length], prompt_keys, prompt_values, bias.prompt)
  own_queries = queries[:, prompt_length:].reshape(num_rows, length, *queries.shape[2:])
  of_completion = single(own_queries, with_prompt(keys), with_prompt(values), bias.completion)
  of_completion = of_completion.reshape(num_prompts, group * length, *queries.shape[2:])
  return jnp.concatenate([of_prompt, of_completion], axis=1)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """Returns cap tanh(x / cap), which lies within the cap; x itself without one."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def _attend(queries, keys, values, bias, *, scale: float, softcap: float | None) -> jax.Array:
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
  scores = jnp.einsum("bkqd,bksd->bkqs", queries * scale, keys)
  scores = soft_cap(scores.astype(accumulator(scores.dtype)), softcap)
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
