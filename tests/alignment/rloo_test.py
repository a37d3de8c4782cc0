"""RLOO against hand numbers, the exact policy gradient, and CoPG on the same samples."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import copg, oracles
from alignment.baselines import rloo


def test_hand_values():
  logps, rewards = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[1.0, 0.0, 5.0]])
  # Regularised at beta = 0.5 against ref 0: 1.5, 1, 6.5; minus the mean of the others:
  # -2.25, -3, 5.25. Loss -(2.25 + 6 - 15.75).
  got = rloo.rloo_loss(logps, jnp.zeros((1, 3)), rewards, beta=0.5)
  np.testing.assert_allclose(got, [7.5], rtol=1e-6)
  plain = rloo.rloo_loss(logps, jnp.zeros((1, 3)), rewards, beta=0.5, baseline="none")
  np.testing.assert_allclose(plain, [1.5 + 2 + 19.5], rtol=1e-6)


@pytest.mark.parametrize("num_samples", [2, 3, 6])
def test_the_gradient_is_that_of_copg_on_any_samples(x64, num_samples):
  """Identity 2 of the CoPG paper, for K samples."""
  rng = np.random.default_rng(num_samples)
  logps, ref_logps, rewards = rng.normal(size=(3, 4, num_samples)) * 2
  beta = 0.3
  got = jax.grad(lambda x: rloo.rloo_loss(x, ref_logps, rewards, beta=beta).sum())(logps)
  want = jax.grad(lambda x: copg.copg_loss(x - ref_logps, rewards, beta=beta).sum())(logps)
  np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("baseline", rloo.BASELINES)
def test_the_expected_gradient_is_that_of_the_objective(x64, baseline):
  """Enumerated over all pairs of the policy's samples: K times the gradient of J."""
  rng = np.random.default_rng(0)
  logits, ref_logps = jnp.asarray(rng.normal(size=5)), np.log(rng.dirichlet(np.ones(5)))
  rewards, beta = rng.normal(size=5), 0.4
  first, second = (jnp.asarray(x.ravel()) for x in np.indices((5, 5)))
  pairs = jnp.stack([first, second], axis=1)

  def expected(logits):
    logps = jax.nn.log_softmax(logits)
    losses = rloo.rloo_loss(
      logps[pairs], jnp.asarray(ref_logps)[pairs], jnp.asarray(rewards)[pairs], beta=beta,
      baseline=baseline,
    )  # fmt: skip
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logps[first] + logps[second])) * losses)

  def objective(logits):
    return oracles.objective(jax.nn.log_softmax(logits), jnp.asarray(ref_logps), rewards, beta)

  np.testing.assert_allclose(
    jax.grad(expected)(logits), -2 * jax.grad(objective)(logits), atol=1e-12
  )


def test_on_foreign_samples_leave_one_out_is_copg_and_reinforce_is_wrong(x64):
  ref_logps, rewards, beta = np.log(np.ones(3) / 3), np.array([2.5, 2.0, 1.0]), 0.5
  arms = np.stack(np.meshgrid([0, 1, 2, 2, 2], [0, 1, 2, 2]), axis=-1).reshape(-1, 2)
  batch = copg.Batch(
    jnp.asarray(arms)[..., None], jnp.ones((len(arms), 2, 1)), jnp.asarray(ref_logps)[arms],
    jnp.asarray(rewards)[arms],
  )  # fmt: skip
  exact = np.exp(oracles.copg_optimum(ref_logps, rewards, beta))

  def train(module, config):
    params, _ = ar.train(
      jnp.asarray(ref_logps), batch, config, module=module, apply_fn=ar.arm_apply_fn
    )
    return np.asarray(jax.nn.softmax(params))

  np.testing.assert_allclose(train(rloo, rloo.Config(beta=beta)), exact, atol=1e-6)
  # As unbiased as the other on its own samples; these are not.
  plain = train(rloo, rloo.Config(beta=beta, baseline="none"))
  assert np.abs(plain - exact).max() > 0.1


def test_sampled_updates_approach_the_optimum(x64):
  """Fresh samples at each step, from the policy."""
  ref_logps, rewards, beta = np.log([0.2, 0.3, 0.5]), np.array([1.0, 0.0, 0.5]), 0.5
  config, optimizer = rloo.Config(beta=beta), optax.adam(optax.cosine_decay_schedule(0.02, 3000))
  state = rloo.init(jnp.asarray(ref_logps), optimizer=optimizer, config=config)

  def body(state, key):
    arms = jax.random.categorical(key, state.params, shape=(64, 4))
    batch = rloo.Batch(
      arms[..., None], jnp.ones((64, 4, 1)), jnp.asarray(ref_logps)[arms],
      jnp.asarray(rewards)[arms],
    )  # fmt: skip
    bound = {"apply_fn": ar.arm_apply_fn, "optimizer": optimizer, "config": config}
    return rloo.update(state, batch, key, **bound)[0], None

  state = jax.lax.scan(body, state, jax.random.split(jax.random.key(0), 3000))[0]
  exact = np.exp(oracles.copg_optimum(ref_logps, rewards, beta))
  # Monte Carlo: 256 samples a step, the step size falling to zero.
  np.testing.assert_allclose(jax.nn.softmax(state.params), exact, atol=5e-3)


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: rloo.Config(beta=0.0), "beta"),
    (lambda: rloo.Config(baseline="mean"), "baseline"),
    (
      lambda: rloo.rloo_loss(np.ones((1, 2)), np.ones((1, 2)), np.array([[0, np.inf]]), beta=1.0),
      "rewards must be finite, got inf",
    ),
    (lambda: rloo.rloo_loss(*[jnp.ones((2, 1))] * 3, beta=1.0), "K >= 2"),
    (lambda: rloo.rloo_loss(*[jnp.ones(2)] * 3, beta=1.0, baseline="none"), "K >= 1"),
    (
      lambda: rloo.rloo_loss(jnp.ones((1, 2)), jnp.ones((1, 3)), jnp.ones((1, 2)), beta=1.0),
      "ref_logps",
    ),
  ],
)
def test_bad_input_names_the_argument(call, match):
  with pytest.raises(ValueError, match=match):
    call()
