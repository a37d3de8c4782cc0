"""Masks, reductions, prompts and what is refused."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import sequences

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


def test_first_of_several_end_tokens_counts():
  tokens = jnp.array([[5, 3, 6, 2], [2, 3, 2, 2], [5, 6, 7, 8]])
  expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
  np.testing.assert_array_equal(sequences.completion_mask(tokens, (2, 3)), expected)


def test_mask_of_the_enumerated_sequences_is_recovered():
  np.testing.assert_array_equal(sequences.completion_mask(ar.TOKENS, ar.EOS), ar.MASK)


def test_ids_outside_the_vocabulary_are_an_error():
  with pytest.raises(ValueError, match=r"tokens must lie in \[0, 5\), got 9 to 9"):
    sequences.token_logps(jnp.zeros((1, 5)), np.array([9]))


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


def test_shapes_that_do_not_fit_raise():
  with pytest.raises(ValueError, match="tokens must have shape"):
    sequences.token_logps(jnp.zeros((2, 3, 4)), jnp.zeros((2, 2), int))
  with pytest.raises(ValueError, match="mask must have shape"):
    sequences.token_logps(jnp.zeros((2, 4)), jnp.zeros(2, int), mask=jnp.ones(3))
  with pytest.raises(ValueError, match=r"token_logps \[2, 3\], mask \[2, 2\]"):
    sequences.sequence_logps(jnp.zeros((2, 3)), jnp.ones((2, 2)), reduction="sum")
  with pytest.raises(ValueError, match="ref_logps must have shape"):
    sequences.log_ratios(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.zeros(3), reduction="sum")
