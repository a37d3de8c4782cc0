"""QR-DQN and DQN: losses worked by hand, their limits and optima, and what the target reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_theory import qr_dqn, qtd
from rl_theory.baselines import dqn
from rl_theory.networks import mlp


def _slow_loss(theta, targets, kappa):
  """The definition, with loops."""
  total = 0.0
  for i, quantile in enumerate(theta):
    level = (2 * i + 1) / (2 * len(theta))
    rho = []
    for target in targets:
      u = target - quantile
      huber = u**2 / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)
      rho.append(abs(level - (u < 0)) * (huber / kappa if kappa else abs(u)))
    total += np.mean(rho)
  return total


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0, 10.0])
def test_the_loss_is_its_definition(kappa, x64):
  rng = np.random.default_rng(0)
  theta, targets = rng.normal(size=(4, 5)), rng.normal(size=(4, 7))  # batch, N and M differ
  found = qr_dqn.quantile_huber_loss(jnp.asarray(theta), jnp.asarray(targets), kappa=kappa)
  expected = [_slow_loss(*pair, kappa) for pair in zip(theta, targets, strict=True)]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_losses_worked_by_hand():
  # One median at 0, targets 2 and -0.5: |1/2 - 1{u < 0}| is 1/2 for both.
  theta, targets = jnp.zeros((1, 1)), jnp.array([[2.0, -0.5]])
  for kappa, by_hand in ((1.0, (0.5 * 1.5 + 0.5 * 0.125) / 2), (0.0, (1.0 + 0.25) / 2)):
    found = qr_dqn.quantile_huber_loss(theta, targets, kappa=kappa)
    np.testing.assert_allclose(found, [by_hand], rtol=1e-6)
  # Levels 1/4 and 3/4. An estimate that is too high is pushed down with the weight 1 - tau.
  too_high = qr_dqn.quantile_huber_loss(jnp.array([3.0, 0.0]), jnp.array([0.0]), kappa=0.0)
  np.testing.assert_allclose(too_high, 0.75 * 3, rtol=1e-6)
  # The sum over quantiles and the mean over targets: three targets that are equal are one target.
  one, three = (
    qr_dqn.quantile_huber_loss(jnp.array([0.0, 1.0]), jnp.full(count, 4.0)) for count in (1, 3)
  )
  np.testing.assert_allclose([one, three], 0.25 * 3.5 + 0.75 * 2.5, rtol=1e-6)


def test_rlax_multiplies_by_kappa_and_agrees_at_one_and_zero(x64):
  rng = np.random.default_rng(1)
  theta, targets = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=7))

  def theirs(kappa):
    """Its convention: |tau - 1{delta < 0}| times the Huber loss, mean over targets, then sum."""
    delta = targets[None, :] - theta[:, None]
    huber = optax.huber_loss(delta, delta=kappa) if kappa else jnp.abs(delta)
    weight = jnp.abs((jnp.arange(5) + 0.5)[:, None] / 5 - (delta < 0))
    return jnp.sum(jnp.mean(weight * huber, axis=-1))

  for kappa, factor in ((0.0, 1.0), (1.0, 1.0), (0.25, 0.25)):
    ours = qr_dqn.quantile_huber_loss(theta, targets, kappa=kappa)
    np.testing.assert_allclose(theirs(kappa), factor * ours, rtol=1e-12)


def test_the_pinball_gradient_is_quantile_td_also_at_ties(x64):
  rng = np.random.default_rng(2)
  theta = jnp.asarray(rng.integers(-2, 3, (6, 5)), float)  # integers: many errors are exactly 0
  targets = jnp.asarray(rng.integers(-2, 3, (6, 4)), float)
  below = np.mean(np.asarray(targets)[:, None] < np.asarray(theta)[:, :, None], axis=-1)
  expected = -((np.arange(5) + 0.5) / 5 - below)

  def total(theta, kappa):
    return jnp.sum(qr_dqn.quantile_huber_loss(theta, targets, kappa=kappa))

  for kappa in (0.0, jnp.zeros(())):  # a Python number and, under jit, a traced one
    np.testing.assert_allclose(jax.jit(jax.grad(total))(theta, kappa), expected, atol=1e-12)
  # The limit, where no error is between 0 and kappa.
  apart = theta + 0.5
  found = jax.grad(total)(apart, 1e-6)
  np.testing.assert_allclose(found, jax.grad(total)(apart, 0.0), atol=1e-12)


def test_a_traced_kappa_of_zero_gives_finite_gradients():
  theta, targets = jnp.array([[0.0, 1e30, -1e30]]), jnp.array([[0.0, 1e30]])
  grads = jax.vmap(
    jax.grad(lambda t, kappa: jnp.sum(qr_dqn.quantile_huber_loss(t, targets, kappa=kappa))),
    in_axes=(None, 0),
  )(theta, jnp.array([0.0, 1e-30, 1.0]))
  assert bool(jnp.all(jnp.isfinite(grads)))


def test_the_loss_is_smallest_at_the_quantiles(x64):
  samples = jnp.asarray(np.random.default_rng(3).exponential(size=400))
  truth = jnp.quantile(samples, qtd.quantile_levels(8))

  def value(theta):
    return qr_dqn.quantile_huber_loss(theta, samples, kappa=0.0)

  def descend(theta, rate):
    return theta - rate * jax.grad(value)(theta), None

  rates = jnp.repeat(0.5 ** jnp.arange(12.0), 60)  # of subgradient steps
  theta, _ = jax.lax.scan(descend, jnp.zeros(8), rates)
  # Neighbouring order statistics of 400 samples: the minimiser is any point between two of them.
  gaps = np.diff(np.sort(samples))
  places = np.searchsorted(np.sort(samples), truth).clip(1, 399) - 1
  assert np.all(np.abs(theta - truth) <= gaps[places] + 1e-3)
  for shift in (-0.1, 0.1):
    assert value(truth) < value(truth + shift)


def _transitions(**changes):
  batch = qr_dqn.Batch(
    observations=jnp.eye(2)[:1], actions=jnp.array([1]), rewards=jnp.array([1.0]),
    next_observations=jnp.eye(2)[1:], discounts=jnp.array([0.5]),
    next_legal=jnp.ones((1, 2), bool),
  )  # fmt: skip
  return batch._replace(**changes)


def _table(params, observations):
  return jnp.tensordot(observations, params, 1)


_SGD = optax.sgd(0.0)


def test_the_target_is_greedy_by_the_mean_and_never_by_each_quantile():
  # At the next state the means are 2 and 3: action 1. The largest of each quantile would be (3, 4).
  params = jnp.array([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [3.0, 3.0]]])
  config = qr_dqn.Config(kappa=0.0)
  state = qr_dqn.init(params, optimizer=_SGD, config=config)

  def loss(batch):
    return qr_dqn.loss(params, state, batch, None, apply_fn=_table, config=config)[0]

  def by_hand(targets):
    return qr_dqn.quantile_huber_loss(jnp.zeros(2), jnp.array(targets), kappa=0.0)

  np.testing.assert_allclose(loss(_transitions()), by_hand([2.5, 2.5]), rtol=1e-6)
  assert by_hand([2.5, 2.5]) != by_hand([2.5, 3.0])
  only_first = jnp.array([[True, False]])
  np.testing.assert_allclose(
    loss(_transitions(next_legal=only_first)), by_hand([1.0, 3.0]), rtol=1e-6
  )
  at_the_end = _transitions(discounts=jnp.zeros(1), next_legal=jnp.zeros((1, 2), bool))
  np.testing.assert_allclose(loss(at_the_end), by_hand([1.0, 1.0]), rtol=1e-6)


@pytest.mark.parametrize("module", [qr_dqn, dqn])
def test_double_lets_the_learning_network_choose(module):
  # The learning network prefers action 0, the target network action 1.
  online, target = jnp.array([[0.0, 0.0], [5.0, 4.0]]), jnp.array([[0.0, 0.0], [1.0, 2.0]])
  if module is qr_dqn:
    online, target = online[..., None], target[..., None]
  for double, target_value in ((False, 1 + 0.5 * 2), (True, 1 + 0.5 * 1)):
    config = module.Config(double=double, kappa=100.0)
    state = module.init(target, optimizer=_SGD, config=config)
    found, _ = module.loss(online, state, _transitions(), None, apply_fn=_table, config=config)
    # One quantile at the level 1/2 and a quadratic loss: half of DQN's, divided by kappa.
    factor = 1 / 200 if module is qr_dqn else 1.0
    np.testing.assert_allclose(found, factor * target_value**2 / 2, rtol=1e-5)


def test_dqn_worked_by_hand():
  params = jnp.array([[0.0, 0.5], [1.0, 4.0]])
  state = dqn.init(params, optimizer=_SGD, config=dqn.Config())

  def grad(batch):
    return jax.grad(
      lambda p: dqn.loss(p, state, batch, None, apply_fn=_table, config=dqn.Config())[0]
    )(params)

  # The target is 1 + 0.5 * 4 = 3; the error 2.5 is clipped to 1.
  np.testing.assert_allclose(grad(_transitions()), [[0, -1.0], [0, 0]], atol=1e-6)
  ended = _transitions(discounts=jnp.zeros(1))  # the target is 1, the error 0.5
  np.testing.assert_allclose(grad(ended), [[0, -0.5], [0, 0]], atol=1e-6)


def test_a_large_kappa_gives_the_squared_error_in_float32():
  values = jnp.array([1e-3, -0.02, 0.7])
  grads = jax.grad(lambda x: jnp.sum(dqn.huber_loss(x, jnp.zeros(3), kappa=1e6)))(values)
  np.testing.assert_allclose(grads, values, rtol=1e-6)


def test_the_target_network_moves_every_period():
  config = qr_dqn.Config(target_period=3)
  optimizer = optax.sgd(0.1)
  params = jnp.array([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [3.0, 3.0]]])
  state = qr_dqn.init(params, optimizer=optimizer, config=config)
  for step in range(1, 8):
    before = state.target_params
    state, _ = qr_dqn.update(
      state, _transitions(), None, apply_fn=_table, optimizer=optimizer, config=config
    )
    expected = state.params if step % 3 == 0 else before
    np.testing.assert_array_equal(state.target_params, expected)
    assert np.any(np.asarray(state.params) != np.asarray(before))


def test_the_quantile_network_has_the_hidden_layers_of_the_plain_one():
  observations = jnp.ones((3, 5))
  plain, wide = mlp.MLP(4, (7,)), mlp.QuantileMLP(4, 6, (7,))
  params = wide.init(jax.random.key(0), observations)
  assert wide.apply(params, observations).shape == (3, 4, 6)
  hidden = plain.init(jax.random.key(0), observations)["params"]["Dense_0"]["kernel"]
  assert params["params"]["MLP_0"]["Dense_0"]["kernel"].shape == hidden.shape


def test_integers_and_lists_have_the_loss_of_floats():
  theta, targets = [0, 3], [1, 2, 5]
  expected = qr_dqn.quantile_huber_loss(jnp.array(theta, float), jnp.array(targets, float))
  for convert in (list, np.array, jnp.array):
    assert qr_dqn.quantile_huber_loss(convert(theta), convert(targets)) == expected


def test_bad_arguments_name_themselves():
  with pytest.raises(ValueError, match="kappa must be finite and not negative"):
    qr_dqn.Config(kappa=-1.0)
  with pytest.raises(ValueError, match="kappa must be positive"):
    dqn.Config(kappa=0.0)
  with pytest.raises(ValueError, match="target_period must be an integer"):
    qr_dqn.Config(target_period=0)
  with pytest.raises(ValueError, match="must agree in their leading axes"):
    qr_dqn.quantile_huber_loss(jnp.zeros((4, 2)), jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match="targets must not be empty"):
    qr_dqn.quantile_huber_loss(jnp.zeros((4, 2)), jnp.zeros((4, 0)))
  with pytest.raises(ValueError, match="shapes must be equal"):
    dqn.huber_loss(jnp.zeros((4, 1)), jnp.zeros(4))
