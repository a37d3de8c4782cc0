"""Masks, reductions and the vocabulary-chunked log-likelihood."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import sequences


def _inputs(shape=(2, 3), vocabulary=11, width=5, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  return (
    jax.random.normal(keys[0], (*shape, width), dtype),
    jax.random.normal(keys[1], (vocabulary, width), dtype),
    jax.random.randint(keys[2], shape, 0, vocabulary),
    jax.random.normal(keys[3], shape),  # cotangents
  )


# --- token and sequence log-probabilities ---


def test_token_logps_restates_log_softmax(x64):
  rng = np.random.default_rng(0)
  logits, tokens = rng.normal(size=(2, 3, 4)) * 5, rng.integers(0, 4, (2, 3))
  expected = np.zeros((2, 3))
  for b in range(2):
    for t in range(3):
      expected[b, t] = logits[b, t, tokens[b, t]] - np.log(np.exp(logits[b, t]).sum())
  np.testing.assert_allclose(sequences.token_logps(logits, tokens), expected, rtol=1e-12)


def test_token_logps_of_bfloat16_logits_are_computed_in_float32():
  logits = jnp.array([[10.0, 3.0]], jnp.bfloat16)
  logps = sequences.token_logps(logits, jnp.array([0]))
  assert logps.dtype == jnp.float32
  np.testing.assert_allclose(logps, -np.log1p(np.exp(-7)), rtol=1e-3)  # bfloat16 gives 0


def test_enumerated_sequences_have_total_probability_one():
  params = jax.random.normal(jax.random.key(0), (ar.NUM_PREFIXES, 3))
  assert len({tuple(row) for row in ar.TOKENS[ar.MASK.all(1)]}) == 12  # of length 3
  np.testing.assert_allclose(jnp.exp(ar.all_logps(params)).sum(), 1, rtol=1e-5)


def test_reductions_by_hand():
  logps = jnp.array([[-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0]])
  mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
  np.testing.assert_array_equal(sequences.sequence_logps(logps, mask, reduction="sum"), [-3, -4])
  mean = sequences.sequence_logps(logps, mask, reduction="mean")
  np.testing.assert_array_equal(mean, [-1.5, -4])
  ratios = sequences.log_ratios(logps, mask, jnp.array([-5.0, -5.0]), reduction="mean")
  np.testing.assert_array_equal(ratios, [1.0, 1.0])  # the cached sum is divided by the same count
  as_bool = sequences.sequence_logps(logps, mask.astype(bool), reduction="mean")
  np.testing.assert_array_equal(as_bool, mean)


def test_the_reduction_has_no_default():
  with pytest.raises(TypeError, match="reduction"):
    sequences.sequence_logps(jnp.zeros((1, 2)), jnp.ones((1, 2)))
  with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', got 'avg'"):
    sequences.sequence_logps(jnp.zeros((1, 2)), jnp.ones((1, 2)), reduction="avg")
  with pytest.raises(ValueError, match="reduction must be one of"):
    sequences.log_ratios(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.zeros(1), reduction="avg")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("poison", [jnp.nan, -jnp.inf, jnp.inf])
def test_masked_positions_leak_neither_value_nor_gradient(reduction, poison):
  mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
  logps = jnp.where(mask > 0, -1.5, poison)

  def total(logps):
    return sequences.sequence_logps(logps, mask, reduction=reduction).sum()

  value, grad = jax.value_and_grad(total)(logps)
  np.testing.assert_array_equal(value, {"sum": -3, "mean": -1.5}[reduction])
  np.testing.assert_array_equal(grad[0], [*[{"sum": 1, "mean": 0.5}[reduction]] * 2, 0])
  np.testing.assert_array_equal(grad[1], 0)  # fully masked: finite, no gradient


@pytest.mark.parametrize("poison", [jnp.nan, -jnp.inf])
def test_non_finite_logits_under_the_mask_do_not_reach_the_gradient(poison):
  mask = jnp.array([[1.0, 0.0]])
  logits = jnp.array([[[1.0, 2.0], [poison, poison]]])

  def total(logits):
    logps = sequences.token_logps(logits, jnp.array([[0, 1]]), mask=mask)
    return sequences.sequence_logps(logps, mask, reduction="sum").sum()

  value, grad = jax.value_and_grad(total)(logits)
  np.testing.assert_allclose(value, -np.log1p(np.e), rtol=1e-6)
  assert np.isfinite(grad).all()
  np.testing.assert_array_equal(grad[0, 1], 0)
  assert abs(grad[0, 0]).min() > 0.1


def test_out_of_range_padding_ids_do_no_harm():
  """-100 is a common padding label; it may not turn the row into NaN."""
  logits = jnp.ones((1, 2, 3))
  mask = jnp.array([[1.0, 0.0]])

  def total(logits):
    logps = sequences.token_logps(logits, jnp.array([[0, -100]]))
    return sequences.sequence_logps(logps, mask, reduction="sum").sum()

  value, grad = jax.value_and_grad(total)(logits)
  np.testing.assert_allclose(value, -np.log(3), rtol=1e-6)
  np.testing.assert_array_equal(grad[0, 1], 0)


# --- masks from tokens ---


def test_eos_counts_where_pad_equals_eos():
  eos = pad = 2
  tokens = jnp.array([[5, 6, eos, pad], [eos, pad, pad, pad], [5, 6, 7, 8], [5, 6, 7, eos]])
  expected = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
  np.testing.assert_array_equal(sequences.completion_mask(tokens, eos), expected)
  np.testing.assert_array_equal(jax.jit(sequences.completion_mask)(tokens, eos), expected)


def test_tokens_after_the_first_eos_do_not_count():
  tokens = jnp.array([[5, 2, 6, 2]])
  np.testing.assert_array_equal(sequences.completion_mask(tokens, 2), [[1, 1, 0, 0]])


def test_mask_of_the_enumerated_sequences_is_recovered():
  np.testing.assert_array_equal(sequences.completion_mask(ar.TOKENS, ar.EOS), ar.MASK)


def test_ids_outside_the_vocabulary_are_an_error():
  with pytest.raises(ValueError, match=r"tokens must lie in \[0, 5\), got 9 to 9"):
    sequences.token_logps(jnp.zeros((1, 5)), np.array([9]))
  with pytest.raises(ValueError, match=r"tokens must lie in \[0, 3\)"):
    sequences.chunked_token_logps(
      jnp.ones((1, 1, 2)), jnp.ones((3, 2)), np.array([[7]]), chunk_size=2
    )


def test_flatten_samples_keeps_prompts_beside_their_samples():
  tokens = jnp.arange(12).reshape(2, 3, 2)
  rows = sequences.flatten_samples(tokens, tokens > 0, jnp.array([[7], [8]]), jnp.ones((2, 1)))
  np.testing.assert_array_equal(rows.tokens, np.arange(12).reshape(6, 2))
  assert sequences.rows_per_prompt(rows) == 3
  repeated = sequences.repeat_prompts(rows)
  np.testing.assert_array_equal(repeated.prompt_tokens[:, 0], [7, 7, 7, 8, 8, 8])
  np.testing.assert_array_equal(repeated.prompt_mask, np.ones((6, 1)))
  assert sequences.repeat_prompts(sequences.Sequences(tokens, tokens)).prompt_tokens is None
  with pytest.raises(ValueError, match="2 prompts do not divide 5 completions"):
    sequences.repeat_prompts(rows._replace(tokens=rows.tokens[:5]))
  with pytest.raises(ValueError, match="given together"):
    sequences.flatten_samples(tokens, tokens, jnp.ones((2, 1)))
  with pytest.raises(ValueError, match=r"\[B, K, T\]"):
    sequences.flatten_samples(tokens[0], tokens[0])


# --- chunked log-likelihood ---


def _plain(hidden, embedding, tokens):
  logits = jnp.einsum("btd,vd->btv", hidden, embedding, preferred_element_type=jnp.float32)
  return sequences.token_logps(logits, tokens)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])  # 4 does not divide 11, 100 exceeds it
def test_chunked_equals_plain_forward_and_backward(chunk_size):
  hidden, embedding, tokens, cotangents = _inputs()
  hidden = hidden * 4  # logits of size 10: a wrong running maximum would show

  @jax.jit
  def both(hidden, embedding):
    chunked, pullback = jax.vjp(
      lambda h, e: sequences.chunked_token_logps(h, e, tokens, chunk_size=chunk_size),
      hidden, embedding,
    )  # fmt: skip
    plain, plain_pullback = jax.vjp(lambda h, e: _plain(h, e, tokens), hidden, embedding)
    return (chunked, *pullback(cotangents)), (plain, *plain_pullback(cotangents))

  chunked, plain = both(hidden, embedding)
  for ours, theirs in zip(chunked, plain, strict=True):
    # Float32 rounding of sums over 11 terms; the contract asks for 1e-5.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  assert np.abs(plain[2]).max() > 0.1


def test_chunked_gradient_is_that_of_finite_differences(x64):
  hidden, embedding, tokens, cotangents = _inputs(dtype=jnp.float64)

  @jax.jit
  def total(hidden, embedding):
    logps = sequences.chunked_token_logps(hidden, embedding, tokens, chunk_size=4)
    return (logps * cotangents).sum()

  grads = jax.grad(total, (0, 1))(hidden, embedding)
  rng = np.random.default_rng(0)
  for _ in range(3):
    d_hidden, d_embedding = rng.normal(size=hidden.shape), rng.normal(size=embedding.shape)
    step = 1e-6
    difference = total(hidden + step * d_hidden, embedding + step * d_embedding) - total(
      hidden - step * d_hidden, embedding - step * d_embedding
    )
    slope = (grads[0] * d_hidden).sum() + (grads[1] * d_embedding).sum()
    np.testing.assert_allclose(difference / (2 * step), slope, rtol=1e-6)


def test_chunked_bfloat16_accumulates_in_float32():
  hidden, embedding, tokens, _ = _inputs((2, 8), vocabulary=300, width=64, dtype=jnp.bfloat16)
  logps = sequences.chunked_token_logps(hidden, embedding, tokens, chunk_size=128)
  assert logps.dtype == jnp.float32
  exact = _plain(hidden.astype(jnp.float32), embedding.astype(jnp.float32), tokens)
  # Inputs are the same numbers; products of bfloat16 are exact in float32, sums are float32's.
  np.testing.assert_allclose(logps, exact, rtol=1e-4, atol=1e-4)
  grads = jax.jit(
    jax.grad(lambda h, e: sequences.chunked_token_logps(h, e, tokens, chunk_size=128).sum(), (0, 1))
  )(hidden, embedding)
  exact_grads = jax.jit(jax.grad(lambda h, e: _plain(h, e, tokens).sum(), (0, 1)))(
    hidden.astype(jnp.float32), embedding.astype(jnp.float32)
  )
  for ours, theirs in zip(grads, exact_grads, strict=True):
    assert ours.dtype == jnp.bfloat16
    scale = np.abs(theirs).max()  # 2^-8 relative rounding of inputs and outputs
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * scale)


def test_chunked_rows_without_cotangent_hand_on_nothing_even_from_nan():
  hidden, embedding, tokens, _ = _inputs()
  hidden = hidden.at[0, 1].set(jnp.nan)
  mask = jnp.ones((2, 3)).at[0, 1].set(0)

  def total(hidden, embedding):
    logps = sequences.chunked_token_logps(hidden, embedding, tokens, chunk_size=4)
    return sequences.sequence_logps(logps, mask, reduction="sum").sum()

  value, grads = jax.value_and_grad(total, (0, 1))(hidden, embedding)
  assert np.isfinite(value) and np.isfinite(grads[0]).all() and np.isfinite(grads[1]).all()
  np.testing.assert_array_equal(grads[0][0, 1], 0)


def test_chunked_works_under_vmap_and_scan():
  hidden, embedding, tokens, _ = _inputs()
  stacked = jnp.stack([hidden, 2 * hidden])
  batched = jax.vmap(
    lambda h: sequences.chunked_token_logps(h, embedding, tokens, chunk_size=4)
  )(stacked)  # fmt: skip
  for ours, h in zip(batched, stacked, strict=True):
    np.testing.assert_allclose(ours, _plain(h, embedding, tokens), rtol=1e-5, atol=1e-5)


def _largest(jaxpr):
  """The largest number of elements of any intermediate, inner programs included."""
  largest = 0
  for equation in jaxpr.eqns:
    largest = max([largest, *(np.prod(v.aval.shape, dtype=int) for v in equation.outvars)])
    for inner in jax.tree.leaves(tuple(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        largest = max(largest, _largest(inner))
  return largest


def test_chunked_never_makes_batch_times_length_times_vocabulary():
  shape, vocabulary, width, chunk_size = (4, 16), 512, 8, 64
  hidden, embedding, tokens, _ = _inputs(shape, vocabulary, width)
  full = shape[0] * shape[1] * vocabulary

  def value_and_grads(function):
    def total(hidden, embedding):
      return function(hidden, embedding, tokens).sum()

    return jax.value_and_grad(total, (0, 1))

  def chunked(hidden, embedding, tokens):
    return sequences.chunked_token_logps(hidden, embedding, tokens, chunk_size=chunk_size)

  sizes = [
    _largest(jax.make_jaxpr(value_and_grads(function))(hidden, embedding).jaxpr)
    for function in (chunked, _plain)
  ]
  assert sizes[0] <= max(full * chunk_size // vocabulary, vocabulary * width) < full <= sizes[1]
  # And the compiler does not undo it: all temporaries together stay below one [B, T, V] array.
  temporaries = [
    jax.jit(value_and_grads(function)).lower(hidden, embedding).compile().memory_analysis()
    for function in (chunked, _plain)
  ]
  assert temporaries[0].temp_size_in_bytes < 4 * full <= temporaries[1].temp_size_in_bytes


def test_chunked_rejects_bad_input():
  hidden, embedding, tokens, _ = _inputs()
  for chunk_size in (0, -3, 2.5, True):
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1"):
      sequences.chunked_token_logps(hidden, embedding, tokens, chunk_size=chunk_size)
  with pytest.raises(ValueError, match="hidden and embedding"):
    sequences.chunked_token_logps(hidden, embedding.T, tokens, chunk_size=2)
  with pytest.raises(ValueError, match="tokens must have shape"):
    sequences.chunked_token_logps(hidden, embedding, tokens[:, :2], chunk_size=2)


def test_shapes_that_do_not_fit_raise():
  with pytest.raises(ValueError, match="tokens must have shape"):
    sequences.token_logps(jnp.zeros((2, 3, 4)), jnp.zeros((2, 2), int))
  with pytest.raises(ValueError, match="mask must have shape"):
    sequences.token_logps(jnp.zeros((2, 4)), jnp.zeros(2, int), mask=jnp.ones(3))
  with pytest.raises(ValueError, match=r"token_logps \[2, 3\], mask \[2, 2\]"):
    sequences.sequence_logps(jnp.zeros((2, 3)), jnp.ones((2, 2)), reduction="sum")
  with pytest.raises(ValueError, match="ref_logps must have shape"):
    sequences.log_ratios(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.zeros(3), reduction="sum")
