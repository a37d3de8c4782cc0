"""The chunked log-likelihood against the plain one, and its memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from alignment import chunked_likelihood, sequences


def _inputs(shape=(2, 3), vocabulary=11, width=5, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  return (
    jax.random.normal(keys[0], (*shape, width), dtype),
    jax.random.normal(keys[1], (vocabulary, width), dtype),
    jax.random.randint(keys[2], shape, 0, vocabulary),
    jax.random.normal(keys[3], shape),  # cotangents
  )


def _plain(hidden, embedding, tokens, softcap=None):
  logits = jnp.einsum("btd,vd->btv", hidden, embedding, preferred_element_type=jnp.float32)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  return sequences.token_logps(logits, tokens)


@pytest.mark.parametrize(
  ("chunk_size", "softcap"),
  [(1, None), (4, None), (11, None), (100, None), (4, 6.0), (11, 6.0)],
)  # 4 does not divide 11, 100 exceeds it
def test_equals_the_plain_likelihood_forward_and_backward(chunk_size, softcap):
  hidden, embedding, tokens, cotangents = _inputs()
  hidden = hidden * 4  # logits of size 10: a wrong running maximum would show

  @jax.jit
  def both(hidden, embedding):
    chunked, pullback = jax.vjp(
      lambda h, e: chunked_likelihood.token_logps(
        h, e, tokens, chunk_size=chunk_size, softcap=softcap
      ),
      hidden, embedding,
    )  # fmt: skip
    plain, plain_pullback = jax.vjp(lambda h, e: _plain(h, e, tokens, softcap), hidden, embedding)
    return (chunked, *pullback(cotangents)), (plain, *plain_pullback(cotangents))

  chunked, plain = both(hidden, embedding)
  for ours, theirs in zip(chunked, plain, strict=True):
    # Float32 rounding of sums over 11 terms; the contract asks for 1e-5.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  assert np.abs(plain[2]).max() > 0.1


def test_gradient_is_that_of_finite_differences(x64):
  hidden, embedding, tokens, cotangents = _inputs(dtype=jnp.float64)

  @jax.jit
  def total(hidden, embedding):
    logps = chunked_likelihood.token_logps(hidden, embedding, tokens, chunk_size=4)
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


def test_bfloat16_accumulates_in_float32():
  hidden, embedding, tokens, _ = _inputs((2, 8), vocabulary=300, width=64, dtype=jnp.bfloat16)
  logps = chunked_likelihood.token_logps(hidden, embedding, tokens, chunk_size=128)
  assert logps.dtype == jnp.float32
  exact = _plain(hidden.astype(jnp.float32), embedding.astype(jnp.float32), tokens)
  # Inputs are the same numbers; products of bfloat16 are exact in float32, sums are float32's.
  np.testing.assert_allclose(logps, exact, rtol=1e-4, atol=1e-4)
  grads = jax.jit(
    jax.grad(
      lambda h, e: chunked_likelihood.token_logps(h, e, tokens, chunk_size=128).sum(), (0, 1)
    )
  )(hidden, embedding)
  exact_grads = jax.jit(jax.grad(lambda h, e: _plain(h, e, tokens).sum(), (0, 1)))(
    hidden.astype(jnp.float32), embedding.astype(jnp.float32)
  )
  for ours, theirs in zip(grads, exact_grads, strict=True):
    assert ours.dtype == jnp.bfloat16
    scale = np.abs(theirs).max()  # 2^-8 relative rounding of inputs and outputs
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * scale)


def test_rows_without_cotangent_pass_on_no_gradient_even_from_nan():
  hidden, embedding, tokens, _ = _inputs()
  hidden = hidden.at[0, 1].set(jnp.nan)
  mask = jnp.ones((2, 3)).at[0, 1].set(0)

  def total(hidden, embedding):
    logps = chunked_likelihood.token_logps(hidden, embedding, tokens, chunk_size=4)
    return sequences.sequence_logps(logps, mask, reduction="sum").sum()

  value, grads = jax.value_and_grad(total, (0, 1))(hidden, embedding)
  assert np.isfinite(value) and np.isfinite(grads[0]).all() and np.isfinite(grads[1]).all()
  np.testing.assert_array_equal(grads[0][0, 1], 0)


def test_works_under_vmap_and_scan():
  hidden, embedding, tokens, _ = _inputs()
  stacked = jnp.stack([hidden, 2 * hidden])
  batched = jax.vmap(
    lambda h: chunked_likelihood.token_logps(h, embedding, tokens, chunk_size=4)
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


def test_never_makes_batch_times_length_times_vocabulary():
  shape, vocabulary, width, chunk_size = (4, 16), 512, 8, 64
  hidden, embedding, tokens, _ = _inputs(shape, vocabulary, width)
  full = shape[0] * shape[1] * vocabulary

  def value_and_grads(function):
    def total(hidden, embedding):
      return function(hidden, embedding, tokens).sum()

    return jax.value_and_grad(total, (0, 1))

  def chunked(hidden, embedding, tokens):
    return chunked_likelihood.token_logps(hidden, embedding, tokens, chunk_size=chunk_size)

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


def test_rejects_bad_input():
  hidden, embedding, tokens, _ = _inputs()
  for chunk_size in (0, -3, 2.5, True):
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1"):
      chunked_likelihood.token_logps(hidden, embedding, tokens, chunk_size=chunk_size)
  with pytest.raises(ValueError, match="hidden and embedding"):
    chunked_likelihood.token_logps(hidden, embedding.T, tokens, chunk_size=2)
  with pytest.raises(ValueError, match="tokens must have shape"):
    chunked_likelihood.token_logps(hidden, embedding, tokens[:, :2], chunk_size=2)
  with pytest.raises(ValueError, match=r"tokens must lie in \[0, 11\), got 0 to 11"):
    chunked_likelihood.token_logps(hidden, embedding, np.array([[0, 11, 2]] * 2), chunk_size=2)


def test_one_pass_over_the_logits_gives_the_same_sum():
  """It runs on a GPU. A slice that overlaps the one before has entries of minus infinity."""
  logits = 30 * jax.random.normal(jax.random.key(0), (5, 40))
  logits = logits.at[1, :7].set(-jnp.inf).at[2].set(-jnp.inf)
  highest, total = jax.jit(chunked_likelihood._in_one_pass)(logits)
  np.testing.assert_allclose(
    highest + jnp.log(total), jax.nn.logsumexp(logits, axis=1).at[2].set(-jnp.inf), rtol=1e-6
  )


@pytest.mark.parametrize(
  ("stats", "expected"),
  [
    (None, 8192),  # a CPU
    ({"bytes_limit": 32 * 2**30}, 50_000),  # logits of 1.9 GiB in 4 GiB
    ({"bytes_limit": 2 * 2**30}, 8192),
    ({"bytes_limit": 8 * 2**30}, 26_112),  # 1 GiB, rounded down to a multiple of 128
  ],
)
def test_the_slice_of_the_vocabulary_follows_the_memory_of_the_device(monkeypatch, stats, expected):
  device = types.SimpleNamespace(memory_stats=lambda: stats)
  monkeypatch.setattr(sharding, "default_device", lambda: device)
  assert chunked_likelihood.chunk_size_for(10_240, 50_000) == expected
