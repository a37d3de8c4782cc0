"""IPO against hand numbers, its equations in NumPy, and the closed forms of its paper."""

import functools
import itertools

import autoregressive as ar
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import test_util

from alignment import ipo, oracles, sequences


def _bandit(num_arms, seed=0):
  """Reference, behaviour counts (mu is far from the reference) and preferences of a bandit."""
  rng = np.random.default_rng(seed + num_arms)
  ref_logps = np.log(rng.dirichlet(np.full(num_arms, 2.0)))
  counts = rng.integers(1, 5, num_arms)
  return ref_logps, counts, ar.preferences(rng, num_arms)


def _arms(num_arms):
  return np.arange(num_arms)[:, None], np.ones((num_arms, 1))


def _population(ref_logps, counts, preferences):
  chosen, rejected = ar.pair_indices(counts)
  tokens, mask = _arms(len(ref_logps))
  return ar.preference_batch(
    tokens, mask, ref_logps, chosen, rejected, preferences[chosen, rejected]
  )


# --- rung 1: numbers by hand, the equation in NumPy, derivatives ---


def test_hand_values():
  # tau = 0.1 wants a margin of 5 nats; tau = 0.5 one of 1; a label of 1/2 one of 0.
  chosen, rejected = jnp.array([5.0, 0.0, 1.0]), jnp.array([0.0, 0.0, 3.0])
  np.testing.assert_allclose(ipo.ipo_loss(chosen, rejected, tau=0.1), [0, 25, 49], rtol=1e-6)
  np.testing.assert_allclose(ipo.ipo_loss(chosen, rejected, tau=0.5), [16, 1, 9], rtol=1e-6)
  soft = ipo.ipo_loss(chosen, rejected, tau=0.1, chosen_probs=jnp.array([1.0, 0.5, 0.0]))
  np.testing.assert_allclose(soft, [0, 0, 9], atol=1e-6)


def test_soft_label_is_the_mean_over_hard_labels_up_to_a_constant(x64):
  rng = np.random.default_rng(0)
  q = rng.uniform(size=7)
  gaps = []
  for _ in range(3):
    chosen, rejected = rng.normal(size=(2, 7))
    won = ipo.ipo_loss(chosen, rejected, tau=0.3)
    lost = ipo.ipo_loss(rejected, chosen, tau=0.3)
    soft = ipo.ipo_loss(chosen, rejected, tau=0.3, chosen_probs=q)
    gaps.append(q * won + (1 - q) * lost - soft)
  # float64 sums of a few terms of size 10
  np.testing.assert_allclose(gaps[0], gaps[1], atol=1e-12)
  np.testing.assert_allclose(gaps[0], gaps[2], atol=1e-12)
  np.testing.assert_allclose(gaps[0], (1 - (2 * q - 1) ** 2) / (2 * 0.3) ** 2, atol=1e-12)


def test_gradient_is_that_of_the_equation_and_of_finite_differences(x64):
  rng = np.random.default_rng(1)
  chosen, rejected = rng.normal(size=(2, 5))

  def total(chosen, rejected):
    return ipo.ipo_loss(chosen, rejected, tau=0.2).sum()

  grads = jax.grad(total, (0, 1))(chosen, rejected)
  expected = 2 * (chosen - rejected - 2.5)
  np.testing.assert_allclose(grads, [expected, -expected], rtol=1e-12)
  test_util.check_grads(total, (chosen, rejected), order=2, modes=["rev"])


def test_psi_po_target_restates_the_expectation():
  rng = np.random.default_rng(2)
  preferences, probs = ar.preferences(rng, 4), rng.dirichlet(np.ones(4))
  for psi, restated in ((ipo.identity, lambda p: p), (ipo.logit, lambda p: np.log(p / (1 - p)))):
    expected = [sum(probs[j] * restated(preferences[i, j]) for j in range(4)) for i in range(4)]
    # float32 sums of four terms
    np.testing.assert_allclose(
      ipo.psi_po_target(preferences, probs, psi=psi), expected, rtol=1e-5, atol=1e-6
    )


def test_psi_po_target_is_batched_and_ignores_actions_that_mu_never_takes():
  preferences = np.array([[0.5, 1.0], [0.0, 0.5]])
  probs = np.array([[1.0, 0.0], [0.0, 1.0]])
  target = ipo.psi_po_target(np.stack([preferences] * 2), probs, psi=ipo.logit)
  np.testing.assert_array_equal(target, [[0, -np.inf], [np.inf, 0]])  # not NaN from 0 * inf
  identity = ipo.psi_po_target(np.stack([preferences] * 2), probs, psi=ipo.identity)
  np.testing.assert_array_equal(identity, [[0.5, 0.0], [1.0, 0.5]])


# --- the theorems ---


@pytest.mark.parametrize("num_arms", range(2, 8))
def test_update_reaches_the_closed_form_on_bandits(x64, num_arms):
  ref_logps, counts, preferences = _bandit(num_arms)
  tau = 0.4
  params, metrics = ar.train(
    jnp.asarray(ref_logps),
    _population(ref_logps, counts, preferences),
    ipo.Config(tau=tau),
    module=ipo,
    apply_fn=ar.arm_apply_fn,
    num_steps=4500,
  )
  mu = counts / counts.sum()
  optimum = oracles.psi_po_optimum(preferences, mu, ref_logps, tau)
  # The oracle itself against the formula, written out.
  logits = ref_logps + preferences @ mu / tau
  np.testing.assert_allclose(optimum, logits - np.log(np.exp(logits).sum()), atol=1e-12)
  np.testing.assert_allclose(jax.nn.log_softmax(params), optimum, atol=1e-6)
  assert metrics["loss"][-1] < metrics["loss"][0]


def test_update_reaches_the_closed_form_on_sequences(x64):
  rng = np.random.default_rng(3)
  ref_params = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)))
  ref_logps = ar.all_logps(ref_params)
  np.testing.assert_allclose(jnp.exp(ref_logps).sum(), 1, atol=1e-12)
  counts = rng.integers(1, 3, ar.NUM_COMPLETIONS)
  preferences = ar.preferences(rng, ar.NUM_COMPLETIONS)
  chosen, rejected = ar.pair_indices(counts)
  batch = ar.preference_batch(
    ar.TOKENS, ar.MASK, ref_logps, chosen, rejected, preferences[chosen, rejected]
  )
  optimum = oracles.psi_po_optimum(preferences, counts / counts.sum(), ref_logps, 0.5)
  params, _ = ar.train(
    ref_params, batch, ipo.Config(tau=0.5), module=ipo, apply_fn=ar.apply_fn, num_steps=9000
  )
  np.testing.assert_allclose(ar.all_logps(params), optimum, atol=1e-8)
  # Per-token means solve another problem: the two readings of "IPO" must not be mixed up.
  mean_params, _ = ar.train(
    ref_params, batch, ipo.Config(tau=0.5, reduction="mean"), module=ipo, apply_fn=ar.apply_fn,
    num_steps=1800,
  )  # fmt: skip
  assert np.abs(np.exp(ar.all_logps(mean_params)) - np.exp(optimum)).max() > 0.01


def test_optimum_depends_on_the_behaviour_policy_unless_there_are_two_arms():
  rng = np.random.default_rng(4)
  for num_arms, depends in ((2, False), (4, True)):
    preferences = ar.preferences(rng, num_arms)
    ref_logps = np.log(rng.dirichlet(np.ones(num_arms)))
    mu = rng.dirichlet(np.ones(num_arms), 2)
    optima = oracles.psi_po_optimum(preferences[None], mu, ref_logps[None], 0.2)
    assert (np.abs(optima[0] - optima[1]).max() > 1e-3) == depends


@jax.jit
def _population_losses(logits, ref_logps, mu, preferences, tau):
  """Equations 13, 16 and 17 of the paper, with loops over all pairs."""
  ratios = logits - jax.nn.logsumexp(logits) - ref_logps
  scores = preferences @ mu
  root, labels, pairs = 0.0, 0.0, 0.0
  for y, other in itertools.product(range(len(mu)), repeat=2):
    weight, p = mu[y] * mu[other], preferences[y, other]
    root += weight * ipo.psi_po_loss(ratios[y], ratios[other], scores[y], scores[other], tau=tau)
    labels += weight * sum(
      chance * ipo.ipo_label_loss(ratios[y], ratios[other], jnp.asarray(label), tau=tau)
      for label, chance in ((1.0, p), (0.0, 1 - p))
    )
    won = ipo.ipo_loss(ratios[y], ratios[other], tau=tau)
    lost = ipo.ipo_loss(ratios[other], ratios[y], tau=tau)
    pairs += weight * (p * won + (1 - p) * lost)
  return jnp.stack([root, labels, pairs])


def test_equations_13_16_and_17_differ_by_constants(x64):
  ref_logps, counts, preferences = _bandit(4)
  mu, tau = counts / counts.sum(), 0.3
  rng = np.random.default_rng(5)
  losses = np.array([
    _population_losses(jnp.asarray(logits), ref_logps, mu, preferences, tau)
    for logits in rng.normal(size=(5, 4)) * 2
  ])  # fmt: skip
  root, labels, pairs = losses.T
  # float64 sums of 16 terms of size 100: rounding 1e-13 or so
  np.testing.assert_allclose(labels - pairs, 1 / (4 * tau**2), atol=1e-11)
  np.testing.assert_allclose(root - labels, (root - labels)[0], atol=1e-11)
  assert np.ptp(root) > 1
  # Hence one minimiser: the gradient of all three vanishes at the closed form.
  optimum = jnp.asarray(oracles.psi_po_optimum(preferences, mu, ref_logps, tau))
  gradients = jax.jacfwd(_population_losses)(optimum, ref_logps, mu, preferences, tau)
  np.testing.assert_allclose(gradients, 0, atol=1e-11)


def test_loss_is_a_convex_quadratic_flat_only_along_all_ones(x64):
  """Theorem 2: the minimum is unique among policies with the support of the reference."""
  ref_logps, counts, preferences = _bandit(5)
  batch = _population(ref_logps, counts, preferences)

  def loss(logits):
    value, _ = ipo.loss(
      logits, None, batch, None, apply_fn=ar.arm_apply_fn, config=ipo.Config(tau=0.2)
    )
    return value

  rng = np.random.default_rng(6)
  hessian = jax.jit(jax.hessian(loss))
  hessians = [hessian(jnp.asarray(point)) for point in rng.normal(size=(2, 5)) * 3]
  np.testing.assert_allclose(hessians[0], hessians[1], atol=1e-10)
  values, vectors = np.linalg.eigh(hessians[0])
  np.testing.assert_allclose(values[0], 0, atol=1e-10)
  np.testing.assert_allclose(np.abs(vectors[:, 0]), 1 / np.sqrt(5), atol=1e-8)
  assert values[1] > 0.01


D1 = ([0, 1, 0], [1, 2, 2])
D3 = ([0, 1, 1], [1, 0, 2])


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_exact_optima_of_the_papers_data_sets(x64, tau):
  uniform, c = np.log(np.ones(3) / 3), 1 / (2 * tau)
  tokens, mask = _arms(3)
  for (chosen, rejected), logits in (
    (D1, np.array([1, 0, -1]) / (3 * tau)),
    (D3, np.array([c, c, 0])),
  ):
    expected = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(
      oracles.ipo_dataset_optimum(chosen, rejected, uniform, tau), expected, atol=1e-12
    )
    batch = ar.preference_batch(tokens, mask, uniform, chosen, rejected)
    params, _ = ar.train(
      jnp.asarray(uniform), batch, ipo.Config(tau=tau), module=ipo, apply_fn=ar.arm_apply_fn,
      num_steps=4500,
    )  # fmt: skip
    np.testing.assert_allclose(jax.nn.log_softmax(params), expected, atol=1e-6)


def test_any_finite_data_set_reaches_the_laplacian_solution(x64):
  rng = np.random.default_rng(7)
  ref_logps = np.log(rng.dirichlet(np.ones(6)))
  # Components {0, 1, 2}, {3, 4} and the unseen {5}; pairs twice, both orders, and with itself.
  chosen, rejected = np.array([0, 1, 0, 2, 3, 4, 3, 1]), np.array([1, 0, 1, 1, 4, 3, 4, 1])
  tokens, mask = _arms(6)
  batch = ar.preference_batch(tokens, mask, ref_logps, chosen, rejected)
  expected = oracles.ipo_dataset_optimum(chosen, rejected, ref_logps, 0.7)
  # Plain gradient descent: unlike Adam it keeps the mean of each component where it starts.
  optimizer, config = optax.sgd(0.2), ipo.Config(tau=0.7)
  state = ipo.init(jnp.asarray(ref_logps), optimizer=optimizer, config=config)

  def body(state, _):
    return ipo.update(
      state, batch, None, apply_fn=ar.arm_apply_fn, optimizer=optimizer, config=config
    )

  state, _ = jax.lax.scan(body, state, None, length=3000)
  np.testing.assert_allclose(jax.nn.log_softmax(state.params), expected, atol=1e-8)


def test_unseen_actions_leave_the_optimum_to_the_start(x64):
  """No support, no uniqueness: two starts end at different policies of equal loss."""
  uniform = np.log(np.ones(3) / 3)
  tokens, mask = _arms(3)
  batch = ar.preference_batch(tokens, mask, uniform, [0, 1], [1, 0], [0.8, 0.2])
  ends = [
    ar.train(jnp.asarray(start), batch, ipo.Config(tau=0.5), module=ipo,
             apply_fn=ar.arm_apply_fn, num_steps=1800)
    for start in (uniform, np.array([0.0, 0.0, 2.0]))
  ]  # fmt: skip
  (first, first_metrics), (second, second_metrics) = ends
  np.testing.assert_allclose(first[0] - first[1], 0.6, atol=1e-6)  # (2 q - 1) / (2 tau)
  np.testing.assert_allclose(second[0] - second[1], 0.6, atol=1e-6)
  np.testing.assert_allclose(first_metrics["loss"][-1], second_metrics["loss"][-1], atol=1e-10)
  assert np.abs(jax.nn.softmax(first) - jax.nn.softmax(second)).max() > 0.1


# --- regressions: mistakes found in other implementations ---


def _uneven_pair():
  """One pair; the chosen answer has 3 tokens, the rejected one 1, padded to 4 and 2."""
  batch = ipo.Batch(
    jnp.array([[0, 1, 2, 2]]), jnp.array([[1.0, 1, 1, 0]]), jnp.array([-6.0]),
    jnp.array([[1, 2]]), jnp.array([[1.0, 0]]), jnp.array([-5.0]),
  )  # fmt: skip
  return batch, lambda params, rows: params * jnp.ones(rows.tokens.shape)


def _loss(params, batch, apply_fn, **config):
  return _jitted_loss(params, batch, ipo.Config(**config), apply_fn)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _jitted_loss(params, batch, config, apply_fn):
  return ipo.loss(params, None, batch, None, apply_fn=apply_fn, config=config)


def test_sum_and_mean_are_told_apart_on_unequal_lengths():
  batch, apply_fn = _uneven_pair()
  # Each token has log-probability -1: log-ratios -3 + 6 = 3 and -1 + 5 = 4, per token 1 and 4.
  value, (metrics, _) = _loss(-1.0, batch, apply_fn, tau=0.5)
  np.testing.assert_allclose(value, (3 - 4 - 1) ** 2, rtol=1e-6)
  np.testing.assert_allclose(metrics["ipo/margin"], -1, rtol=1e-6)
  value, (metrics, _) = _loss(-1.0, batch, apply_fn, tau=0.5, reduction="mean")
  np.testing.assert_allclose(value, (1 - 4 - 1) ** 2, rtol=1e-6)
  np.testing.assert_allclose(metrics["ipo/chosen_log_ratio"], 1, rtol=1e-6)


def test_the_two_answers_may_be_padded_to_different_lengths():
  batch, apply_fn = _uneven_pair()
  wide = batch._replace(
    rejected_tokens=jnp.pad(batch.rejected_tokens, ((0, 0), (0, 5))),
    rejected_mask=jnp.pad(batch.rejected_mask, ((0, 0), (0, 5))),
  )
  for reduction in ("sum", "mean"):
    first, _ = _loss(-1.0, batch, apply_fn, reduction=reduction)
    second, _ = _loss(-1.0, wide, apply_fn, reduction=reduction)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_fully_masked_completion_gives_no_zero_over_zero(reduction):
  batch, apply_fn = _uneven_pair()
  batch = batch._replace(
    chosen_mask=jnp.zeros((1, 4)), rejected_mask=jnp.zeros((1, 2)),
    chosen_ref_logps=jnp.zeros(1), rejected_ref_logps=jnp.zeros(1),
  )  # fmt: skip
  (value, _), grad = jax.value_and_grad(_loss, has_aux=True)(
    -1.0, batch, apply_fn, tau=0.1, reduction=reduction
  )
  np.testing.assert_allclose(value, 25, rtol=1e-6)
  assert grad == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_denominator_counts_the_mask_not_non_zero_values(reduction):
  """At policy == reference all log-ratios are zero; dividing by their count would be 0 / 0."""
  batch, apply_fn = _uneven_pair()
  batch = batch._replace(chosen_ref_logps=jnp.array([-3.0]), rejected_ref_logps=jnp.array([-1.0]))
  (value, _), grad = jax.value_and_grad(_loss, has_aux=True)(
    -1.0, batch, apply_fn, tau=0.1, reduction=reduction
  )
  np.testing.assert_allclose(value, 25, rtol=1e-6)
  # d h / d params is 3 - 1 tokens (sum) or 1 - 1 (mean); 2 (h - 5) = -10.
  np.testing.assert_allclose(grad, {"sum": -20, "mean": 0}[reduction], atol=1e-5)


def test_unknown_or_misspelt_options_raise():
  with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', got 'average'"):
    ipo.Config(reduction="average")
  with pytest.raises(TypeError, match="beta"):
    ipo.Config(beta=0.1)  # another library's name for tau must not be ignored


def test_prompt_tokens_inside_a_row_get_no_gradient_in_either_answer():
  """Both masks are honoured: forgetting the rejected one is the classic slip."""
  rng = np.random.default_rng(11)
  logits = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)  # rows: chosen, rejected
  mask = jnp.array([[0.0, 0, 1, 1]])  # two prompt tokens first
  batch = ipo.Batch(
    jnp.array([[0, 1, 0, 2]]), mask, jnp.zeros(1), jnp.array([[0, 1, 1, 2]]), mask, jnp.zeros(1)
  )
  grad = jax.grad(
    lambda p: _loss(p, batch, lambda p, rows: sequences.token_logps(p, rows.tokens))[0]
  )(logits)
  np.testing.assert_array_equal(grad[:, :2], 0)
  assert (np.abs(grad[:, 2:]).sum((1, 2)) > 0.1).all()


def test_prompt_tokens_of_neither_answer_count():
  """The loss is the one of the completions alone, whatever the prompt would score."""
  batch, _ = _uneven_pair()
  batch = batch._replace(prompt_tokens=jnp.array([[0, 1]]), prompt_mask=jnp.ones((1, 2)))
  seen = []

  def apply_fn(params, rows):
    seen.append(rows)
    return params * jnp.ones(rows.tokens.shape)

  value, _ = ipo.loss(-1.0, None, batch, None, apply_fn=apply_fn, config=ipo.Config(tau=0.5))
  np.testing.assert_allclose(value, 4, rtol=1e-6)  # as without the prompt
  (rows,) = seen
  assert rows.tokens.shape == (2, 4)
  np.testing.assert_array_equal(rows.prompt_tokens, [[0, 1]])  # one prompt for both


def test_shared_prefix_inside_both_answers_changes_nothing_under_sum():
  """A prompt left inside chosen and rejected cancels in sums (in means it would not)."""
  rng = np.random.default_rng(8)
  ref, params = jnp.asarray(rng.normal(size=(2, ar.NUM_PREFIXES, 3)), jnp.float32)
  rows = np.array([7, 8])  # two completions of three tokens that share the first
  chosen, rejected = rows[:1], rows[1:]
  assert (ar.TOKENS[7, 0] == ar.TOKENS[8, 0]) and ar.MASK[rows].all()
  whole, inner = [], []
  for mask, losses in ((ar.MASK, whole), (ar.MASK * np.array([0, 1, 1]), inner)):
    ref_logps = sequences.sequence_logps(
      ar.apply_fn(ref, sequences.Sequences(ar.TOKENS, mask)), mask, reduction="sum"
    )
    batch = ar.preference_batch(ar.TOKENS, mask, ref_logps, chosen, rejected)
    for reduction in ("sum", "mean"):
      losses.append(_loss(params, batch, ar.apply_fn, tau=0.3, reduction=reduction)[0])
  np.testing.assert_allclose(whole[0], inner[0], rtol=1e-5)
  assert abs(whole[1] - inner[1]) > 1e-3


def test_eos_carries_gradient_where_pad_equals_eos():
  params = jnp.zeros((ar.NUM_PREFIXES, 3))
  short, long = 0, 14  # "EOS" and a completion without EOS
  batch = ar.preference_batch(ar.TOKENS, ar.MASK, ar.all_logps(params), [short], [long])
  grad = jax.grad(lambda p: _loss(p, batch, ar.apply_fn, tau=0.5)[0])(params)
  assert grad[0, ar.EOS] < 0  # descent makes the chosen EOS likelier


def test_cached_and_online_reference_give_equal_updates_and_no_random_number_is_drawn():
  rng = np.random.default_rng(9)
  ref = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)), jnp.float32)
  before = np.array(ref)
  params = ref + 0.1
  chosen, rejected = rng.integers(0, 15, (2, 8))
  optimizer, config = optax.adam(0.1), ipo.Config(tau=0.2)
  step = lambda state, batch, key: ipo.update(  # noqa: E731
    state, batch, key, apply_fn=ar.apply_fn, optimizer=optimizer, config=config
  )
  cached_logps = np.asarray(ar.all_logps(ref))  # once, before training
  cached = online = ipo.init(params, optimizer=optimizer, config=config)
  for seed in range(3):
    cached, _ = step(
      cached, ar.preference_batch(ar.TOKENS, ar.MASK, cached_logps, chosen, rejected),
      jax.random.key(seed),
    )  # fmt: skip
    online, _ = step(
      online, ar.preference_batch(ar.TOKENS, ar.MASK, ar.all_logps(ref), chosen, rejected),
      jax.random.key(100 + seed),
    )  # fmt: skip
  np.testing.assert_array_equal(cached.params, online.params)
  np.testing.assert_array_equal(ref, before)  # the reference is not the policy
  assert np.abs(cached.params - params).max() > 0.01


def test_content_of_padding_changes_nothing():
  rng = np.random.default_rng(10)
  params = jnp.asarray(rng.normal(size=(ar.NUM_PREFIXES, 3)), jnp.float32)
  other = np.where(ar.MASK > 0, ar.TOKENS, rng.integers(0, 3, ar.TOKENS.shape))
  assert (other != ar.TOKENS).any()
  chosen, rejected = rng.integers(0, 7, (2, 20))
  results = [
    jax.value_and_grad(lambda p, t=tokens: _loss(
      p, ar.preference_batch(t, ar.MASK, ar.all_logps(params) - 1, chosen, rejected), ar.apply_fn
    )[0])(params)
    for tokens in (ar.TOKENS, other)
  ]  # fmt: skip
  np.testing.assert_array_equal(results[0][0], results[1][0])
  np.testing.assert_array_equal(results[0][1], results[1][1])


# --- bad input ---


@pytest.mark.parametrize("tau", [0, -0.1, float("nan"), float("inf"), np.float32(0), "0.1"])
def test_bad_tau_raises(tau):
  with pytest.raises(ValueError, match="tau must be"):
    ipo.Config(tau=tau)
  with pytest.raises(ValueError, match="tau must be"):
    ipo.ipo_loss(jnp.zeros(1), jnp.zeros(1), tau=tau)


def test_traced_tau_is_not_tested():
  losses = jax.vmap(lambda tau: ipo.ipo_loss(jnp.zeros(1), jnp.zeros(1), tau=tau))(
    jnp.array([0.5, 1.0])
  )
  np.testing.assert_allclose(losses[:, 0], [1, 0.25])
  assert jax.vmap(lambda config: config.tau)(ipo.Config(tau=jnp.ones(2))).shape == (2,)


def test_bad_shapes_and_probabilities_raise():
  with pytest.raises(ValueError, match=r"chosen_log_ratios \[2\], rejected_log_ratios \[3\]"):
    ipo.ipo_loss(jnp.zeros(2), jnp.zeros(3), tau=1)
  with pytest.raises(ValueError, match="chosen_probs must have shape"):
    ipo.ipo_loss(jnp.zeros(2), jnp.zeros(2), tau=1, chosen_probs=jnp.ones(3))
  with pytest.raises(ValueError, match=r"chosen_probs must lie in"):
    ipo.ipo_loss(jnp.zeros(2), jnp.zeros(2), tau=1, chosen_probs=1.5)
  with pytest.raises(ValueError, match=r"preferences \[2, 3\], behaviour_probs \[3\]"):
    ipo.psi_po_target(np.ones((2, 3)), np.ones(3), psi=ipo.identity)
  with pytest.raises(ValueError, match="preferences must lie in"):
    ipo.psi_po_target(np.full((2, 2), 2.0), np.ones(2) / 2, psi=ipo.identity)
  with pytest.raises(ValueError, match=r"psi must be a function, .* got 'logit'"):
    ipo.psi_po_target(np.full((2, 2), 0.5), np.ones(2) / 2, psi="logit")
  batch, apply_fn = _uneven_pair()
  for bad in (
    batch._replace(chosen_mask=jnp.ones((1, 3))),
    batch._replace(rejected_ref_logps=jnp.ones(2)),
    batch._replace(chosen_ref_logps=jnp.ones((1, 1))),
    batch._replace(chosen_tokens=jnp.zeros((2, 4), int), chosen_mask=jnp.ones((2, 4))),
    batch._replace(prompt_tokens=jnp.zeros((1, 2), int)),
  ):
    with pytest.raises(ValueError):
      _loss(-1.0, bad, apply_fn)
  with pytest.raises(ValueError, match="apply_fn"):
    _loss(-1.0, batch, lambda params, rows: jnp.zeros(rows.tokens.shape[0]))
