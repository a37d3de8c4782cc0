"""Sampling completions: a language model reads the prompts, then writes token by token.

How a model reads prompts and the next token is in `transformer_decoding` and `t5_decoding`.

The whole of it is one compiled program per shape `(B, P, max_new_tokens, num_samples)`;
temperature, top-k, top-p and the ids are ordinary arguments, so a new value compiles nothing (only
switching greedy, top-k or top-p on or off does). `bucket_length` rounds prompt lengths up to a few
shapes. A token is drawn by inverting the cumulative distribution, in two levels of about sqrt(V)
entries each, with two uniforms a row in place of V Gumbel variates; top-k and top-p find their
threshold by bisection in place of a sort.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignment import sequences
from alignment.models import architectures, lora, t5, t5_decoding, transformer, transformer_decoding
from sharding import checks


class Samples(NamedTuple):
  """Sampled completions, in the form that `sequences.Sequences` wants them.

  Attributes:
    tokens: `[B, T]` int32 (`[B K, T]` for K samples of a prompt), `pad_id` after the end.
    mask: `[B, T]` float32, 1 on sampled tokens including EOS.
    logps: `[B, T]` float32, the model's own log-probability of each token in nats (temperature 1,
      nothing cut off), as the model's `make_apply_fn` gives it; 0 after the end. In bfloat16 they
      come from that pass itself. Of a mixture, that of the mixture, as it was drawn.
  """

  tokens: jax.Array
  mask: jax.Array
  logps: jax.Array


def bucket_length(length: int, multiple: int) -> int:
  """Returns `length` rounded up to a multiple, so that few distinct shapes are compiled.

  Example:
    >>> [bucket_length(n, 8) for n in (1, 8, 9)]
    [8, 8, 16]
  """
  if multiple < 1:
    raise ValueError(f"multiple must be at least 1, got {multiple}")
  return -(-length // multiple) * multiple


def generate(
  params: transformer.Params,
  prompt_tokens: jax.Array,
  prompt_mask: jax.Array,
  key: jax.Array,
  *,
  config: architectures.Config,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int | Sequence[int],
  pad_id: int,
  num_samples: int = 1,
  ref_params: transformer.Params | None = None,
  mixture_fn: Callable[..., jax.Array] | None = None,
  beta: float | None = None,
) -> Samples:
  """Samples completions of each prompt; each prompt is read once, however many there are.

  With `ref_params` two models speak with one voice: at every position their logits are joined by
  `mixture_fn` and one token is drawn, each model with caches of its own in the same program.

  Temperature divides the logits; top-k then keeps the k most probable tokens (and what ties with
  the last of them), top-p the smallest set of most probable tokens (ties too) whose share of what
  is left reaches `top_p`. The draw at row b depends on `key`, b and the position, not on the other
  rows.

  Args:
    params: of the model, laid out as in `transformer` or `t5`.
    prompt_tokens: `[B, P]` int ids.
    prompt_mask: `[B, P]` non-zero on real tokens; padding may be on the left or on the right. A row
      without any is one start token, `prompt_tokens[b, -1]`.
    key: typed PRNG key.
    config: the shape of the model.
    max_new_tokens: T, at least 1. The loop ends early once every row has met an end token.
    temperature: non-negative; 0 takes the most probable token.
    top_k: 0 for no limit.
    top_p: in (0, 1]; 1 for no limit.
    eos_id: the token that ends a completion, or several of them; a negative id never does.
    pad_id: what `tokens` holds after the end.
    num_samples: K completions of each prompt.
    ref_params: of a second model of the same shape, or None.
    mixture_fn: `mixture_fn(logits, ref_logits, beta=beta) -> logits`, `[B, V]` each, such as
      `nash_md.geometric_mixture_logits`; a static argument.
    beta: in [0, 1], what `mixture_fn` gets; a new value compiles nothing.

  Returns:
    `Samples` of `[B K, T]`; rows b K to b K + K - 1 continue prompt b.

  Raises:
    ValueError: for shapes that do not fit, a concrete id outside the vocabulary, a prompt and
      completion longer than `config.max_length`, or a setting out of range.
  """
  eos_ids = tuple(np.atleast_1d(np.asarray(eos_id, np.int32)).tolist())
  ids = (eos_ids, pad_id)
  _check(prompt_tokens, prompt_mask, config, max_new_tokens, temperature, top_k, top_p, ids)
  if num_samples < 1:
    raise ValueError(f"num_samples must be at least 1, got {num_samples}")
  if len({value is None for value in (ref_params, mixture_fn, beta)}) > 1:
    raise ValueError(
      f"ref_params, mixture_fn and beta must be given together, or none of them: beta is {beta}"
    )
  if beta is not None:
    checks.shape("beta", beta, (), "[]")
    checks.probabilities("beta", beta)
  return _generate(
    (params,) if ref_params is None else (params, ref_params),
    jnp.float32(0 if beta is None else beta),
    prompt_tokens,
    prompt_mask,
    key,
    jnp.float32(temperature),
    jnp.int32(top_k),
    jnp.float32(top_p),
    jnp.asarray(eos_ids, jnp.int32),
    jnp.int32(pad_id),
    config=config,
    max_new_tokens=max_new_tokens,
    num_samples=num_samples,
    mixture_fn=mixture_fn,
    greedy=temperature == 0,
    use_top_k=0 < top_k < config.vocab_size,
    use_top_p=top_p < 1,
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    "config", "max_new_tokens", "num_samples", "mixture_fn", "greedy", "use_top_k", "use_top_p"
  ),
)  # fmt: skip
def _generate(
  models,
  beta,
  prompt_tokens,
  prompt_mask,
  key,
  temperature,
  top_k,
  top_p,
  eos_ids,
  pad_id,
  *,
  config,
  max_new_tokens,
  num_samples,
  mixture_fn,
  greedy,
  use_top_k,
  use_top_p,
):
  model: Any = t5_decoding if isinstance(config, t5.T5Config) else transformer_decoding
  read = functools.partial(
    model.start,
    prompt_tokens=prompt_tokens,
    prompt_mask=prompt_mask,
    config=config,
    max_new_tokens=max_new_tokens,
    num_samples=num_samples,
  )
  merged = [lora.merge(params) for params in models]  # once: each token reads every weight
  decoders, logits, caches = zip(*(read(params) for params in merged), strict=True)
  batch = len(logits[0])
  first_slot = caches[0][0][0].shape[2] - max_new_tokens  # of the completion, in the caches

  def join(logits):
    return logits[0] if mixture_fn is None else mixture_fn(*logits, beta=beta)

  def pick(t, logits):
    """Returns the token at position t and its log-probability under the model, `[B]` each."""
    if greedy:
      token = jnp.argmax(logits, axis=-1)
    else:
      weights = jax.nn.softmax(logits / temperature, axis=-1)
      if use_top_k:
        weights = _keep(weights, jnp.ones_like(weights), top_k.astype(jnp.float32)[None])
      if use_top_p:
        weights = _keep(weights, weights, top_p * weights.sum(-1))
      uniforms = jax.random.uniform(jax.random.fold_in(key, t), (batch, 2))
      token = draw(weights, uniforms)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)

  def record(t, samples, logits, going):
    token, logp = pick(t, logits)
    token = jnp.where(going, token, pad_id)
    logp = jnp.where(going, logp, 0.0).astype(jnp.float32)
    news = (token, going.astype(jnp.float32), logp)
    samples = Samples(
      *(
        jax.lax.dynamic_update_slice_in_dim(old, new[:, None], t, axis=1)
        for old, new in zip(samples, news, strict=True)
      )
    )
    return samples, token, going & ~jnp.isin(token, eos_ids)

  def step(carry):
    t, samples, token, going, caches = carry
    slot = first_slot + t - 1
    results = [
      model.decode(decoder, token, slot, cache, config=config)
      for decoder, cache in zip(decoders, caches, strict=True)
    ]
    logits, caches = zip(*results, strict=True)
    samples, token, going = record(t, samples, join(logits), going)
    return t + 1, samples, token, going, caches

  shape = (batch, max_new_tokens)
  zeros = jnp.zeros(shape, jnp.float32)
  samples = Samples(jnp.full(shape, pad_id), zeros, zeros)
  samples, token, going = record(0, samples, join(logits), jnp.ones(batch, bool))
  carry = (jnp.int32(1), samples, token, going, caches)
  samples = jax.lax.while_loop(
    lambda carry: (carry[0] < max_new_tokens) & jnp.any(carry[3]), step, carry
  )[1]
  if len(models) > 1 or jnp.dtype(config.dtype).itemsize >= 4:
    return samples
  # Narrow sums in another order are other numbers: the step loop is 0.04 nats a token off the
  # training pass (root mean square, SmolLM2 in bfloat16). Losses compare with the latter.
  rows = sequences.Sequences(samples.tokens, samples.mask, prompt_tokens, prompt_mask)
  logps = architectures.make_apply_fn(config)(models[0], rows)
  return samples._replace(logps=jnp.where(samples.mask > 0, logps, 0))


def draw(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
  """Draws one index a row with probability proportional to `weights`.

  The distribution is inverted first over blocks of indices, then inside the block: short sums, so
  float32 is exact enough for large vocabularies. An index of weight zero is never returned.

  Args:
    weights: `[B, V]` non-negative, at least one positive a row.
    uniforms: `[B, 2]` in [0, 1).

  Returns:
    `[B]` int32 indices.
  """
  batch, size = weights.shape
  block = 1 << math.ceil(math.log2(max(size, 2)) / 2)
  blocks = jnp.pad(weights, [(0, 0), (0, -size % block)]).reshape(batch, -1, block)
  which = _invert(blocks.sum(-1), uniforms[:, 0])
  within = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]
  return (which * block + _invert(within, uniforms[:, 1])).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns the first index whose cumulative share exceeds `uniform`; `[B, N]`, `[B]` -> `[B]`."""
  sums = jnp.cumsum(weights, axis=-1)
  # Rounding may leave a parallel cumulative sum uneven over zeros, or reach the total too early.
  beyond = (sums > uniform[:, None] * sums[:, -1:]) & (weights > 0)
  return jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1))


def _keep(weights: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
  """Zeroes all but the largest `weights` whose `mass` together reaches `target`.

  Non-negative floats are ordered like their bits, so the largest threshold that still keeps enough
  is found exactly, one bit at a time, in 31 passes and no sort.

  Args:
    weights: `[B, V]` float32, non-negative.
    mass: `[B, V]`.
    target: `[B]` or `[1]`.
  """
  bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

  def try_bit(i, threshold):
    candidate = threshold | (1 << (30 - i))
    kept = jnp.sum(jnp.where(bits >= candidate[:, None], mass, 0.0), axis=-1)
    return jnp.where(kept >= target, candidate, threshold)

  threshold = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(weights.shape[0], jnp.int32))
  return jnp.where(bits >= threshold[:, None], weights, 0.0)


def _check(prompt_tokens, prompt_mask, config, max_new_tokens, temperature, top_k, top_p, ids):
  shape = jnp.shape(prompt_tokens)
  if len(shape) != 2 or shape != jnp.shape(prompt_mask) or not shape[1]:
    raise ValueError(
      f"prompt_tokens and prompt_mask must both be [B, P] with P >= 1, got {list(shape)} and "
      f"{list(jnp.shape(prompt_mask))}"
    )
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  if shape[1] + max_new_tokens > config.max_length:
    raise ValueError(
      f"prompt_tokens ({shape[1]} a row) and max_new_tokens ({max_new_tokens}) exceed max_length "
      f"({config.max_length}): shorten one of them"
    )
  if not temperature >= 0:
    raise ValueError(f"temperature must not be negative, got {temperature}")
  if top_k < 0:
    raise ValueError(f"top_k must not be negative (0 for no limit), got {top_k}")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p must be in (0, 1], got {top_p}")
  eos_ids, pad_id = ids
  if any(i >= config.vocab_size for i in eos_ids) or not 0 <= pad_id < config.vocab_size:
    raise ValueError(
      f"eos_id ({', '.join(map(str, eos_ids))}) and pad_id ({pad_id}) must lie below vocab_size "
      f"({config.vocab_size})"
    )
  if not isinstance(prompt_tokens, jax.core.Tracer):
    checks.token_ids("prompt_tokens", np.asarray(prompt_tokens), config.vocab_size)
