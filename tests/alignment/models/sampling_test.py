"""Sampling: the distribution is the model's, and padding, bucket and neighbours change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import nash_md, sequences
from alignment.models import sampling, transformer, transformer_decoding

CONFIG = transformer.TransformerConfig(
  vocab_size=29,
  num_layers=2,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_width=20,
  max_length=32,
)
NEVER = -1  # an EOS id that no token has
LENGTH = 7


@functools.partial(jax.jit, static_argnames="config")
def far_params(config, seed=1):
  """Parameters large enough for a distribution far from uniform."""
  fresh = transformer.init_params(config, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(seed), 99))
  return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), fresh)


@pytest.fixture(scope="module")
def params():
  return far_params(CONFIG)


@pytest.fixture(scope="module")
def prompts():
  """Three prompts of 5, 3 and 1 tokens, padded on the left with an id that also occurs in text."""
  tokens = jnp.array([[3, 1, 4, 1, 5], [2, 2, 9, 2, 6], [2, 2, 2, 2, 7]])
  mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
  return tokens, mask


def generate(params, prompts, seed=0, **kwargs):
  kwargs = {"config": CONFIG, "max_new_tokens": LENGTH, "eos_id": NEVER, "pad_id": 2} | kwargs
  return sampling.generate(params, *prompts, jax.random.key(seed), **kwargs)


def teacher_forced(params, prompts, samples, config=CONFIG):
  apply_fn = transformer.make_apply_fn(config, logps_chunk=16)
  batch = sequences.Sequences(samples.tokens, samples.mask, *prompts)
  return jax.jit(apply_fn)(params, batch)


@pytest.mark.parametrize(
  ("temperature", "changes"),
  [
    (0.7, {}),
    pytest.param(0.0, {}, marks=pytest.mark.slow),
    pytest.param(0.7, {"rope_pairing": "adjacent", "num_kv_heads": 4}, marks=pytest.mark.slow),
    pytest.param(0.0, {"tied_head": False, "num_kv_heads": 1}, marks=pytest.mark.slow),
    pytest.param(0.7, {"scan_layers": False, "remat": True}, marks=pytest.mark.slow),
  ],
)
def test_logps_equal_a_teacher_forced_pass(changes, temperature, prompts):
  config = dataclasses.replace(CONFIG, **changes)
  params = far_params(config)
  samples = generate(params, prompts, config=config, temperature=temperature, top_k=20, top_p=0.9)
  want = teacher_forced(params, prompts, samples, config)
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(samples.logps, want, atol=1e-5)  # the bound that the docs promise


def test_greedy_is_the_argmax_of_a_teacher_forced_pass(params, prompts):
  samples = generate(params, prompts, temperature=0.0)
  tokens = jnp.concatenate([prompts[0], samples.tokens], axis=1)
  mask = jnp.concatenate([prompts[1], samples.mask.astype(jnp.int32)], axis=1)
  logits = transformer.logits(params, tokens, mask, config=CONFIG)[:, 4:-1]
  np.testing.assert_array_equal(samples.tokens, jnp.argmax(logits, axis=-1))


def test_left_and_right_padding_give_the_same(params, prompts):
  tokens, mask = prompts
  lengths = mask.sum(1)
  right = jnp.stack([jnp.roll(row, n) for row, n in zip(tokens, lengths, strict=True)])
  right_mask = jnp.arange(5)[None] < lengths[:, None]
  for temperature in (0.0, 1.0):
    left = generate(params, prompts, temperature=temperature)
    got = generate(params, (right, right_mask), temperature=temperature)
    np.testing.assert_array_equal(got.tokens, left.tokens)


def test_a_longer_bucket_changes_nothing(params, prompts):
  wide = tuple(jnp.pad(x, [(0, 0), (4, 0)]) for x in prompts)
  want, got = generate(params, prompts), generate(params, wide)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)


def test_rows_are_independent(params, prompts):
  """Row b draws the same with other rows beside it, behind it or none."""
  want = generate(params, prompts).tokens
  tokens, mask = prompts
  other = (tokens.at[2].set(8), mask)
  np.testing.assert_array_equal(generate(params, other).tokens[:2], want[:2])
  np.testing.assert_array_equal(generate(params, (tokens[:2], mask[:2])).tokens, want[:2])


@pytest.mark.slow
def test_several_samples_of_a_prompt_are_those_of_repeated_prompts(params, prompts):
  got = generate(params, prompts, num_samples=2)
  want = generate(params, [jnp.repeat(x, 2, axis=0) for x in prompts])
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
  assert (got.tokens[::2] != got.tokens[1::2]).any(1).all()  # not one sample twice


def test_the_same_key_gives_the_same_and_another_another(params, prompts):
  np.testing.assert_array_equal(generate(params, prompts).tokens, generate(params, prompts).tokens)
  assert np.any(generate(params, prompts, seed=1).tokens != generate(params, prompts).tokens)


def test_eos_counts_and_padding_follows(params, prompts):
  free = generate(params, prompts)
  eos_id = int(free.tokens[0, 2])
  samples = generate(params, prompts, eos_id=eos_id, pad_id=0)
  for row, row_mask, logps, want in zip(*samples, free.tokens, strict=True):
    ends = np.flatnonzero(np.asarray(want) == eos_id)
    length = ends[0] + 1 if ends.size else LENGTH
    np.testing.assert_array_equal(row_mask, np.arange(LENGTH) < length)
    np.testing.assert_array_equal(row[:length], want[:length])
    np.testing.assert_array_equal(row[length:], 0)
    np.testing.assert_array_equal(logps[length:], 0.0)
  assert samples.mask[0].sum() < LENGTH


def test_any_of_several_end_tokens_ends(params, prompts):
  free = generate(params, prompts)
  ends = (int(free.tokens[0, 2]), int(free.tokens[1, 1]), -1)
  samples = generate(params, prompts, eos_id=ends, pad_id=0)
  mask = sequences.completion_mask(free.tokens, ends)
  np.testing.assert_array_equal(samples.mask, mask)
  np.testing.assert_array_equal(samples.tokens, jnp.where(mask > 0, free.tokens, 0))
  assert mask[0].sum() <= 3 and mask[1].sum() <= 2


def test_eos_may_be_the_padding_id(params, prompts):
  eos_id = int(generate(params, prompts).tokens[0, 2])
  samples = generate(params, prompts, eos_id=eos_id, pad_id=eos_id)
  np.testing.assert_array_equal(samples.mask, sequences.completion_mask(samples.tokens, eos_id))


def test_the_loop_stops_when_all_rows_ended(params, prompts, monkeypatch):
  """What the first token ends takes no further step, at any max_new_tokens."""
  steps, decode = [], transformer_decoding.decode

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return decode(*args, **kwargs)

  monkeypatch.setattr(transformer_decoding, "decode", counted)
  one = (prompts[0][:1], prompts[1][:1])
  # max_new_tokens of no other test, so that the counting program is compiled, and never reused
  free = generate(params, one, temperature=0.0, max_new_tokens=9)
  jax.effects_barrier()
  assert len(steps) == 8
  steps.clear()
  eos_id = int(free.tokens[0, 0])
  samples = generate(params, one, temperature=0.0, max_new_tokens=9, eos_id=eos_id)
  jax.effects_barrier()
  assert not steps
  np.testing.assert_array_equal(samples.mask, [[1] + [0] * 8])


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [
    pytest.param(*setting, marks=() if setting == (2.0, 5, 0.7) else pytest.mark.slow)
    for setting in ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (2.0, 5, 0.7))
  ],
)
def test_frequencies_are_the_softmax(params, temperature, top_k, top_p):
  """Pearson's statistic of 20,000 first tokens, and no token outside the support."""
  count = 20_000
  prompt = jnp.tile(jnp.array([[3, 1, 4]]), (count, 1))
  settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
  samples = generate(params, (prompt, prompt > 0), max_new_tokens=1, **settings)
  logits = transformer.logits(params, prompt[:1], prompt[:1] > 0, config=CONFIG)[0, -1]
  probs = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
  order = np.argsort(-probs)
  if top_k:  # first, and top-p in what is left
    probs[order[top_k:]] = 0
  before = np.cumsum(probs[order]) / probs.sum() - probs[order] / probs.sum()
  probs[order[before >= top_p]] = 0
  probs /= probs.sum()
  observed = np.bincount(np.asarray(samples.tokens[:, 0]), minlength=CONFIG.vocab_size)
  assert observed[probs == 0].sum() == 0
  likely = probs * count >= 5  # the usual condition; the others are pooled
  expected = np.append(probs[likely], probs[~likely].sum()) * count
  observed = np.append(observed[likely], observed[~likely].sum())
  statistic = np.sum((observed - expected) ** 2 / np.maximum(expected, 1e-9))
  # Under the right distribution the mean is the degrees of freedom and the deviation sqrt(2 df):
  # four deviations are one in ten thousand, and the seed is fixed.
  freedom = int((expected > 1e-9).sum()) - 1
  assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_a_draw_over_a_large_vocabulary_is_exact():
  """Cumulative sums over 49,152 weights: neither the tail nor the head is lost to rounding."""
  size, count = 49_152, 5_000
  rng = np.random.default_rng(0)
  weights = np.where(rng.random(size) < 0.3, rng.exponential(size=size), 0.0).astype(np.float32)
  weights[-size // 4 :] *= 0.1
  uniforms = jnp.asarray(rng.random((count, 2)), jnp.float32)
  draw = jax.jit(lambda u: sampling.draw(jnp.broadcast_to(weights, (u.shape[0], size)), u))
  indices = np.concatenate([draw(part) for part in jnp.split(uniforms, 50)])
  assert np.all(weights[indices] > 0)
  groups = np.arange(size) // (size // 16)
  expected = np.bincount(groups, weights) / weights.sum(dtype=np.float64) * count
  observed = np.bincount(groups[indices], minlength=16)
  statistic = np.sum((observed - expected) ** 2 / expected)
  assert statistic < 15 + 4 * np.sqrt(30)  # 15 degrees of freedom, four deviations


def test_a_draw_never_has_probability_zero():
  """The ends of the unit interval, where rounding could step over."""
  weights = jnp.array([[0.0, 0.0, 1e-30, 0.0, 1.0, 0.0], [0.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
  ends = [0.0, np.float32(1 - 2**-24)]
  for first in ends:
    for second in ends:
      indices = np.asarray(sampling.draw(weights, jnp.tile(jnp.array([[first, second]]), (2, 1))))
      assert np.all(np.asarray(weights)[[0, 1], indices] > 0)


def test_new_values_do_not_recompile(params, prompts):
  generate(params, prompts, top_k=3, top_p=0.5, temperature=0.9)
  before = sampling._generate._cache_size()
  tokens, mask = prompts
  generate(
    params, (tokens[::-1], mask[::-1]), seed=4, top_k=4, top_p=0.6, temperature=1.1, eos_id=5
  )
  assert sampling._generate._cache_size() == before


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_logps_are_those_of_the_training_pass(params, prompts, param_dtype):
  config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype=param_dtype)
  params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
  samples = generate(params, prompts, config=config, num_samples=2)
  assert samples.logps.dtype == jnp.float32
  want = teacher_forced(params, prompts, samples, config)
  # The same products: only the float32 sums over the vocabulary are taken in other slices.
  np.testing.assert_allclose(samples.logps, want, atol=1e-5)
  exact = teacher_forced(params, prompts, samples)
  assert np.abs(samples.logps - exact).max() > 1e-3  # really another precision


def test_bfloat16_logits_are_sums_in_float32(params, prompts):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  start = functools.partial(transformer_decoding.start, config=config, max_new_tokens=2)
  decoder, first, caches = jax.jit(start)(params, *prompts)
  token = jnp.array([3, 4, 5])
  second = jax.jit(functools.partial(transformer_decoding.decode, config=config))(
    decoder, token, jnp.int32(5), caches
  )[0]
  tokens = jnp.concatenate([prompts[0], token[:, None]], axis=1)
  mask = jnp.concatenate([prompts[1], jnp.ones((3, 1), int)], axis=1)
  want = transformer.logits(params, tokens, mask, config=config)[:, 4:]
  for got in (first, second, want):
    assert got.dtype == jnp.float32
    assert np.any(got.astype(jnp.bfloat16) != got)  # more bits than bfloat16 has
  # Logits of size 4 rounded to bfloat16 would be up to 0.008 off each. Hidden states are rounded to
  # 8 bits where two layers round their sums otherwise.
  np.testing.assert_allclose(jnp.stack([first, second], 1), want, atol=0.05)


def test_an_empty_prompt_conditions_as_a_start_token_does(params, prompts):
  tokens, mask = prompts
  want = generate(params, prompts)
  empty = (tokens, mask.at[2].set(0))  # its last token is the one real token of the row
  samples = generate(params, empty)
  np.testing.assert_array_equal(samples.tokens, want.tokens)
  np.testing.assert_allclose(samples.logps, want.logps, atol=1e-6)
  scored = teacher_forced(params, empty, samples)
  np.testing.assert_allclose(scored, teacher_forced(params, prompts, want), atol=1e-6)
  # Two completions of each prompt take the other path through the model.
  twice = sequences.Sequences(*(jnp.repeat(x, 2, axis=0) for x in samples[:2]), *empty)
  np.testing.assert_allclose(
    transformer.make_apply_fn(CONFIG)(params, twice)[::2], scored, atol=1e-5
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"max_new_tokens": 28}, r"\(5 a row\) and max_new_tokens \(28\) exceed max_length \(32\)"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"eos_id": 29}, "eos_id"),
    ({"eos_id": [1, 29]}, r"eos_id \(1, 29\)"),
    ({"pad_id": -1}, "pad_id"),
  ],
)
def test_bad_settings_name_the_argument(params, prompts, settings, message):
  with pytest.raises(ValueError, match=message):
    generate(params, prompts, **settings)


def test_bad_prompts_are_an_error(params, prompts):
  tokens, mask = prompts
  with pytest.raises(ValueError, match=r"prompt_tokens must lie in \[0, 29\), got 1 to 29"):
    generate(params, (tokens.at[0, 0].set(29), mask))
  with pytest.raises(ValueError, match=r"got \[3, 5\] and \[3, 4\]"):
    generate(params, (tokens, mask[:, 1:]))


def test_real_logps_equal_a_teacher_forced_pass(smollm2):
  words = smollm2.tokenizer
  prompts = [words.encode(text)[:5] for text in ("The soup was cold, but", "My neighbour told me")]
  length = min(map(len, prompts))
  tokens = jnp.array([row[:length] for row in prompts])
  mask = jnp.ones(tokens.shape)
  samples = sampling.generate(
    smollm2.params, tokens, mask, jax.random.key(0), config=smollm2.config, max_new_tokens=8,
    num_samples=2, eos_id=words.eos_id, pad_id=words.pad_id,
  )  # fmt: skip
  batch = sequences.Sequences(samples.tokens, samples.mask, tokens, mask)
  want = jax.jit(transformer.make_apply_fn(smollm2.config))(smollm2.params, batch)
  # Thirty layers of float32 sums in another order; 1e-5 holds on the small model above.
  np.testing.assert_allclose(samples.logps * samples.mask, want * samples.mask, atol=2e-4)


def test_no_samples_are_an_error(params, prompts):
  with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
    generate(params, prompts, num_samples=0)


def test_bucket_length():
  assert [sampling.bucket_length(n, 16) for n in (1, 16, 17)] == [16, 16, 32]
  with pytest.raises(ValueError, match="multiple"):
    sampling.bucket_length(3, 0)


def mix(params, other, prompts, beta, **kwargs):
  kwargs = {"ref_params": other, "mixture_fn": nash_md.geometric_mixture_logits} | kwargs
  return generate(params, prompts, beta=beta, **kwargs)


@pytest.mark.slow
def test_a_mixture_at_its_ends_is_one_of_its_models(params, prompts):
  other = far_params(CONFIG, seed=5)
  for beta, alone in ((0.0, params), (1.0, other)):
    mixed, plain = mix(params, other, prompts, beta), generate(alone, prompts)
    np.testing.assert_array_equal(mixed.tokens, plain.tokens)
    np.testing.assert_allclose(mixed.logps, plain.logps, atol=1e-6)
  assert not np.array_equal(generate(params, prompts).tokens, generate(other, prompts).tokens)


def test_logps_of_a_mixture_are_those_of_every_token_of_it(params, prompts):
  """Both caches are right: a teacher-forced pass of both models, mixed at each position."""
  other, beta = far_params(CONFIG, seed=5), 0.3
  samples = mix(params, other, prompts, beta, num_samples=2)
  tokens, mask = (jnp.repeat(x, 2, axis=0) for x in prompts)
  tokens = jnp.concatenate([tokens, samples.tokens], axis=1)
  mask = jnp.concatenate([mask, samples.mask.astype(int)], axis=1)
  both = [transformer.logits(p, tokens, mask, config=CONFIG) for p in (params, other)]
  mixed = nash_md.geometric_mixture_logits(*both, beta=beta)[:, prompts[0].shape[1] - 1 : -1]
  np.testing.assert_allclose(samples.logps, sequences.token_logps(mixed, samples.tokens), atol=1e-5)


def test_a_new_weight_of_the_mixture_compiles_nothing(params, prompts):
  other = far_params(CONFIG, seed=5)
  mix(params, other, prompts, 0.5)
  compiled = sampling._generate._cache_size()
  mix(params, other, prompts, 0.125)
  assert sampling._generate._cache_size() == compiled


def test_half_a_mixture_is_refused(params, prompts):
  with pytest.raises(ValueError, match="ref_params, mixture_fn and beta"):
    generate(params, prompts, ref_params=params)
  with pytest.raises(ValueError, match="ref_params, mixture_fn and beta"):
    generate(params, prompts, beta=0.5)
  for beta in (1.5, -0.1, float("nan")):
    with pytest.raises(ValueError, match="beta must lie in"):
      mix(params, params, prompts, beta)
