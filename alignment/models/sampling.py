"""Sampling completions from a `transformer`: prefill, then one token at a time with a cache.

The whole of it is one compiled program per shape `(B, P, max_new_tokens)`; temperature, top-k,
top-p and the ids are ordinary arguments, so a new value compiles nothing (only switching greedy,
top-k or top-p on or off does). `bucket_length` rounds prompt lengths up to a few shapes.

What makes it fast on a CPU, each measured:
* every layer has its own cache array in the loop's carry, so that a step writes one slot in place (a
  cache that is the output of a scan over layers is copied every step);
* weights are transposed and joined (query, key and value; gate and up) once, before the loop, and
  multiply the activations from the left, `[F, D] @ [D, B]`: with few columns that is up to 1.7 times
  faster than `[B, D] @ [D, F]`;
* a token is drawn by inverting the cumulative distribution, in two levels of about sqrt(V) entries
  each, with two uniforms a row in place of V Gumbel variates; top-k and top-p find their threshold
  by bisection in place of a sort.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignment.models import transformer


class Samples(NamedTuple):
  """Sampled completions, in the form that `sequences.Sequences` wants them.

  Attributes:
    tokens: `[B, T]` int32, `pad_id` after the end.
    mask: `[B, T]` float32, 1 on sampled tokens including EOS.
    logps: `[B, T]` float32, the model's own log-probability of each token in nats (temperature 1,
      nothing cut off), as `transformer.make_apply_fn` would give it; 0 after the end.
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
  config: transformer.TransformerConfig,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int,
  pad_id: int,
) -> Samples:
  """Samples a completion of each prompt.

  Temperature divides the logits; top-k then keeps the k most probable tokens (and what ties with the
  last of them), top-p the smallest set of most probable tokens (ties too) whose share of what is left
  reaches `top_p`. The draw at row b depends on `key`, b and the position, not on the other rows.

  Args:
    params: of the model, laid out as in `transformer`.
    prompt_tokens: `[B, P]` int ids.
    prompt_mask: `[B, P]` non-zero on real tokens; padding may be on the left or on the right.
    key: typed PRNG key.
    config: the shape of the model.
    max_new_tokens: T, at least 1. The loop ends early once every row has met `eos_id`.
    temperature: non-negative; 0 takes the most probable token.
    top_k: 0 for no limit.
    top_p: in (0, 1]; 1 for no limit.
    eos_id: ends a completion; a negative id never does.
    pad_id: what `tokens` holds after the end.

  Returns:
    `Samples` of `[B, T]`.

  Raises:
    ValueError: for shapes that do not fit, a concrete id outside the vocabulary, a prompt and
      completion longer than `config.max_length`, or a setting out of range.
  """
  _check(prompt_tokens, prompt_mask, config, max_new_tokens, temperature, top_k, top_p)
  return _generate(
    params,
    prompt_tokens,
    prompt_mask,
    key,
    jnp.float32(temperature),
    jnp.int32(top_k),
    jnp.float32(top_p),
    jnp.int32(eos_id),
    jnp.int32(pad_id),
    config=config,
    max_new_tokens=max_new_tokens,
    greedy=temperature == 0,
    use_top_k=0 < top_k < config.vocab_size,
    use_top_p=top_p < 1,
  )


@functools.partial(
  jax.jit, static_argnames=("config", "max_new_tokens", "greedy", "use_top_k", "use_top_p")
)
def _generate(
  params,
  prompt_tokens,
  prompt_mask,
  key,
  temperature,
  top_k,
  top_p,
  eos_id,
  pad_id,
  *,
  config,
  max_new_tokens,
  greedy,
  use_top_k,
  use_top_p,
):
  batch = prompt_tokens.shape[0]
  decoder, logits, caches = start(
    params, prompt_tokens, prompt_mask, config=config, max_new_tokens=max_new_tokens
  )

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
    return samples, token, going & (token != eos_id)

  def step(carry):
    t, samples, token, going, caches = carry
    logits, caches = decode(decoder, token, t - 1, caches, config=config)
    samples, token, going = record(t, samples, logits, going)
    return t + 1, samples, token, going, caches

  shape = (batch, max_new_tokens)
  samples = Samples(jnp.full(shape, pad_id), jnp.zeros(shape), jnp.zeros(shape))
  samples, token, going = record(0, samples, logits, jnp.ones(batch, bool))
  carry = (jnp.int32(1), samples, token, going, caches)
  return jax.lax.while_loop(
    lambda carry: (carry[0] < max_new_tokens) & jnp.any(carry[3]), step, carry
  )[1]


class Decoder(NamedTuple):
  """What the steps of one generation share: weights in the layout of the loop, and the prompts.

  Attributes:
    layers: for each layer its two norm scales `[D, 1]` and four matrices, output features first.
    embedding: `[V, D]`.
    final_norm: `[D, 1]`.
    head: `[V, D]`.
    lengths: `[B]` number of real prompt tokens.
    bias: `[B, S]` 0 on the real prompt tokens and on all later slots, else very negative.
  """

  layers: tuple[dict[str, jax.Array], ...]
  embedding: jax.Array
  final_norm: jax.Array
  head: jax.Array
  lengths: jax.Array
  bias: jax.Array


# One pair (keys, values) a layer, each [B, num_kv_heads, P + T, head_dim].
Caches = tuple[transformer.KeysValues, ...]


def start(
  params: transformer.Params,
  prompt_tokens: jax.Array,
  prompt_mask: jax.Array,
  *,
  config: transformer.TransformerConfig,
  max_new_tokens: int,
) -> tuple[Decoder, jax.Array, Caches]:
  """Reads the prompts: returns the decoder, the logits `[B, V]` of the first token, and the caches.

  `start` and `decode` are the model as a source of logits; what is made of the logits (one model's
  draw, or a mixture of two models) is the caller's.
  """
  tokens, mask = transformer.justify_right(prompt_tokens, prompt_mask)
  hidden, keys_values = transformer.Transformer(config).apply(
    {"params": params}, tokens, mask, method="hidden_states"
  )
  room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0)]
  caches = tuple(
    (jnp.pad(keys_values[0][i], room), jnp.pad(keys_values[1][i], room))
    for i in range(config.num_layers)
  )
  seen = jnp.pad(mask > 0, [(0, 0), (0, max_new_tokens)], constant_values=True)
  # A prompt row without a real token starts from its last one, as in `make_apply_fn`; nobody else
  # sees that token, so the bias stays as the mask says.
  decoder = Decoder(
    layers=tuple(
      _decoder_layer(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), config)
      for i in range(config.num_layers)
    ),
    embedding=params["embed"]["embedding"],
    final_norm=params["final_norm"]["scale"][:, None],
    head=transformer.output_embedding(params).astype(config.dtype),
    lengths=jnp.sum(mask > 0, axis=-1, dtype=jnp.int32),
    bias=jnp.where(seen, 0.0, transformer.HIDDEN),
  )
  return decoder, _logits(decoder, hidden[:, -1].T), caches


def decode(
  decoder: Decoder,
  token: jax.Array,
  index: jax.Array,
  caches: Caches,
  *,
  config: transformer.TransformerConfig,
) -> tuple[jax.Array, Caches]:
  """Reads one more token a row: returns the logits `[B, V]` of the next one, and the caches.

  Args:
    decoder: from `start`.
    token: `[B]` ids.
    index: how many completion tokens came before.
    caches: from `start` or the step before.
    config: the shape of the model.
  """
  batch, span = token.shape[0], decoder.bias.shape[1]
  num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
  slot = span - (decoder.bias.shape[1] - index)
  del slot
  raise NotImplementedError
