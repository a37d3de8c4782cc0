"""CoPG against hand numbers, its equations in NumPy, and the theorems of its paper."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import test_util

from alignment import copg, ipo, oracles, sequences


def _arm_batch(ref_logps, rewards, arms):
  """Samples `arms [B, K]` of a bandit."""
  return copg.Batch(
    jnp.asarray(arms)[..., None],
    jnp.ones((*np.shape(arms), 1)),
    jnp.asarray(ref_logps)[arms],
    jnp.asarray(rewards)[arms],
  )


def _sequence_batch(ref_logps, rewards, rows):
  return copg.Batch(
    jnp.asarray(ar.TOKENS[rows]),
    jnp.asarray(ar.MASK[rows]),
    jnp.asarray(ref_logps)[rows],
    jnp.asarray(rewards)[rows],
  )


# --- rung 1 ---


def test_hand_values():
  # R - beta lr = (1, 0): one pair, 1 / (2 * 0.5 * 1) = 1. Then (1 - 1, 0): 0.
  log_ratios, rewards = jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.array([[1.0, 0], [1.0, 0]])
  np.testing.assert_allclose(copg.copg_loss(log_ratios, rewards, beta=0.5), [1, 0], atol=1e-6)
  # Three samples 0, 1, 3: (1 + 9 + 4) / (2 * 0.5 * 2) = 7.
  three = copg.copg_loss(jnp.zeros((1, 3)), jnp.array([[0.0, 1, 3]]), beta=0.5)
  np.testing.assert_allclose(three, [7], rtol=1e-6)


@pytest.mark.parametrize("num_samples", [2, 3, 6])
def test_restates_the_sum_over_pairs(x64, num_samples):
  rng = np.random.default_rng(num_samples)
  log_ratios, rewards = rng.normal(size=(2, 4, num_samples)) * 10
  beta, expected = 0.3, np.zeros(4)
  for i in range(num_samples):
    for j in range(i + 1, num_samples):
      gap = rewards[:, i] - rewards[:, j] - beta * (log_ratios[:, i] - log_ratios[:, j])
      expected += gap**2 / (2 * beta * (num_samples - 1))
  np.testing.assert_allclose(copg.copg_loss(log_ratios, rewards, beta=beta), expected, rtol=1e-12)
  test_util.check_grads(
    lambda ratios: copg.copg_loss(ratios, rewards, beta=beta), (log_ratios,), order=2, modes=["rev"]
  )


def test_large_common_rewards_do_not_cancel_in_float32():
  """The closed form subtracts the mean first: an offset of 1e4 costs rounding, not the answer."""
  rewards = jnp.array([[1.0, 0.0, 0.5]])
  plain = copg.copg_loss(jnp.zeros((1, 3)), rewards, beta=0.1)
  shifted = copg.copg_loss(jnp.zeros((1, 3)), rewards + 1e4, beta=0.1)
  np.testing.assert_allclose(plain, shifted, rtol=5e-3)  # 1e4 in float32 is good to 1e-3


# --- the theorems ---


@pytest.mark.parametrize("num_arms", range(2, 8))
def test_update_reaches_the_closed_form_on_off_policy_bandits(x64, num_arms):
  rng = np.random.default_rng(num_arms)
  ref_logps = np.log(rng.dirichlet(np.full(num_arms, 2.0)))
  rewards, beta = rng.normal(size=num_arms), 0.5
  # y ~ mu1, y' ~ mu2: different from each other and from the reference, and nobody knows them.
  first = np.repeat(np.arange(num_arms), rng.integers(1, 4, num_arms))
  second = np.repeat(np.arange(num_arms), rng.integers(1, 4, num_arms))
  arms = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2)
  params, _ = ar.train(
    jnp.asarray(ref_logps),
    _arm_batch(ref_logps, rewards, arms),
    copg.Config(beta=beta),
    module=copg,
    apply_fn=ar.arm_apply_fn,
    num_steps=4500,
  )
  optimum = oracles.copg_optimum(ref_logps, rewards, beta)
  logits = ref_logps + rewards / beta
  np.testing.assert_allclose(optimum, logits - np.log(np.exp(logits).sum()), atol=1e-12)
  np.testing.assert_allclose(jax.nn.log_softmax(params), optimum, atol=1e-6)


@pytest.mark.parametrize("num_samples", [2, 15])
def test_update_reaches_the_closed_form_on_sequences(x64, num_samples):
  rng = np.random.default_rng(0)
  ref_params = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)))
  ref_logps = ar.all_logps(ref_params)
  rewards, beta = rng.normal(size=15), 0.8
  if num_samples == 2:  # a chain that connects all completions, with a tie and repeats
    rows = np.stack([np.arange(15), (np.arange(15) + 4) % 15], axis=1)
    rows = np.concatenate([rows, rows[:5], [[3, 3]]])
  else:
    rows = np.arange(15)[None]
  params, metrics = ar.train(
    ref_params,
    _sequence_batch(ref_logps, rewards, rows),
    copg.Config(beta=beta),
    module=copg,
    apply_fn=ar.apply_fn,
    num_steps=12000,
  )
  optimum = oracles.copg_optimum(np.asarray(ref_logps), rewards, beta)
  np.testing.assert_allclose(ar.all_logps(params), optimum, atol=1e-8)
  assert metrics["loss"][-1] < 1e-15  # every residual vanishes: nothing is left to regress
  assert metrics["copg/margin"][-1] > metrics["copg/margin"][0]


def test_bandit_of_the_paper_has_the_stated_optimum_and_regret():
  rewards, uniform = np.array([2.5, 2.0, 1.0]), np.log(np.ones(3) / 3)
  optimum = oracles.copg_optimum(uniform, rewards, 0.5)
  np.testing.assert_allclose(np.exp(optimum), [0.705385, 0.259496, 0.035119], atol=1e-6)
  np.testing.assert_allclose(oracles.objective(optimum, uniform, rewards, 0.5), 2.125200, atol=1e-6)
  np.testing.assert_allclose(oracles.objective(uniform, uniform, rewards, 0.5), 11 / 6, atol=1e-12)
  np.testing.assert_allclose(oracles.regret(uniform, uniform, rewards, 0.5), 0.291867, atol=1e-6)


@jax.jit
def _mean_loss(logits, batch, beta):
  value, _ = copg.loss(
    logits, None, batch, None, apply_fn=ar.arm_apply_fn, config=copg.Config(beta=beta)
  )
  return value


def _surrogate(logits, arms, ref_logps, rewards, beta):
  """Leave-one-out policy gradient: minus sum_i sg(R_beta_i - mean of the others) log pi(y_i)."""
  logps = jax.nn.log_softmax(logits)[arms]
  regularised = jax.lax.stop_gradient(rewards[arms] - beta * (logps - ref_logps[arms]))
  num_samples = arms.shape[1]
  others = (regularised.sum(1, keepdims=True) - regularised) / (num_samples - 1)
  return -jnp.mean(jnp.sum((regularised - others) * logps, axis=1))


@pytest.mark.parametrize("num_samples", [2, 4])
def test_gradient_is_minus_the_leave_one_out_policy_gradient(x64, num_samples):
  rng = np.random.default_rng(1)
  logits, ref_logps, rewards = rng.normal(size=(3, 5))
  ref_logps = np.asarray(jax.nn.log_softmax(ref_logps))
  arms = rng.integers(0, 5, (6, num_samples))  # any samples, on-policy or not
  ours = jax.grad(_mean_loss)(jnp.asarray(logits), _arm_batch(ref_logps, rewards, arms), 0.3)
  theirs = jax.grad(_surrogate)(
    jnp.asarray(logits), arms, jnp.asarray(ref_logps), jnp.asarray(rewards), 0.3
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-14)
  assert np.abs(ours).max() > 0.1


def test_expected_on_policy_gradient_is_twice_that_of_the_objective(x64):
  rng = np.random.default_rng(2)
  logits, ref_logps, rewards = jnp.asarray(rng.normal(size=(3, 4)))
  ref_logps = jax.nn.log_softmax(ref_logps)
  arms = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2)
  probs = jax.nn.softmax(logits)
  weights = probs[arms[:, 0]] * probs[arms[:, 1]]  # both samples drawn from the policy itself

  def losses(logits):
    ratios = (jax.nn.log_softmax(logits) - ref_logps)[arms]
    return copg.copg_loss(ratios, rewards[arms], beta=0.3)

  def objective(logits):
    return oracles.objective(jax.nn.log_softmax(logits), ref_logps, rewards, 0.3)

  np.testing.assert_allclose(
    -(weights @ jax.jacrev(losses)(logits)), 2 * jax.grad(objective)(logits), atol=1e-14
  )


def test_quarter_rewards_give_the_gradient_of_ipo(x64):
  rng = np.random.default_rng(3)
  won, lost = jnp.asarray(rng.normal(size=(2, 6)))
  beta = 0.3
  rewards = jnp.broadcast_to(jnp.array([0.25, -0.25]), (6, 2))

  def contrastive(won, lost):
    return copg.copg_loss(jnp.stack([won, lost], 1), rewards, beta=beta).sum()

  def regression(won, lost):  # (1/2 - beta h)^2 = beta^2 (h - 1 / (2 beta))^2
    return beta**2 * ipo.ipo_loss(won, lost, tau=beta).sum() / (2 * beta)

  ours = jax.grad(contrastive, (0, 1))(won, lost)
  theirs = jax.grad(regression, (0, 1))(won, lost)
  np.testing.assert_allclose(ours, theirs, atol=1e-14)


def test_the_papers_objective_differs_from_minus_the_loss_by_a_constant(x64):
  """Also that nothing is stopped: R_{beta/2} inside the objective passes gradient."""
  rng = np.random.default_rng(4)
  rewards, beta = rng.normal(size=2), 0.3

  def objective(ratios):
    halves = rewards - beta / 2 * ratios
    return (halves[0] - halves[1]) * (ratios[0] - ratios[1])

  def loss(ratios):
    return copg.copg_loss(ratios[None], rewards[None], beta=beta)[0]

  for ratios in rng.normal(size=(3, 2)):
    constant = (rewards[0] - rewards[1]) ** 2 / (2 * beta)
    np.testing.assert_allclose(objective(ratios) + loss(ratios), constant, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(objective)(ratios), -jax.grad(loss)(ratios), rtol=1e-12)


# --- regressions ---


def test_ties_and_equal_rewards_pull_log_ratios_together():
  log_ratios = jnp.array([[1.0, -1.0]])
  grad = jax.grad(lambda r: copg.copg_loss(r, jnp.ones((1, 2)), beta=0.5).sum())(log_ratios)
  np.testing.assert_allclose(grad, [[1.0, -1.0]], rtol=1e-6)


def test_samples_stay_with_their_prompts():
  seen = []

  def apply_fn(params, rows):
    rows = sequences.repeat_prompts(rows)
    seen.append(rows)
    return params * (rows.tokens - rows.prompt_tokens[:, :1]).astype(float)

  batch = copg.Batch(
    jnp.arange(12).reshape(2, 3, 2), jnp.ones((2, 3, 2)), jnp.zeros((2, 3)), jnp.zeros((2, 3)),
    jnp.array([[7, 1], [9, 1]]), jnp.ones((2, 2)),
  )  # fmt: skip
  copg.loss(1.0, None, batch, None, apply_fn=apply_fn, config=copg.Config())
  np.testing.assert_array_equal(seen[0].prompt_tokens[:, 0], [7, 7, 7, 9, 9, 9])
  np.testing.assert_array_equal(seen[0].tokens, np.arange(12).reshape(6, 2))


def test_fully_masked_samples_give_a_finite_loss_and_no_gradient():
  rows = np.array([[0, 14]])
  params = jnp.zeros((ar.NUM_PREFIXES, 3))
  batch = _sequence_batch(np.zeros(15), np.arange(15.0), rows)
  batch = batch._replace(mask=jnp.zeros((1, 2, 3)))

  def loss(params):
    return copg.loss(params, None, batch, None, apply_fn=ar.apply_fn, config=copg.Config())[0]

  value, grad = jax.value_and_grad(loss)(params)
  np.testing.assert_allclose(value, 14**2 / (2 * 0.06), rtol=1e-5)
  np.testing.assert_array_equal(grad, 0)


def test_metrics_describe_the_data():
  ref_logps = np.log(np.ones(3) / 3)
  optimizer, config = optax.sgd(0.0), copg.Config(beta=0.5)
  state = copg.init(jnp.log(jnp.array([0.5, 0.25, 0.25])), optimizer=optimizer, config=config)
  batch = _arm_batch(ref_logps, np.array([2.0, 1.0, 0.0]), np.array([[0, 2], [1, 2]]))
  _, metrics = copg.update(
    state, batch, None, apply_fn=ar.arm_apply_fn, optimizer=optimizer, config=config
  )
  up, down = np.log(1.5), np.log(0.75)
  np.testing.assert_allclose(metrics["copg/margin"], (up - down) / 2, rtol=1e-5)
  np.testing.assert_allclose(metrics["copg/log_ratio"], (up + 3 * down) / 4, rtol=1e-4)
  np.testing.assert_allclose(metrics["copg/reward"], 0.75, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["copg/regularised_reward"], 0.75 - 0.5 * (up + 3 * down) / 4, rtol=1e-5
  )


# --- bad input ---


def test_bad_input_raises():
  with pytest.raises(ValueError, match="rewards must be numbers, got nan at position"):
    copg.copg_loss(np.zeros((1, 2)), np.array([[np.nan, 0]]), beta=0.1)
  with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
    copg.Config(beta=0)
  with pytest.raises(ValueError, match="beta must be positive"):
    copg.copg_loss(jnp.zeros((1, 2)), jnp.zeros((1, 2)), beta=-1.0)
  with pytest.raises(ValueError, match=r"log_ratios \[1, 2\], rewards \[1, 3\]"):
    copg.copg_loss(jnp.zeros((1, 2)), jnp.zeros((1, 3)), beta=1.0)
  for shape in ((4,), (4, 1), (1, 2, 3)):
    with pytest.raises(ValueError, match="K >= 2"):
      copg.copg_loss(jnp.zeros(shape), jnp.zeros(shape), beta=1.0)
  with pytest.raises(ValueError, match="num_microbatches"):
    copg.Config(num_microbatches=0)
  with pytest.raises(TypeError):
    copg.Config(tau=0.1)
  good = _arm_batch(np.zeros(3), np.zeros(3), np.array([[0, 1]]))
  for bad in (
    good._replace(tokens=jnp.zeros((2, 1), int)),
    good._replace(mask=jnp.ones((1, 2, 2))),
    good._replace(rewards=jnp.zeros((1, 3))),
    good._replace(ref_logps=jnp.zeros((2, 2)), rewards=jnp.zeros((2, 2))),
    good._replace(prompt_mask=jnp.ones((1, 2))),
    good._replace(prompt_tokens=jnp.zeros((2, 2), int), prompt_mask=jnp.ones((2, 2))),
  ):
    with pytest.raises(ValueError):
      copg.loss(jnp.zeros(3), None, bad, None, apply_fn=ar.arm_apply_fn, config=copg.Config())
