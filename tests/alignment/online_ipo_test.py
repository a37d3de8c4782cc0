"""Online IPO against hand numbers and its gradient identity.

Where it stops is in `closed_forms_test`.
"""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment.baselines import online_ipo


def random_problem(rng, num_actions):
  return ar.preferences(rng, num_actions), jnp.asarray(np.log(rng.dirichlet(np.ones(num_actions))))


def expected_gradient(logits, sampled_logps, preferences, ref_logps, tau):
  """The gradient averaged over pairs drawn from `sampled_logps`, the draw itself held fixed."""
  num_actions = len(ref_logps)
  first, second = (x.ravel() for x in np.indices((num_actions, num_actions)))

  def loss(logits):
    ratios = jax.nn.log_softmax(logits) - ref_logps
    losses = online_ipo.online_ipo_loss(
      ratios[first], ratios[second], preferences[first, second], tau=tau
    )
    weights = jax.lax.stop_gradient(jnp.exp(sampled_logps[first] + sampled_logps[second]))
    return jnp.sum(weights * losses)

  return jax.grad(loss)(logits)


def test_worked_losses():
  losses = online_ipo.online_ipo_loss(
    jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]), jnp.array([0.75, 0.0]), tau=0.5
  )
  np.testing.assert_allclose(losses, [(1 - 0.5) ** 2, (-1 + 1) ** 2], atol=1e-6)


def test_expected_gradient_is_a_multiple_of_self_play(x64):
  """It is 4 / tau times that of E[P] - tau KL against the policy itself, held fixed."""
  rng = np.random.default_rng(0)
  for num_actions, tau in ((2, 0.1), (5, 0.7)):
    preferences, ref_logps = random_problem(rng, num_actions)
    logits = jnp.asarray(rng.normal(size=num_actions))
    logps = jax.nn.log_softmax(logits)
    got = expected_gradient(logits, logps, preferences, ref_logps, tau)

    def objective(logits, logps=logps, preferences=preferences, ref_logps=ref_logps, tau=tau):
      own = jax.nn.log_softmax(logits)
      wins = preferences @ jnp.exp(logps)
      return jnp.sum(jnp.exp(own) * (wins - tau * (own - ref_logps)))

    np.testing.assert_allclose(got, -4 / tau * jax.grad(objective)(logits), atol=1e-10)


def test_sampled_labels_have_the_gradient_of_their_mean(x64):
  ratios = jnp.array([0.4, -0.3])

  def gradient(preference):
    return jax.grad(
      lambda r: online_ipo.online_ipo_loss(r[:1], r[1:], jnp.array([preference]), tau=0.3).sum()
    )(ratios)

  np.testing.assert_allclose(0.7 * gradient(1.0) + 0.3 * gradient(0.0), gradient(0.7), atol=1e-12)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="tau must be positive"):
    online_ipo.Config(tau=0)
  with pytest.raises(ValueError, match="preferences must lie in"):
    online_ipo.online_ipo_loss(np.zeros(1), np.zeros(1), np.array([1.5]), tau=1.0)
  with pytest.raises(ValueError, match="second_log_ratios"):
    online_ipo.online_ipo_loss(np.zeros(2), np.zeros(3), np.zeros(2), tau=1.0)
  arms, ones, zeros = np.zeros((2, 1), int), np.ones((2, 1)), np.zeros(2)
  good = online_ipo.Batch(arms, ones, zeros, arms, ones, zeros, zeros)
  for field in ("second_mask", "first_ref_logps"):
    with pytest.raises(ValueError, match=field):
      online_ipo.loss(
        jnp.zeros(3), None, good._replace(**{field: np.zeros((3, 3))}), None,
        apply_fn=ar.arm_apply_fn, config=online_ipo.Config(),
      )  # fmt: skip
