"""DRO against hand numbers, its equations in NumPy, and the theorems of its paper."""

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import test_util

from alignment import copg, dro, ipo, oracles, sequences


def contextual_apply_fn(params, rows):
  """Tables: policy `[X, A]`, value `[X]`; the prompt is one token, the context."""
  contexts = rows.prompt_tokens[:, 0]
  return sequences.token_logps(params.policy[contexts][:, None], rows.tokens), params.value[
    contexts
  ]


def frozen_value_apply_fn(params, rows):
  logps, values = contextual_apply_fn(params, rows)
  return logps, jax.lax.stop_gradient(values)


def population(ref_logps, rewards, counts):
  """The data set in which action a of context x occurs `counts[x, a]` times."""
  contexts, arms = (np.repeat(i.ravel(), counts.ravel()) for i in np.indices(counts.shape))
  return dro.Batch(
    tokens=jnp.asarray(arms)[:, None],
    mask=jnp.ones((len(arms), 1)),
    ref_logps=jnp.asarray(ref_logps)[contexts, arms],
    rewards=jnp.asarray(rewards)[contexts, arms],
    prompt_tokens=jnp.asarray(contexts)[:, None],
    prompt_mask=jnp.ones((len(arms), 1)),
  )


def train(batch, ref_logps, value=0.0, *, config, apply_fn=contextual_apply_fn, **kwargs):
  values = jnp.broadcast_to(jnp.asarray(value, jnp.float64), np.shape(ref_logps)[:1])
  params = dro.Params(jnp.asarray(ref_logps), values)
  params, _ = ar.train(params, batch, config, module=dro, apply_fn=apply_fn, **kwargs)
  return params


# --- rung 1 ---


def test_hand_values():
  # Residuals 2 - 0 - 1 * 0 = 2 and 1 - 0.5 - 1 * 1 = -0.5.
  args = jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0]), jnp.array([0.0, 0.5])
  np.testing.assert_allclose(dro.dro_loss(*args, tau=1.0), [2, 0.125])
  # -lr (r - V) + tau / 2 lr^2 = -1 * 0.5 + 1 at tau = 2; the residual 0.5 - 2 gives 1.125.
  policy, value = dro.dro_v_losses(*args, tau=2.0)
  np.testing.assert_allclose(policy, [0, 0.5])
  np.testing.assert_allclose(value, [2, 1.125])
  np.testing.assert_allclose(dro.dro_v_losses(*args, tau=2.0, rescale=False)[0], [0, 1])
  # r - tau lr = (1, 0, 5): variance 7 over K - 1, half of it.
  groups = jnp.array([[0.0, 1.0, -1.0]]), jnp.array([[1.0, 2.0, 3.0]])
  np.testing.assert_allclose(dro.dro_p_loss(*groups, tau=2.0), [3.5])


@pytest.mark.parametrize("rescale", [True, False])
def test_the_pair_of_losses_has_the_gradients_of_the_joint_one(x64, rescale):
  """And both are the printed gradients, equations of section 3 of the paper."""
  rng = np.random.default_rng(0)
  log_ratios, rewards, values = rng.normal(size=(3, 6)) * 3
  tau = 0.3

  def separate(log_ratios, values):
    policy, value = dro.dro_v_losses(log_ratios, rewards, values, tau=tau, rescale=rescale)
    return jnp.sum(policy) + jnp.sum(value)

  def joint(log_ratios, values):
    return jnp.sum(dro.dro_loss(log_ratios, rewards, values, tau=tau))

  got, want = (jax.grad(f, argnums=(0, 1))(log_ratios, values) for f in (separate, joint))
  scale = tau if rescale else 1
  np.testing.assert_allclose(got[0] * scale, want[0], rtol=1e-12)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-12)
  np.testing.assert_allclose(want[0], -tau * (rewards - values - tau * log_ratios), rtol=1e-12)
  np.testing.assert_allclose(want[1], values - rewards + tau * log_ratios, rtol=1e-12)
  test_util.check_grads(joint, (log_ratios, values), order=2, modes=["rev"])


def test_the_policy_loss_is_blind_to_the_value_and_the_other_way_round():
  grads = jax.jacobian(lambda lr, v: dro.dro_v_losses(lr, jnp.ones(1), v, tau=0.5), argnums=(0, 1))
  policy, value = grads(jnp.array([0.3]), jnp.array([0.2]))
  assert policy[1] == 0 and value[0] == 0
  assert policy[0] != 0 and value[1] != 0


# --- the theorems ---


@pytest.mark.parametrize(
  ("num_arms", "rescale"), [*((num_arms, True) for num_arms in range(2, 8)), (5, False)]
)
def test_update_reaches_policy_and_value_on_off_policy_bandits(x64, num_arms, rescale):
  rng = np.random.default_rng(num_arms)
  ref_logps = np.log(rng.dirichlet(np.full(num_arms, 2.0), 1))
  rewards, tau = rng.normal(size=(1, num_arms)), 0.7
  batch = population(ref_logps, rewards, rng.integers(1, 5, (1, num_arms)))
  params = train(batch, ref_logps, config=dro.Config(tau=tau, rescale=rescale))
  logps, value = oracles.dro_optimum(ref_logps, rewards, tau)
  np.testing.assert_allclose(jax.nn.log_softmax(params.policy), logps, atol=1e-6)
  np.testing.assert_allclose(params.value, value, atol=1e-6)


def test_the_published_fixture():
  logps, value = oracles.dro_optimum(np.log(np.ones(3) / 3), np.array([1.0, 0, -1]), 1.0)
  np.testing.assert_allclose(np.exp(logps), [0.665241, 0.244728, 0.090031], atol=1e-6)
  np.testing.assert_allclose(value, 0.308994, atol=1e-6)


def test_update_reaches_the_closed_form_on_sequences(x64):
  rng = np.random.default_rng(0)
  ref = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)))
  rewards, tau = rng.normal(size=ar.NUM_COMPLETIONS), 0.5
  ref_logps = np.asarray(ar.all_logps(ref))
  rows = np.repeat(np.arange(ar.NUM_COMPLETIONS), rng.integers(1, 4, ar.NUM_COMPLETIONS))
  batch = dro.Batch(
    jnp.asarray(ar.TOKENS[rows]), jnp.asarray(ar.MASK[rows]), jnp.asarray(ref_logps[rows]),
    jnp.asarray(rewards[rows]),
  )  # fmt: skip

  params, _ = ar.train(
    dro.Params(ref, jnp.zeros(())), batch, dro.Config(tau=tau), module=dro,
    apply_fn=_sequence_apply_fn,
  )  # fmt: skip
  logps, value = oracles.dro_optimum(ref_logps, rewards, tau)
  np.testing.assert_allclose(ar.all_logps(params.policy), logps, atol=1e-8)
  np.testing.assert_allclose(params.value, value, atol=1e-8)


def _sequence_apply_fn(params, rows):
  return ar.apply_fn(params.policy, rows), jnp.broadcast_to(params.value, rows.tokens.shape[:1])


@pytest.mark.parametrize(
  ("offset", "probs"),
  [
    (-1.0, [0.391, 0.396, 0.213]),
    (-0.3, [0.575, 0.305, 0.120]),
    (0.3, [0.745, 0.188, 0.067]),
    (1.0, [0.872, 0.094, 0.033]),
  ],
)
def test_a_wrong_value_moves_the_policy(x64, offset, probs):
  """V is not a free baseline; the numbers are those of the reproduction, mu = (.1, .3, .6)."""
  ref_logps, rewards = np.log(np.ones((1, 3)) / 3), np.array([[1.0, 0, -1]])
  _, value = oracles.dro_optimum(ref_logps, rewards, 1.0)
  batch = population(ref_logps, rewards, np.array([[1, 3, 6]]))
  params = train(
    batch, ref_logps, value + offset, config=dro.Config(), apply_fn=frozen_value_apply_fn
  )
  np.testing.assert_allclose(jax.nn.softmax(params.policy)[0], probs, atol=6e-4)  # three digits


def test_the_bound_of_proposition_one_on_random_bandits(x64):
  """All of 200 bandits at once: each is a context with its own wrong, frozen value."""
  rng = np.random.default_rng(0)
  size, num_arms, tau = 200, 4, 0.8
  ref_logps = np.log(rng.dirichlet(np.full(num_arms, 2.0), size))
  rewards, counts = rng.normal(size=(2, size, num_arms))
  counts = rng.integers(1, 6, (size, num_arms))
  _, best = oracles.dro_optimum(ref_logps, rewards, tau)
  values = best + rng.normal(size=size) / 2
  params = train(
    population(ref_logps, rewards, counts), ref_logps, values, config=dro.Config(tau=tau),
    apply_fn=frozen_value_apply_fn,
  )  # fmt: skip
  logps = np.asarray(jax.nn.log_softmax(params.policy))
  behaviour = counts / counts.sum(1, keepdims=True)
  own = np.sum(behaviour * (rewards - tau * (logps - ref_logps)), axis=1)
  gap = (own - values)[:, None]
  weights = np.exp(logps) / behaviour
  # The fixed point of the proposition.
  implied = ref_logps + (rewards - weights * gap) / tau
  implied -= np.log(np.exp(implied).sum(1, keepdims=True))
  np.testing.assert_allclose(logps, implied, atol=1e-6)
  error = np.abs(logps - oracles.dro_optimum(ref_logps, rewards, tau)[0]).max(1)
  bound = 2 / tau * np.abs(gap * (1 - weights)).max(1)
  assert (error <= bound + 1e-9).all()
  assert error.max() > 0.1  # the bound had something to bound


def three_prompts(rng):
  """Prompts whose optimal values differ: what one shared value cannot fit."""
  ref_logps = np.log(rng.dirichlet(np.full(5, 2.0), 3))
  rewards = rng.normal(size=(3, 5)) + np.array([[-1.0], [0.0], [1.0]])
  return ref_logps, rewards, rng.integers(1, 4, (3, 5))


def test_groups_of_a_prompt_need_no_value(x64):
  """DRO-P with the variance inside each prompt reaches the optimum; it is CoPG up to scale."""
  ref_logps, rewards, _ = three_prompts(np.random.default_rng(0))
  tau, logits = 0.6, jnp.asarray(ref_logps)

  def objective(logits):
    ratios = jax.nn.log_softmax(logits) - ref_logps
    return jnp.sum(dro.dro_p_loss(ratios, rewards, tau=tau))

  logits = minimise(objective, logits)
  np.testing.assert_allclose(
    jax.nn.log_softmax(logits), oracles.dro_optimum(ref_logps, rewards, tau)[0], atol=1e-6
  )
  ratios = np.random.default_rng(1).normal(size=(3, 5))
  np.testing.assert_allclose(
    dro.dro_p_loss(ratios, rewards, tau=tau) * 5 / tau,
    copg.copg_loss(ratios, rewards, beta=tau),
    rtol=1e-12,
  )


def test_pairs_of_labels_are_ipo(x64):
  """Labels 1/2 and -1/2 for rewards: tau^2 / 4 times the IPO loss of a hard label."""
  chosen, rejected = np.random.default_rng(0).normal(size=(2, 7))
  labels = np.tile([0.5, -0.5], (7, 1)) / 1.0
  got = dro.dro_p_loss(np.stack([chosen, rejected], 1), labels, tau=0.25)
  # IPO's target 1 / (2 tau') equals 1 / tau at tau' = tau / 2.
  want = ipo.ipo_loss(chosen, rejected, tau=0.125) * 0.25**2 / 4
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_one_value_for_all_prompts_and_the_batch_variance_share_a_bias(x64):
  ref_logps, rewards, counts = three_prompts(np.random.default_rng(0))
  tau = 0.6
  batch = population(ref_logps, rewards, counts)
  contexts, arms = np.asarray(batch.prompt_tokens[:, 0]), np.asarray(batch.tokens[:, 0])

  def ratios(logits):
    return (jax.nn.log_softmax(logits) - ref_logps)[contexts, arms]

  shared = minimise(
    lambda p: jnp.sum(
      dro.dro_loss(ratios(p[0]), batch.rewards, jnp.full(len(arms), p[1]), tau=tau)
    ),
    (jnp.asarray(ref_logps), jnp.zeros(())),
  )[0]
  variance = minimise(
    lambda logits: jnp.sum(dro.dro_p_loss(ratios(logits)[None], batch.rewards[None], tau=tau)),
    jnp.asarray(ref_logps),
  )
  np.testing.assert_allclose(jax.nn.softmax(shared), jax.nn.softmax(variance), atol=1e-6)
  exact = np.exp(oracles.dro_optimum(ref_logps, rewards, tau)[0])
  assert np.abs(jax.nn.softmax(variance) - exact).max() > 0.05
  own = train(batch, ref_logps, config=dro.Config(tau=tau))
  np.testing.assert_allclose(jax.nn.softmax(own.policy), exact, atol=1e-6)


def minimise(objective, params, num_steps=6000):
  optimizer = optax.adam(optax.exponential_decay(0.03, num_steps // 9, 0.5, staircase=True))

  def body(carry, _):
    params, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  return jax.jit(
    lambda p: jax.lax.scan(body, (p, optimizer.init(p)), None, length=num_steps)[0][0]
  )(params)


def test_rescaling_matters_to_sgd_and_not_to_adam(x64):
  ref_logps, rewards = np.log(np.ones((1, 3)) / 3), np.array([[1.0, 0, -1]])
  batch = population(ref_logps, rewards, np.array([[1, 3, 6]]))

  def error(optimizer, rescale, num_steps=3000, tau=0.1):
    config = dro.Config(tau=tau, rescale=rescale)
    params = dro.Params(jnp.asarray(ref_logps), jnp.zeros(1))
    state = dro.init(params, optimizer=optimizer, config=config)

    def body(state, _):
      bound = {"apply_fn": contextual_apply_fn, "optimizer": optimizer, "config": config}
      return dro.update(state, batch, None, **bound)[0], None

    state = jax.lax.scan(body, state, None, length=num_steps)[0]
    exact = np.exp(oracles.dro_optimum(ref_logps, rewards, tau)[0])
    return float(np.abs(jax.nn.softmax(state.params.policy) - exact).max())

  sgd = optax.sgd(0.05)
  assert error(sgd, True) < 0.01 < 0.2 < error(sgd, False)
  adam = dro.make_optimizer(optax.adam(0.01, eps=1e-12), optax.adam(0.01, eps=1e-12))
  # Adam divides a constant factor out; what is left is its epsilon.
  np.testing.assert_allclose(error(adam, True, 200), error(adam, False, 200), atol=1e-6)


def test_the_two_groups_are_clipped_apart():
  optimizer = dro.make_optimizer(
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), optax.sgd(0.5)
  )
  params = dro.Params({"w": jnp.zeros(2)}, {"w": jnp.zeros(1)})
  grads = dro.Params({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([100.0])})
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates.policy["w"], [-0.6, -0.8], rtol=1e-6)
  np.testing.assert_allclose(updates.value["w"], [-50])


def test_stochastic_rewards_count_by_their_mean(x64):
  """The same action with rewards 0 and 1: the optimum of reward one half."""
  ref_logps = np.log(np.array([[0.5, 0.5]]))
  batch = population(ref_logps, np.array([[0.5, 0.0]]), np.array([[2, 2]]))
  noisy = batch._replace(rewards=jnp.array([0.0, 1.0, 0.0, 0.0]))
  got = train(noisy, ref_logps, config=dro.Config(tau=0.5))
  want = train(batch, ref_logps, config=dro.Config(tau=0.5))
  np.testing.assert_allclose(got.policy, want.policy, atol=1e-8)
  np.testing.assert_allclose(got.value, want.value, atol=1e-8)


# --- bad input ---


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: dro.Config(tau=0.0), "tau"),
    (lambda: dro.dro_loss(jnp.ones(2), jnp.ones(2), jnp.ones(2), tau=-1.0), "tau"),
    (lambda: dro.dro_loss(jnp.ones(2), jnp.ones(3), jnp.ones(2), tau=1.0), "rewards"),
    (lambda: dro.dro_v_losses(jnp.ones(2), jnp.ones(2), jnp.ones((2, 1)), tau=1.0), "values"),
    (lambda: dro.dro_p_loss(jnp.ones(2), jnp.ones(2), tau=1.0), r"\[G, K\]"),
    (lambda: dro.dro_p_loss(jnp.ones((2, 1)), jnp.ones((2, 1)), tau=1.0), "K >= 2"),
    (lambda: dro.Config(rescale="no"), "rescale must be one of True, False, got 'no'"),
    (
      lambda: dro.dro_loss(np.ones(2), np.array([1, np.nan]), np.ones(2), tau=1.0),
      "rewards must be numbers, got nan at position 1",
    ),
    (lambda: oracles.dro_optimum(np.zeros(2), np.zeros(2), 0.0), "tau"),
  ],
)
def test_bad_input_names_the_argument(call, match):
  with pytest.raises(ValueError, match=match):
    call()


def test_an_apply_fn_that_gives_values_for_tokens_is_an_error():
  batch = population(np.zeros((1, 2)), np.zeros((1, 2)), np.array([[1, 1]]))

  def apply_fn(params, rows):
    return params.policy[rows.tokens], params.value[rows.tokens]

  with pytest.raises(ValueError, match=r"apply_fn\(params, sequences\)\[1\]"):
    params = dro.Params(jnp.zeros(2), jnp.zeros(2))
    dro.loss(params, None, batch, None, apply_fn=apply_fn, config=dro.Config())
