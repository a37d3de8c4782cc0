"""Code shared by all runs on the language of digits: decoder, held-out prompts, offline pairs."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignment import sequences, srpo
from alignment.models import sampling, scalar_head, transformer
from experiments.data import digits
from experiments.tasks import digit_methods


def network_of(config: Any) -> transformer.TransformerConfig:
  """Returns the decoder's config."""
  width, head_dim = config.network.width, 16
  if width < head_dim or width % head_dim:
    raise ValueError(f"config.network.width must be a multiple of {head_dim}, got {width}")
  return transformer.TransformerConfig(
    vocab_size=digits.VOCAB_SIZE,
    num_layers=config.network.num_layers,
    width=width,
    num_heads=width // head_dim,
    num_kv_heads=width // head_dim,
    head_dim=head_dim,
    mlp_width=3 * width,
    max_length=digits.REVISION_LENGTH + digits.LENGTH,
  )


def generate_fn(network: transformer.TransformerConfig) -> Callable[..., Any]:
  """Returns a `sequences.SampleFn` at temperature 1."""
  return functools.partial(
    sampling.generate,
    config=network,
    max_new_tokens=digits.LENGTH,
    eos_id=digits.EOS,
    pad_id=digits.PAD,
  )


def sample_rows(
  network: transformer.TransformerConfig, params: Any, config: Any, name: str
) -> sequences.Sequences:
  """Samples an answer to each held-out prompt. `name` seeds the draws, so each run has its own."""
  key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
  return sequences.sample(params, test_prompts(config), key, sample_fn=generate_fn(network))


def test_prompts(config: Any) -> sequences.Prompts:
  """Returns the held-out prompts, drawn from a hundred million with a key of their own."""
  key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"test prompts"))
  return digits.prompts(key, config.eval.num_prompts)


def make_data(
  config: Any, ref_params: Any, reward_params: Any, preference_params: Any = None
) -> digit_methods.Data:
  """Draws the offline pairs from the reference and labels them. All methods train on these."""
  network, num_prompts = network_of(config), config.data.num_prompts
  apply_fn, generate = transformer.make_apply_fn(network), generate_fn(network)
  chunk = next(size for size in range(min(num_prompts, 2000), 0, -1) if num_prompts % size == 0)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), 3)
  prompts = digits.prompts(keys[0], num_prompts)

  @functools.partial(jax.jit, static_argnums=0)
  def in_chunks(function, *args):
    """Maps `function(key, *rows)` over all prompts, `chunk` rows at a time."""
    cut = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), args)
    out = jax.lax.map(
      lambda part: function(*part), (jax.random.split(keys[1], num_prompts // chunk), *cut)
    )
    return jax.tree.map(lambda leaf: leaf.reshape(num_prompts, *leaf.shape[2:]), out)

  def draw(key, tokens, mask):
    drawn = generate(ref_params, tokens, mask, key, num_samples=2)
    return jax.tree.map(lambda leaf: leaf.reshape(chunk, 2, *leaf.shape[1:]), drawn)

  samples = in_chunks(draw, *prompts)

  def sums(rows, num_answers):
    logps = sequences.sequence_logps(apply_fn(ref_params, rows), rows.mask, reduction="sum")
    return logps.reshape(chunk, num_answers)

  def six_sums(first, second):
    shown = [*digits.revision_prompts(first), *digits.revision_prompts(second)]
    fields: list[Any] = [*first[:2], *second[:2], None, *first[2:], *shown]
    return sums(srpo.six_sequences(srpo.Batch(*fields)), 6)

  def rewrite(key, tokens, mask, is_rewritten, prompt_tokens, prompt_mask):
    prompts = sequences.Prompts(prompt_tokens, prompt_mask)
    first = sequences.Sequences(tokens[:, 0], mask[:, 0], *prompts)
    drawn = generate(
      ref_params, *digits.revision_prompts(first), jax.random.fold_in(key, 1), num_samples=1
    )
    new_tokens, new_mask = (
      jnp.where(is_rewritten[:, None], new, old[:, 1])
      for new, old in zip((drawn.tokens, drawn.mask), (tokens, mask), strict=True)
    )
    rows = sequences.Sequences(new_tokens, new_mask, *prompts)
    return rows.tokens, rows.mask, six_sums(first, rows), digits.quality(rows)

  def score(key, tokens, mask, next_tokens, next_mask, prompt_tokens, prompt_mask):
    del key
    prompts = (prompt_tokens, prompt_mask)
    first, second = (sequences.Sequences(tokens[:, i], mask[:, i], *prompts) for i in (0, 1))
    six = six_sums(first, second)
    mismatched = sums(sequences.Sequences(next_tokens, next_mask, *prompts), 1)
    fitted = jnp.zeros((chunk, 2))
    if reward_params is not None:
      score_fn = scalar_head.make_apply_fn(network)
      fitted = jnp.stack([score_fn(reward_params, rows) for rows in (first, second)], axis=1)
    return six, mismatched[:, 0], fitted, digits.quality(first), digits.quality(second)

  following = (jnp.roll(samples.tokens[:, 0], -1, axis=0), jnp.roll(samples.mask[:, 0], -1, axis=0))
  six, mismatched, fitted, first, second = in_chunks(
    score, samples.tokens, samples.mask, *following, *prompts
  )
  is_rewritten = jnp.arange(num_prompts) % 2 == 1
  *others, rewritten_ref_logps, third = in_chunks(
    rewrite, samples.tokens, samples.mask, is_rewritten, *prompts
  )
  tokens, mask = (
    jnp.stack([each[:, 0], other], axis=1)
    for each, other in zip((samples.tokens, samples.mask), others, strict=True)
  )
  # Both judges use the same uniform number for a pair: where they agree, their labels agree too.
  uniform = jax.random.uniform(keys[2], (num_prompts,))
  rewards = jnp.stack([first.rewards, second.rewards], axis=1)
  first_wins, first_beats_rewrite = (
    jnp.stack([uniform < digits.preferences(first, other, judge) for judge in (False, True)])
    for other in (second, third)
  )
  judged = digit_methods.Judged(
    intransitive=jnp.array([False, True]),
    first_wins=first_wins,
    scores=jnp.stack([rewards, fitted]),
    first_beats_rewrite=first_beats_rewrite,
  )
  return digit_methods.Data(
    prompts=prompts,
    tokens=samples.tokens,
    mask=samples.mask,
    ref_logps=six[:, :2],
    srpo_ref_logps=six,
    mismatched_ref_logps=mismatched,
    rewritten=digit_methods.Rewritten(tokens, mask, rewritten_ref_logps),
    ref_params=ref_params,
    reward_params=reward_params,
    preference_params=preference_params,
    judged=judged,
  )
