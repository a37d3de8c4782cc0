"""KTO against hand numbers, a NumPy re-statement, and what it is known to do to a policy."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment import sequences
from alignment.baselines import kto


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_worked_losses():
  losses = kto.kto_loss(
    jnp.array([2.0, 2.0]), jnp.array([1, 0]), beta=0.5, kl=1.0,
    desirable_weight=1.5, undesirable_weight=2.0,
  )  # fmt: skip
  np.testing.assert_allclose(losses, [1.5 * (1 - 0.622459), 2 * 0.622459], rtol=1e-5)


def test_equals_numpy():
  rng = np.random.default_rng(0)
  ratios, labels, kl = rng.normal(size=50) * 3, rng.integers(0, 2, 50), 0.7
  want = [
    1.2 * (1 - sigmoid(0.3 * (r - kl))) if label else 0.9 * (1 - sigmoid(0.3 * (kl - r)))
    for r, label in zip(ratios, labels, strict=True)
  ]
  got = kto.kto_loss(ratios, labels, beta=0.3, kl=kl, desirable_weight=1.2, undesirable_weight=0.9)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_far_log_ratios_saturate_without_overflow():
  far = jnp.array([1e6, -1e6, 1e6, -1e6])
  labels = jnp.array([1, 1, 0, 0])
  value, gradient = jax.value_and_grad(
    lambda x: kto.kto_loss(x, labels, beta=0.1, kl=0.0).sum()
  )(far)  # fmt: skip
  assert value == 2.0 and np.all(gradient == 0)


def test_point_of_reference_has_no_gradient_and_is_not_negative():
  def total(kl):
    return kto.kto_loss(jnp.array([0.5]), jnp.array([1]), beta=0.5, kl=kl).sum()

  assert jax.grad(total)(1.0) == 0
  assert total(-3.0) == total(0.0)


def _batch(rng, num_rows=6, num_arms=4):
  tokens = rng.integers(0, num_arms, (num_rows, 1))
  ones = np.ones((num_rows, 1), np.float32)
  ref_logps = np.full(num_rows, np.log(0.25))
  return kto.Batch(
    tokens, ones, ref_logps, rng.integers(0, 2, num_rows), np.roll(tokens, 1, 0), ones, ref_logps
  )


def test_loss_takes_its_reference_point_from_the_mismatched_completions(x64):
  rng = np.random.default_rng(1)
  batch, params = _batch(rng), jnp.array([2.0, 0.0, -1.0, 0.5])
  logps = np.asarray(jax.nn.log_softmax(params))
  value, (metrics, _) = kto.loss(
    params, None, batch, None, apply_fn=ar.arm_apply_fn, config=kto.Config(beta=0.5)
  )
  kl = max(0.0, np.mean(logps[batch.mismatched_tokens[:, 0]] - np.log(0.25)))
  want = kto.kto_loss(logps[batch.tokens[:, 0]] - np.log(0.25), batch.labels, beta=0.5, kl=kl)
  np.testing.assert_allclose(value, np.mean(want), rtol=1e-12)
  np.testing.assert_allclose(metrics["kto/kl"], kl, atol=1e-12)


def test_no_gradient_through_the_mismatched_pass(x64):
  """The gradient is that of the loss with z held fixed."""
  rng = np.random.default_rng(2)
  batch, params = _batch(rng), jnp.array([1.0, 0.3, -1.0, 0.5])
  options = {"apply_fn": ar.arm_apply_fn, "config": kto.Config(beta=0.5)}
  _, (metrics, _) = kto.loss(params, None, batch, None, **options)
  got = jax.grad(lambda p: kto.loss(p, None, batch, None, **options)[0])(params)

  def frozen(params):
    rows = sequences.Sequences(batch.tokens, batch.mask)
    ratios = ar.arm_apply_fn(params, rows)[:, 0] - batch.ref_logps
    return kto.kto_loss(ratios, batch.labels, beta=0.5, kl=metrics["kto/kl"]).mean()

  np.testing.assert_allclose(got, jax.grad(frozen)(params), atol=1e-14)


def test_often_bad_arms_vanish_and_the_others_do_not(x64):
  """The optimum is not exp(reward / beta): arms that are mostly bad are driven out."""
  rates = np.array([0.9, 0.6, 0.4, 0.1])  # how often each arm is desirable
  arms = np.arange(4)[:, None]
  ones = np.ones((4, 1), np.float32)
  uniform = np.full(4, np.log(0.25))
  # Labels between 0 and 1 mix the two losses: the exact expectation over labels.
  batch = kto.Batch(arms, ones, uniform, rates, arms, ones, uniform)
  params, _ = ar.train(
    jnp.zeros(4), batch, kto.Config(beta=0.5), module=kto, apply_fn=ar.arm_apply_fn,
    num_steps=3000,
  )  # fmt: skip
  probs = np.asarray(jax.nn.softmax(params))
  assert probs[2] < 1e-2 and probs[3] < 1e-2 and probs[0] > 0.25


def test_bad_input_is_named():
  batch = _batch(np.random.default_rng(0))
  for field in ("mismatched_mask", "mismatched_ref_logps"):
    with pytest.raises(ValueError, match=field):
      kto.loss(
        jnp.zeros(4), None, batch._replace(**{field: np.zeros((2, 2))}), None,
        apply_fn=ar.arm_apply_fn, config=kto.Config(),
      )  # fmt: skip
  with pytest.raises(ValueError, match="num_microbatches must be 1, got 2"):
    kto.Config(num_microbatches=2)
  with pytest.raises(ValueError, match="desirable_weight must be positive"):
    kto.Config(desirable_weight=0)
  with pytest.raises(ValueError, match="labels must lie in"):
    kto.kto_loss(np.zeros(2), np.array([1, -1]), beta=0.1, kl=0.0)
  with pytest.raises(ValueError, match="labels"):
    kto.kto_loss(np.zeros(2), np.zeros(3), beta=0.1, kl=0.0)
