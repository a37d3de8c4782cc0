"""Supervised training: its loss by hand, what is trained and what is frozen, and the convex case.

Tolerances of 1e-8 and below allow for rounding in float64.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import linear_model

from representation.baselines import supervised
from representation.networks import adapters, mlp, resnet

BATCH, INPUTS, FEATURES, CLASSES = 16, 6, 5, 3


def _augment(images, key):
  return images + jax.random.normal(key, images.shape) / 4


NETWORKS = supervised.Networks(
  adapters.Encoder(mlp.BatchNormMLP(8, FEATURES)), adapters.Predictor(nn.Dense(CLASSES)), _augment
)


def _batch(size=BATCH):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(size, INPUTS)))
  return supervised.Batch(images, jnp.asarray(rng.integers(0, CLASSES, size)))


def _start(optimizer, networks=NETWORKS, **options):
  """Returns a state whose running statistics are not those of the batch, and bound arguments."""
  keys = jax.random.split(jax.random.key(0))
  params, network_state = networks.encoder.init(keys[0], _batch().images)
  network_state = jax.tree.map(lambda leaf: leaf + 0.25, network_state)
  params = supervised.Params(params, networks.classifier.init(keys[1], jnp.zeros((1, FEATURES))))
  # Flax initialises in float32, also with x64.
  wide = jax.tree.map(
    lambda leaf: leaf.astype(jnp.result_type(float)), (params, network_state)
  )  # fmt: skip
  config = supervised.Config(**options)
  state = supervised.init(wide[0], optimizer=optimizer, config=config, network_state=wide[1])
  return state, {"apply_fn": networks, "optimizer": optimizer, "config": config}


def _scan(state, bound, num_steps):
  batch, step = _batch(), functools.partial(supervised.update, **bound)
  keys = jax.random.split(jax.random.key(1), num_steps)
  return jax.lax.scan(lambda state, key: step(state, batch, key), state, keys)


# --- the loss -------------------------------------------------------------------------------------


def test_loss_by_hand_and_against_numpy(x64):
  # softmax(log 1, log 2, log 5) = (1, 2, 5) / 8
  logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [4.0, 4.0, 8.0]]))
  found = supervised.supervised_loss(logits, np.array([0, 2, 2]))
  np.testing.assert_allclose(found, np.log([8, 8 / 5, 2]), atol=1e-12)
  rng = np.random.default_rng(0)
  logits, labels = 30 * rng.normal(size=(7, 4)), rng.integers(0, 4, 7)
  shifted = logits - logits.max(1, keepdims=True)
  expected = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(7), labels]
  np.testing.assert_allclose(
    supervised.supervised_loss(jnp.asarray(logits), labels), expected, atol=1e-10
  )
  gradient = jax.grad(lambda x: supervised.supervised_loss(x, labels).sum())(jnp.asarray(logits))
  probs = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
  np.testing.assert_allclose(gradient, probs - np.eye(4)[labels], atol=1e-12)


def test_loss_is_in_float32_for_bfloat16_logits():
  logits = jnp.zeros((2, 3), jnp.bfloat16)
  found = supervised.supervised_loss(logits, jnp.array([0, 1]))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, np.log(3), rtol=1e-6)  # rounding in float32


def test_labels_are_checked():
  logits, check = jnp.zeros((2, 3)), supervised.supervised_loss
  for labels, message in (
    ([0, 3], r"labels must lie in \[0, num_classes\) = \[0, 3\), got 0 to 3"),
    ([-1, 0], "labels must lie in"),
    ([0.0, 1.0], "labels must be integers"),
    ([0, 1, 2], r"labels must have shape \[B\] = \[2\], got \[3\]"),
    (np.eye(3, dtype=int)[:2], "labels must be integers of shape"),
  ):
    with pytest.raises(ValueError, match=message):
      check(logits, np.asarray(labels))
  with pytest.raises(ValueError, match="num_classes must be an integer >= 2, got 1"):
    check(logits[:, :1], np.zeros(2, int))
  # On the device they are not looked at, and NaN stops a run.
  found = check(logits, jnp.array([-1, 3]))
  assert np.isnan(found).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_equals_finite_differences_of_a_loss_in_numpy(frozen, x64):
  """The loss in NumPy also says which statistics each mode reads."""
  state, bound = _start(optax.sgd(0.1), frozen=frozen)
  batch, key = _batch(), jax.random.key(4)
  images = np.asarray(_augment(batch.images, key))

  def in_numpy(params):
    encoder, head = params
    hidden = images @ encoder["Dense_0"]["kernel"] + encoder["Dense_0"]["bias"]
    statistics = state.network_state["batch_stats"]["BatchNorm_0"]
    mean, var = statistics["mean"], statistics["var"]
    if not frozen:
      mean, var = hidden.mean(0), hidden.var(0)
    norm = encoder["BatchNorm_0"]
    hidden = (hidden - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    features = np.maximum(hidden, 0) @ encoder["Dense_1"]["kernel"]
    logits = features @ head["kernel"] + head["bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(BATCH), batch.labels]
    return losses.mean()

  def value(params):
    return supervised.loss(
      params, state, batch, key, apply_fn=bound["apply_fn"], config=bound["config"]
    )

  (found, _), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(state.params)
  params = jax.tree.map(np.asarray, state.params)
  np.testing.assert_allclose(found, in_numpy(params), atol=1e-12)
  rng = np.random.default_rng(1)
  direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
  if frozen:
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient.encoder)
    direction = direction._replace(encoder=jax.tree.map(np.zeros_like, params.encoder))
  step = 1e-6

  def moved(sign):
    return in_numpy(jax.tree.map(lambda p, d: p + sign * step * d, params, direction))

  expected = (moved(1) - moved(-1)) / (2 * step)
  slope = sum(
    np.vdot(g, d)
    for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
  )
  assert abs(slope) > 1e-3
  np.testing.assert_allclose(slope, expected, rtol=1e-7)  # the error of the difference is 1e-10


# --- what is trained ------------------------------------------------------------------------------


def test_a_frozen_encoder_and_its_statistics_keep_every_bit():
  optimizer = optax.adamw(0.1, weight_decay=0.5)  # the decay moves whatever it holds
  state, bound = _start(optimizer, frozen=True)
  after, metrics = _scan(state, bound, 40)
  before = state.params.encoder, state.network_state
  jax.tree.map(np.testing.assert_array_equal, (after.params.encoder, after.network_state), before)
  assert metrics["loss"][-1] < 0.9 * metrics["loss"][0]
  held = [leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim == 2]
  assert held == [(FEATURES, CLASSES)] * 2  # the moments of the classifier alone


def test_everything_is_trained_unless_frozen():
  state, bound = _start(optax.sgd(0.3))
  after, metrics = _scan(state, bound, 60)
  changed = jax.tree.map(
    lambda a, b: bool(np.abs(a - b).max() > 1e-4), (after.params, after.network_state),
    (state.params, state.network_state),
  )  # fmt: skip
  # Batch normalisation subtracts the bias before it.
  assert not changed[0].encoder["Dense_0"].pop("bias")
  assert all(jax.tree.leaves(changed)), changed
  assert metrics["loss"][-1] < 0.8 * metrics["loss"][0]
  assert metrics["supervised/accuracy"][-1] > metrics["supervised/accuracy"][0]


def test_prediction_reads_running_statistics_and_no_augmentation():
  state, _ = _start(optax.sgd(0.3))
  images = _batch().images
  whole = supervised.predict(state, images, apply_fn=NETWORKS)
  # Each image by itself has the same logits. 1e-5: other shapes are rounded in another order.
  alone = [supervised.predict(state, image[None], apply_fn=NETWORKS)[0] for image in images]
  np.testing.assert_allclose(whole, alone, atol=1e-5)


def test_frozen_features_and_weight_decay_are_the_logistic_regression_of_scikit_learn(x64):
  decay = 0.05
  optimizer = optax.chain(
    optax.add_decayed_weights(decay, mask=lambda params: {"kernel": True, "bias": False}),
    optax.sgd(1.0, momentum=0.9, nesterov=True),
  )
  state, bound = _start(optimizer, NETWORKS._replace(augment=None), frozen=True)
  after, _ = _scan(state, bound, 1000)
  batch, encoder = _batch(), NETWORKS.encoder
  features, _ = encoder(state.params.encoder, state.network_state, batch.images, train=False)
  # scikit-learn minimises C * sum of losses + |W|^2 / 2.
  reference = linear_model.LogisticRegression(C=1 / (decay * BATCH), tol=1e-10, max_iter=10_000)
  reference.fit(features, batch.labels)
  kernel = after.params.classifier["kernel"]
  np.testing.assert_allclose(kernel, reference.coef_.T, atol=1e-6)  # L-BFGS stops at 1e-10
  # Without a penalty on it, the bias is known up to a constant.
  bias = after.params.classifier["bias"]
  np.testing.assert_allclose(
    bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-6
  )


def test_learning_rates_under_vmap_share_the_frozen_encoder():
  """A small ResNet, whose operations a compiler counts: eight rates cost about one."""
  networks = supervised.Networks(
    adapters.Encoder(resnet.ResNet((1,), False, 1 / 8, "cifar")), adapters.Predictor(nn.Dense(3))
  )
  rng = np.random.default_rng(0)
  batch = supervised.Batch(
    jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32), jnp.array([0, 1, 2, 0])
  )
  params, network_state = networks.encoder.init(jax.random.key(0), batch.images)
  classifier = networks.classifier.init(jax.random.key(1), jnp.zeros((1, 8)))
  optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
  config = supervised.Config(frozen=True)
  state = supervised.init(
    supervised.Params(params, classifier), optimizer=optimizer, config=config,
    network_state=network_state,
  )  # fmt: skip
  axes = supervised.State(supervised.Params(None, 0), None, 0, None)  # type: ignore[arg-type]
  step = functools.partial(
    supervised.update, apply_fn=networks, optimizer=optimizer, config=config
  )  # fmt: skip
  many = jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))

  def start(rates):
    rates = jnp.asarray(rates)
    heads = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(rates)), state.params.classifier)
    opt_state = jax.vmap(optimizer.init)(heads)
    opt_state = opt_state._replace(hyperparams={"learning_rate": rates})
    return state._replace(params=supervised.Params(params, heads), opt_state=opt_state)

  rates, key = [0.1 * (index + 1) for index in range(8)], jax.random.key(0)
  costs = {
    count: many.lower(start(rates[:count]), batch, key).compile().cost_analysis()["flops"]
    for count in (1, 8)
  }
  assert costs[8] < 1.2 * costs[1], costs  # 8 times, where each rate has an encoder of its own
  found, _ = many(start(rates), batch, key)
  jax.tree.map(np.testing.assert_array_equal, found.params.encoder, params)
  for index, rate in enumerate(rates):
    alone = state._replace(
      opt_state=state.opt_state._replace(hyperparams={"learning_rate": jnp.float32(rate)})
    )
    one, _ = step(alone, batch, key)
    np.testing.assert_allclose(  # 1e-6: another program rounds in another order
      found.params.classifier["kernel"][index], one.params.classifier["kernel"], atol=1e-6
    )


# --- micro-batches --------------------------------------------------------------------------------


def test_micro_batches_need_a_frozen_encoder():
  with pytest.raises(ValueError, match="num_microbatches must be 1 unless frozen is True, got 2"):
    supervised.Config(num_microbatches=2)
  with pytest.raises(ValueError, match="frozen must be one of True, False, got 'yes'"):
    supervised.Config(frozen="yes")
  networks = NETWORKS._replace(augment=None)
  found = []
  for count in (1, 4):
    state, bound = _start(optax.sgd(0.1), networks, frozen=True, num_microbatches=count)
    found.append(supervised.update(state, _batch(), jax.random.key(0), **bound))
  # 1e-6: the mean over parts is rounded in another order.
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *found)
