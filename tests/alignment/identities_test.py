"""What ties the methods to each other: identities that two independent modules must satisfy.

Those that need one method's test bed stand there: CoPG with quarter rewards is IPO, and its
expected on-policy gradient twice the objective's (`copg_test`); CoPG is RLOO (`rloo_test`); DRO-P
is CoPG (`dro_test`); online IPO is self-play (`online_ipo_test`); the fixed points of Nash-MD and
the token mixture (`nash_md_test`); SRPO tends to IPO (`srpo_test`); finite data sets (`ipo_test`,
`copg_test`); optima of what draws from the policy (`closed_forms_test`).
"""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment import copg, dro, ipo, oracles, srpo
from alignment.baselines import dpo


def minimise(objective, params, num_steps=4000):
  optimizer = optax.adam(optax.exponential_decay(0.05, num_steps // 9, 0.5, staircase=True))

  @jax.jit
  def run(params):
    def body(carry, _):
      params, opt_state = carry
      updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(body, (params, optimizer.init(params)), None, length=num_steps)[0][0]

  return run(params)


def problem(rng, num_actions):
  ref_logps, behaviour = (np.log(rng.dirichlet(np.ones(num_actions))) for _ in range(2))
  return ref_logps, np.exp(behaviour), rng.normal(size=num_actions)


def test_dro_with_the_policys_own_value_has_the_optimum_of_copg(x64):
  """V = E_mu[r - tau lr], recomputed and differentiated: half a variance, CoPG on mu x mu."""
  ref_logps, behaviour, rewards = problem(np.random.default_rng(0), 4)
  tau = 0.7

  def own_value(logits):
    ratios = jax.nn.log_softmax(logits) - ref_logps
    value = behaviour @ (rewards - tau * ratios)
    return behaviour @ dro.dro_loss(ratios, rewards, jnp.full(4, value), tau=tau)

  def pairs(logits):
    ratios = jax.nn.log_softmax(logits) - ref_logps
    first, second = (x.ravel() for x in np.indices((4, 4)))
    losses = copg.copg_loss(
      jnp.stack([ratios[first], ratios[second]], 1),
      jnp.stack([rewards[first], rewards[second]], 1),
      beta=tau,
    )
    return (behaviour[first] * behaviour[second]) @ losses

  start = jnp.asarray(ref_logps)
  here = start + 0.3 * jnp.arange(4)
  np.testing.assert_allclose(jax.grad(own_value)(here), tau / 2 * jax.grad(pairs)(here), atol=1e-12)
  want = oracles.copg_optimum(ref_logps, rewards, tau)
  np.testing.assert_allclose(jax.nn.log_softmax(minimise(own_value, start)), want, atol=1e-7)


def test_on_bradley_terry_data_three_roads_lead_to_the_rlhf_optimum(x64):
  """RLHF, Psi-PO with the logit, and DPO, whichever policy drew the data."""
  ref_logps, behaviour, rewards = problem(np.random.default_rng(1), 5)
  preferences, beta = ar.bradley_terry(rewards), 0.4
  rlhf = oracles.kl_regularised_optimum(ref_logps, rewards, beta)
  by_logit = oracles.psi_po_optimum(preferences, behaviour, ref_logps, beta, psi=ipo.logit)
  np.testing.assert_allclose(np.asarray(by_logit), rlhf, atol=1e-12)
  first, second = (x.ravel() for x in np.indices((5, 5)))

  def loss(logits):
    ratios = jax.nn.log_softmax(logits) - ref_logps
    losses = dpo.dpo_loss(
      ratios[first], ratios[second], beta=beta, chosen_probs=preferences[first, second]
    )
    return (behaviour[first] * behaviour[second]) @ losses

  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(rlhf)), 0, atol=1e-12)
  assert np.abs(jax.grad(loss)(jnp.asarray(ref_logps))).max() > 1e-3


def _copg_loss(params, ref_logps, rewards):
  ratios = (jax.nn.log_softmax(params["policy"]) - ref_logps)[jnp.array([[0, 1]])]
  return copg.copg_loss(ratios, rewards[None, :2], beta=0.5).sum()


def _dro_loss(params, ref_logps, rewards):
  ratios = (jax.nn.log_softmax(params["policy"]) - ref_logps)[:2]
  return dro.dro_loss(ratios, rewards[:2], jnp.broadcast_to(params["value"], 2), tau=0.5).sum()


def _srpo_loss(params, ref_logps, rewards):
  """Both orders of the pair (0, 1); the rewriting rows start at the same reference."""
  del rewards
  r = jax.nn.log_softmax(params["policy"]) - ref_logps
  d = jax.nn.log_softmax(params["rewrite"]) - ref_logps
  w, lose = jnp.array([0, 1]), jnp.array([1, 0])
  ratios = (r[w], r[lose], d[lose, w], d[lose, lose], d[w, w], d[w, lose])
  labels = jnp.array([0.8, 0.2])
  return srpo.srpo_loss(*ratios, beta=0.5, alpha=0.5, chosen_probs=labels).sum()


@pytest.mark.parametrize("loss", [_copg_loss, _dro_loss, _srpo_loss])
def test_an_action_that_no_data_show_is_left_to_the_start(x64, loss):
  """As for IPO (`ipo_test`): two starts end at different policies, both of loss zero."""
  ref_logps, _, rewards = problem(np.random.default_rng(2), 3)
  rewards = jnp.asarray(rewards)
  # DRO fits any value low enough; that too is left to the start.
  ends = [
    minimise(
      lambda params: loss(params, ref_logps, rewards),
      {
        "policy": jnp.asarray(ref_logps) + shift,
        "rewrite": jnp.asarray(np.tile(ref_logps, (3, 1))) + shift,
        "value": jnp.zeros(()),
      },
    )
    for shift in (0.0, jnp.array([0.0, 0.0, 2.0]))
  ]
  for params in ends:
    assert loss(params, ref_logps, rewards) < 1e-12
  first, second = (np.asarray(jax.nn.softmax(params["policy"])) for params in ends)
  assert np.abs(first - second).max() > 0.05
