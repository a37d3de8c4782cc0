"""Log-probabilities over a large vocabulary, one slice of it at a time, and their gradient.

A running log-sum-exp over slices of the vocabulary gives the normaliser, and the backward pass
computes the slices again. (A slice that is the whole vocabulary is kept, since that takes no more
memory.) Slices of the rows instead would add up the large gradient `[V, D]` once for each slice.
"""

import functools

import jax
import jax.numpy as jnp

import sharding
from sharding import checks

# Below every logit that is not minus infinity; finite, so that no difference of two becomes NaN.
_LOWEST = -1e30


def chunk_size_for(num_rows: int, vocabulary: int) -> int:
  """Returns how many entries of the vocabulary to take at a time on the default device.

  On a CPU 8192: more are no faster. On an accelerator the whole vocabulary, if its logits in
  float32 fit in an eighth of the memory: then the backward pass need not compute them again.

  Args:
    num_rows: positions whose logits are computed, B T.
    vocabulary: V.
  """
  limit = (sharding.default_device().memory_stats() or {}).get("bytes_limit", 0)
  entries = limit // 8 // (4 * num_rows)
  return vocabulary if entries >= vocabulary else max(8192, entries // 128 * 128)


def token_logps(
  hidden: jax.Array,
  embedding: jax.Array,
  tokens: jax.Array,
  *,
  chunk_size: int | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Returns the log-probability of each token, from logits of `chunk_size` entries at a time.

  Equal to `sequences.token_logps(hidden @ embedding.T, tokens)`, forward and backward. The largest
  array is `[B * T, chunk_size]`; matrix products accumulate in float32 or wider.

  Positions whose cotangent is zero (masked ones) pass on a gradient of exactly zero, even if their
  hidden states are not finite. Only reverse-mode differentiation is supported.

  Args:
    hidden: `[B, T, D]` last hidden states, aligned so that `hidden[:, t]` predicts `tokens[:, t]`.
    embedding: `[V, D]` output embedding (the transpose of a head's kernel), used without bias.
    tokens: `[B, T]` int in [0, V).
    chunk_size: vocabulary entries per slice; it need not divide V. None leaves it to
      `chunk_size_for`. If it is V or more, there is one slice `[B * T, V]`, kept for the backward
      pass.
    softcap: c, logits become c tanh(logits / c), as in Gemma 2; None for no cap.

  Returns:
    `[B, T]` nats, in float32 or wider.

  Raises:
    ValueError: if the shapes do not fit `chunk_size` is not a positive integer, or
      `softcap` is not positive.

  Example:
    >>> hidden, embedding = jnp.ones((1, 2, 4)), jnp.eye(3, 4)
    >>> token_logps(hidden, embedding, jnp.array([[0, 2]]), chunk_size=2).round(4)
    Array([[-1.0986, -1.0986]], dtype=float32)
  """
  if chunk_size is not None:
    checks.count("chunk_size", chunk_size)
  if softcap is not None:
    checks.positive("softcap", softcap)
  if jnp.ndim(hidden) != 3 or jnp.ndim(embedding) != 2 or hidden.shape[2] != embedding.shape[1]:
    raise ValueError(
      "hidden and embedding must have shapes [B, T, D] and [V, D], got "
      f"{list(jnp.shape(hidden))} and {list(jnp.shape(embedding))}"
    )
  checks.shape("tokens", tokens, hidden.shape[:2], "[B, T]")
  checks.token_ids("tokens", tokens, embedding.shape[0])
  if chunk_size is None:
    chunk_size = chunk_size_for(hidden.shape[0] * hidden.shape[1], embedding.shape[0])
  chunk_size = min(chunk_size, embedding.shape[0])
  # Rows flattened to one axis: contracting a single axis is what matrix units and CPUs are fast at.
  rows = hidden.reshape(-1, hidden.shape[2])
  logps = _row_logps(chunk_size, softcap, rows, embedding, jnp.asarray(tokens).reshape(-1))
  return logps.reshape(hidden.shape[:2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_logps(chunk_size, softcap, rows, embedding, tokens):
  """Returns `[N]` log-probabilities of `tokens` under softmax(rows [N, D] @ embedding [V, D]^T)."""
  return _forward(chunk_size, softcap, rows, embedding, tokens)[0]


def _forward(chunk_size, softcap, rows, embedding, tokens):
  dtype = _accumulator(rows)

  def add_slice(running, index):
    logits, _ = _slice_logits(chunk_size, softcap, rows, embedding, index)
    return _join(running, _log_sum_exp(logits)), None

  start = (jnp.full(rows.shape[:1], _LOWEST, dtype), jnp.zeros(rows.shape[:1], dtype))
  if chunk_size == embedding.shape[0]:
    whole, _ = _slice_logits(chunk_size, softcap, rows, embedding, 0)
    highest, total = _log_sum_exp(whole)
  else:
    whole, num_slices = None, -(-embedding.shape[0] // chunk_size)
    (highest, total), _ = jax.lax.scan(add_slice, start, jnp.arange(num_slices))
  log_normalisers = highest + jnp.log(total)
  chosen = embedding[tokens].astype(rows.dtype)
  chosen = jnp.einsum("nd,nd->n", rows, chosen, preferred_element_type=dtype)
  return _capped(chosen, softcap) - log_normalisers, (
    rows,
    embedding,
    tokens,
    log_normalisers,
    whole,
  )


def _join(first, second):
  """Joins two sums of exponentials, each as (m, s) with the sum s exp(m)."""
  highest = jnp.maximum(first[0], second[0])
  return highest, first[1] * jnp.exp(first[0] - highest) + second[1] * jnp.exp(second[0] - highest)


def _log_sum_exp(logits):
  """Returns (m, s) of each row of `[N, C]`: its sum of exponentials is s exp(m)."""

  def in_two_passes(logits):
    highest = jnp.maximum(jnp.max(logits, axis=1), _LOWEST)
    return highest, jnp.sum(jnp.exp(logits - highest[:, None]), axis=1)

  return jax.lax.platform_dependent(logits, cuda=_in_one_pass, default=in_two_passes)


def _in_one_pass(logits):
  """The same for a GPU, where a second exponential costs less than reading the logits again."""
  start = (jnp.asarray(_LOWEST, logits.dtype), jnp.asarray(0, logits.dtype))
  return tuple(jax.lax.reduce((logits, jnp.ones_like(logits)), start, _join, dimensions=(1,)))


def _backward(chunk_size, softcap, residuals, cotangents):
  rows, embedding, tokens, log_normalisers, whole = residuals
  dtype = _accumulator(rows)
  # d log p_y / d logit_v = [v = y] - p_v. Where the cotangent is zero, so is the row: 0 * NaN.
  live = (cotangents != 0)[:, None]
  safe_rows = jnp.where(live, rows, 0)
  vocabulary = embedding.shape[0]

  def add_slice(grads, index):
    row_grads, embedding_grads = grads
    if whole is None:
      logits, slice_start = _slice_logits(chunk_size, softcap, rows, embedding, index)
    else:
      logits, slice_start = whole, 0
    ids = slice_start + jnp.arange(chunk_size)
    first = index * chunk_size  # the last slice may overlap the one before; count its entries once
    chosen = (ids[None, :] == tokens[:, None]) & (ids >= first)
    logit_grads = chosen - jnp.exp(logits - log_normalisers[:, None])
    if softcap is not None:  # the slope of the cap; entries that do not count are minus infinity
      logit_grads *= 1 - jnp.square(jnp.maximum(logits, -softcap) / softcap)
    logit_grads = jnp.where(live, cotangents[:, None] * logit_grads, 0).astype(rows.dtype)
    weights = jax.lax.dynamic_slice_in_dim(embedding, slice_start, chunk_size).astype(rows.dtype)
    row_grads += jnp.dot(logit_grads, weights, preferred_element_type=dtype)
    new = jnp.dot(logit_grads.T, safe_rows, preferred_element_type=dtype)
    old = jax.lax.dynamic_slice_in_dim(embedding_grads, slice_start, chunk_size)
    embedding_grads = jax.lax.dynamic_update_slice_in_dim(
      embedding_grads, old + new.astype(old.dtype), slice_start, axis=0
    )
    return (row_grads, embedding_grads), None

  start = (jnp.zeros(rows.shape, dtype), jnp.zeros(embedding.shape, embedding.dtype))
  num_slices = -(-vocabulary // chunk_size)
  (row_grads, embedding_grads), _ = jax.lax.scan(add_slice, start, jnp.arange(num_slices))
  return row_grads.astype(rows.dtype), embedding_grads, None


_row_logps.defvjp(_forward, _backward)


def _slice_logits(chunk_size, softcap, rows, embedding, index):
  """Returns the logits `[N, chunk_size]` of one slice, and the id at which the slice starts.

  If the chunk does not divide the vocabulary, the last slice starts earlier, so that it is full.
  Its entries that the slice before has covered are -inf. (Padding would copy the embedding.)
  """
  start = jnp.minimum(index * chunk_size, embedding.shape[0] - chunk_size)
  # Left as they are, float32 weights would turn the product with bfloat16 rows into a float32 one.
  weights = jax.lax.dynamic_slice_in_dim(embedding, start, chunk_size).astype(rows.dtype)
  logits = jnp.dot(rows, weights.T, preferred_element_type=_accumulator(rows))
  fresh = start + jnp.arange(chunk_size) >= index * chunk_size
  return jnp.where(fresh, _capped(logits, softcap), -jnp.inf), start


def _capped(logits, softcap):
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _accumulator(rows):
  return jnp.promote_types(rows.dtype, jnp.float32)
