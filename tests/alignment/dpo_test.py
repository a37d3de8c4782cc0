"""DPO against hand numbers, its equation in NumPy, and its optimum on any data."""

import functools

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from alignment import ipo, oracles
from alignment.baselines import dpo


def test_hand_values():
  losses = dpo.dpo_loss(jnp.array([0.0, 20.0, -20.0]), jnp.zeros(3), beta=0.1)
  expected = [np.log(2), np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))]
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  flipped = dpo.dpo_loss(jnp.array([20.0]), jnp.zeros(1), beta=0.1, chosen_probs=0.0)
  np.testing.assert_allclose(flipped, expected[2:], rtol=1e-6)


def test_restates_the_cross_entropy_and_finite_differences(x64):
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(size=(2, 6)) * 3
  q, beta = rng.uniform(size=6), 0.7
  sigmoid = 1 / (1 + np.exp(-beta * (chosen - rejected)))
  expected = -q * np.log(sigmoid) - (1 - q) * np.log(1 - sigmoid)
  losses = dpo.dpo_loss(chosen, rejected, beta=beta, chosen_probs=q)
  np.testing.assert_allclose(losses, expected, rtol=1e-12)
  total = lambda c, r: dpo.dpo_loss(c, r, beta=beta, chosen_probs=q).sum()  # noqa: E731
  grads = jax.grad(total, (0, 1))(chosen, rejected)
  np.testing.assert_allclose(grads[0], beta * (sigmoid - q), rtol=1e-12)
  test_util.check_grads(total, (chosen, rejected), order=2, modes=["rev"])


def test_huge_margins_stay_finite():
  for sign in (1, -1):
    value, grad = jax.value_and_grad(
      lambda h: dpo.dpo_loss(h, jnp.zeros(1), beta=1.0).sum()
    )(jnp.full(1, sign * 1e6))  # fmt: skip
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("num_arms", range(2, 8))
def test_bandit_reaches_the_rlhf_optimum_or_the_log_loss_projection(x64, num_arms):
  rng = np.random.default_rng(num_arms)
  ref_logps = np.log(rng.dirichlet(np.full(num_arms, 2.0)))
  rewards, counts, beta = rng.normal(size=num_arms), rng.integers(1, 4, num_arms), 0.8
  preferences = ar.bradley_terry(rewards)
  chosen, rejected = ar.pair_indices(counts)  # mu differs from the reference
  batch = ar.preference_batch(
    np.arange(num_arms)[:, None], np.ones((num_arms, 1)), ref_logps, chosen, rejected,
    preferences[chosen, rejected],
  )  # fmt: skip
  train = functools.partial(
    ar.train, jnp.asarray(ref_logps), config=dpo.Config(beta=beta), module=dpo,
    apply_fn=ar.arm_apply_fn, num_steps=3000,
  )  # fmt: skip
  optimum = oracles.kl_regularised_optimum(ref_logps, rewards, beta)
  np.testing.assert_allclose(jax.nn.log_softmax(train(batch)[0]), optimum, atol=1e-6)
  # Preferences that no reward explains, on the same pairs: the log-loss projection.
  cyclic = ar.preferences(rng, num_arms)
  scores = oracles.bradley_terry_scores(cyclic, np.outer(counts, counts))
  projection = oracles.kl_regularised_optimum(ref_logps, scores, beta)
  params, _ = train(batch._replace(chosen_probs=jnp.asarray(cyclic[chosen, rejected])))
  np.testing.assert_allclose(jax.nn.log_softmax(params), projection, atol=1e-6)
  # One optimum, three ways to it: RLHF, DPO, and Psi-PO with the logit as Psi, whatever mu.
  psi_po = oracles.psi_po_optimum(
    preferences, counts / counts.sum(), ref_logps, beta, psi=lambda p: np.log(p / (1 - p))
  )
  np.testing.assert_allclose(psi_po, optimum, atol=1e-12)


def test_sequences_reach_the_rlhf_optimum_or_the_log_loss_projection(x64):
  rng = np.random.default_rng(1)
  ref_params = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)))
  ref_logps = ar.all_logps(ref_params)
  rewards, beta = rng.normal(size=15), 0.7
  chosen, rejected = ar.pair_indices(np.ones(15, int))
  batch = ar.preference_batch(
    ar.TOKENS, ar.MASK, ref_logps, chosen, rejected, ar.bradley_terry(rewards)[chosen, rejected]
  )
  cyclic = ar.preferences(rng, 15)
  scores = oracles.bradley_terry_scores(cyclic, np.ones((15, 15)))
  for values, probs in ((rewards, batch.chosen_probs), (scores, cyclic[chosen, rejected])):
    params, _ = ar.train(
      ref_params, batch._replace(chosen_probs=jnp.asarray(probs)), dpo.Config(beta=beta),
      module=dpo, apply_fn=ar.apply_fn, num_steps=6000,
    )  # fmt: skip
    optimum = oracles.kl_regularised_optimum(np.asarray(ref_logps), values, beta)
    np.testing.assert_allclose(ar.all_logps(params), optimum, atol=1e-8)


def test_a_pair_that_always_wins_has_no_finite_optimum_unlike_ipo(x64):
  """Why IPO exists: more steps push DPO further at every beta, IPO stays at 1 / (2 tau)."""
  ref_logps = np.log(np.ones(2) / 2)
  batch = ar.preference_batch(np.arange(2)[:, None], np.ones((2, 1)), ref_logps, [0], [1])
  margins = {}
  for module, config in ((dpo, dpo.Config(beta=1.0)), (ipo, ipo.Config(tau=1.0))):
    for num_steps in (900, 3600):
      params, _ = ar.train(
        jnp.asarray(ref_logps), batch, config, module=module, apply_fn=ar.arm_apply_fn,
        num_steps=num_steps, learning_rate=0.1,
      )  # fmt: skip
      margins[module, num_steps] = params[0] - params[1]
  np.testing.assert_allclose([margins[ipo, 900], margins[ipo, 3600]], 0.5, atol=1e-6)
  assert margins[dpo, 3600] > margins[dpo, 900] + 0.5


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sum_and_mean_are_told_apart_and_a_masked_row_is_finite(reduction):
  batch = dpo.Batch(
    jnp.array([[0, 1, 2]]), jnp.array([[1.0, 1, 1]]), jnp.array([-6.0]),
    jnp.array([[1, 2, 2]]), jnp.array([[1.0, 0, 0]]), jnp.array([-5.0]),
  )  # fmt: skip

  def loss(params, batch):
    return dpo.loss(
      params, None, batch, None, config=dpo.Config(beta=1.0, reduction=reduction),
      apply_fn=lambda params, rows: params * jnp.ones(rows.tokens.shape),
    )  # fmt: skip

  (value, (metrics, _)), grad = jax.value_and_grad(loss, has_aux=True)(-1.0, batch)
  margin = {"sum": 3 - 4, "mean": 1 - 4}[reduction]
  np.testing.assert_allclose(value, np.log(1 + np.exp(-margin)), rtol=1e-6)
  np.testing.assert_allclose(metrics["dpo/margin"], margin, rtol=1e-6)
  masked = batch._replace(chosen_mask=jnp.zeros((1, 3)), rejected_mask=jnp.zeros((1, 3)))
  (value, _), grad = jax.value_and_grad(loss, has_aux=True)(-1.0, masked)
  assert np.isfinite(value) and grad == 0


def test_bad_input_raises():
  with pytest.raises(ValueError, match="beta must be positive and finite, got -1"):
    dpo.Config(beta=-1)
  with pytest.raises(ValueError, match="reduction must be one of"):
    dpo.Config(reduction="none")
  with pytest.raises(ValueError, match="beta must be positive"):
    dpo.dpo_loss(jnp.zeros(1), jnp.zeros(1), beta=0.0)
  with pytest.raises(ValueError, match=r"chosen_log_ratios \[2\]"):
    dpo.dpo_loss(jnp.zeros(2), jnp.zeros(1), beta=1.0)
  with pytest.raises(ValueError, match="chosen_probs must lie in"):
    dpo.dpo_loss(jnp.zeros(1), jnp.zeros(1), beta=1.0, chosen_probs=np.array([-0.1]))
