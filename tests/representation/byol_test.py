"""BYOL: its loss by hand and in NumPy, its passes one by one, its target, and its ablations.

Tolerances of 1e-8 and below allow for rounding in float64.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from representation import byol, byol_variants, moving_targets
from representation.baselines import grace
from representation.networks import adapters, mlp

BATCH, INPUTS, FEATURES, WIDTH, CLASSES = 16, 6, 5, 4, 3


def _views(inputs, key):
  return [inputs + jax.random.normal(k, inputs.shape) / 4 for k in jax.random.split(key)]


def _identity(params, network_state, inputs, *, train):
  del params, train
  return inputs, network_state


def _linear(params, network_state, inputs, *, train):
  del train
  return inputs @ params, network_state


NETWORKS = byol.Networks(
  adapters.Encoder(mlp.BatchNormMLP(8, FEATURES)),
  adapters.Encoder(mlp.BatchNormMLP(8, WIDTH)),
  adapters.Encoder(mlp.BatchNormMLP(8, WIDTH)),
  adapters.Predictor(nn.Dense(CLASSES)),
  _views,
)


def _batch(seed=0, size=BATCH):
  rng = np.random.default_rng(seed)
  return byol.Batch(jnp.asarray(rng.normal(size=(size, INPUTS))), rng.integers(0, CLASSES, size))


def _wide(tree):
  """Returns the tree in the default float dtype: Flax initialises in float32, also with x64."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), tree)


def _parts(seed):
  keys = jax.random.split(jax.random.key(seed), 4)
  made = [
    network.init(key, jnp.zeros((1, width)))
    for network, key, width in zip(NETWORKS, keys, (INPUTS, FEATURES, WIDTH), strict=False)
  ]
  params, states = zip(*made, strict=True)
  classifier = NETWORKS.classifier.init(keys[3], jnp.zeros((1, FEATURES)))
  return _wide((byol.Parts(*params, classifier), byol.Parts(*states)))


def _start(**options):
  (params, online), (target_params, target) = _parts(0), _parts(1)
  config, optimizer = byol.Config(**options), optax.sgd(0.1)
  state = byol.init(
    params,
    optimizer=optimizer,
    config=config,
    target_params=byol.Parts(*target_params[:2]) if config.target == "moving" else None,
    network_state=byol.NetworkState(online, byol.Parts(*target[:2])),
  )
  return state, {"apply_fn": NETWORKS, "optimizer": optimizer, "config": config}


_compiled_loss = jax.jit(byol.loss, static_argnames="apply_fn")
_compiled_gradient = jax.jit(jax.grad(byol.loss, has_aux=True), static_argnames="apply_fn")


def _loss(state, batch, bound, key=None, run=_compiled_loss):
  key = jax.random.key(4) if key is None else key
  return run(state.params, state, batch, key, apply_fn=bound["apply_fn"], config=bound["config"])


@functools.partial(jax.jit, static_argnames="network")
def _apply(network, params, network_state, inputs):
  return network(params, network_state, inputs, train=True)


def _unit(rows):
  return np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)


# --- the loss -------------------------------------------------------------------------------------


def test_loss_by_hand_and_against_numpy(x64):
  rng = np.random.default_rng(0)
  predictions, targets = rng.normal(size=(2, 7, 5))
  found = byol.byol_loss(jnp.asarray(predictions), jnp.asarray(targets))
  expected = np.sum((_unit(predictions) - _unit(targets)) ** 2, axis=1)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  # The gradient is orthogonal to the prediction and falls with its norm.
  gradient = jax.grad(lambda p: byol.byol_loss(p, targets).sum())(jnp.asarray(predictions))
  p, t = _unit(predictions), _unit(targets)
  length = np.linalg.norm(predictions, axis=1, keepdims=True)
  expected = -2 / length * (t - p * np.sum(p * t, axis=1, keepdims=True))
  np.testing.assert_allclose(gradient, expected, atol=1e-12)
  np.testing.assert_allclose(np.sum(gradient * predictions, axis=1), 0, atol=1e-12)
  to_targets = jax.grad(lambda t: byol.byol_loss(predictions, t).sum())(jnp.asarray(targets))
  np.testing.assert_array_equal(to_targets, 0)
  with pytest.raises(ValueError, match="shapes must be equal"):
    byol.byol_loss(predictions, targets[:3])


def test_loss_adds_both_directions_of_views_that_pass_alone(x64):
  """Calls the networks one by one, each view alone, and averages in NumPy."""
  state, bound = _start()
  batch, key = _batch(), jax.random.key(4)
  views = _views(batch.images, key)

  def run(network, name, tree, states, inputs):
    rows, after = _apply(network, getattr(tree, name), getattr(states, name), inputs)
    return rows, states._replace(**{name: after})

  online, target = state.network_state
  predictions, targets, features = [], [], []
  for view in views:
    rows, online = run(NETWORKS.encoder, "encoder", state.params, online, view)
    features.append(rows)
    rows, online = run(NETWORKS.projector, "projector", state.params, online, rows)
    rows, online = run(NETWORKS.predictor, "predictor", state.params, online, rows)
    predictions.append(_unit(rows))
    rows, target = run(NETWORKS.encoder, "encoder", state.target_params, target, view)
    rows, target = run(NETWORKS.projector, "projector", state.target_params, target, rows)
    targets.append(_unit(rows))
  squares = [(predictions[i] - targets[1 - i]) ** 2 for i in range(2)]
  expected = np.mean(np.sum(squares[0] + squares[1], axis=1))
  logits = np.asarray(NETWORKS.classifier(state.params.classifier, features[0]))
  chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  cross_entropy = -np.mean(np.log(chances[np.arange(BATCH), batch.labels]))
  value, (metrics, network_state) = _loss(state, batch, bound, key)
  np.testing.assert_allclose(metrics["byol/prediction_loss"], expected, atol=1e-10)
  np.testing.assert_allclose(metrics["byol/cross_entropy"], cross_entropy, atol=1e-10)
  np.testing.assert_allclose(value, expected + cross_entropy, atol=1e-10)
  assert metrics["byol/accuracy"] == np.mean(logits.argmax(1) == batch.labels)
  # Running statistics pass through the first view and then the second, in each network alone.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-12),
    network_state, byol.NetworkState(online, target),
  )  # fmt: skip
  # Both views together would be normalised by other means.
  together, _ = _apply(
    NETWORKS.encoder, state.params.encoder, online.encoder, jnp.concatenate(views)
  )
  assert np.abs(together[:BATCH] - features[0]).max() > 1e-3


def test_the_classifier_never_reaches_the_encoder(x64):
  state, bound = _start()
  batch = _batch()

  changed = batch._replace(labels=(batch.labels + 1) % CLASSES)
  one, other = (_loss(state, seen, bound, run=_compiled_gradient)[0] for seen in (batch, changed))
  jax.tree.map(np.testing.assert_array_equal, one[:3], other[:3])
  assert np.abs(one.classifier["kernel"] - other.classifier["kernel"]).max() > 1e-3


def test_views_may_come_with_the_batch(x64):
  state, bound = _start()
  batch, key = _batch(), jax.random.key(4)
  given = batch._replace(images=tuple(_views(batch.images, key)))
  bound["apply_fn"] = NETWORKS._replace(views=None)
  value, _ = _loss(state, given, bound)
  assert value == _loss(state, batch, bound | {"apply_fn": NETWORKS}, key)[0]


def test_a_collapsed_network_is_visible(x64):
  """If every projection is equal, the loss falls to 0 and the mean cosine is 1."""
  state, bound = _start(predictor="none", target="stopped")
  constant = jax.tree.map(jnp.zeros_like, state.params.projector)
  constant["BatchNorm_0"]["bias"] += 1.0
  constant["Dense_1"]["kernel"] += 1.0
  state = state._replace(params=state.params._replace(projector=constant))
  _, (metrics, _) = _loss(state, _batch(), bound)
  np.testing.assert_allclose(metrics["byol/prediction_loss"], 0, atol=1e-12)
  np.testing.assert_allclose(metrics["collapse/mean_cosine"], 1, atol=1e-12)


# --- the target -----------------------------------------------------------------------------------


def test_the_target_follows_after_the_step(x64):
  state, bound = _start(target_decay=0.9, num_steps=10)
  state = state._replace(step=jnp.asarray(5, jnp.int32))
  after, metrics = byol.update(state, _batch(), jax.random.key(0), **bound)
  # Step 5 of 10: 1 - 0.1 (1 + cos(pi / 2)) / 2.
  np.testing.assert_allclose(metrics["byol/target_decay"], 0.95)
  trees = after.target_params, state.target_params, byol.Parts(*after.params[:2])
  for new, old, online in zip(*map(jax.tree.leaves, trees), strict=True):
    # 1e-7: the decay is a float32 scalar.
    np.testing.assert_allclose(new, 0.95 * old + 0.05 * online, atol=1e-7)


def test_a_random_target_stays_and_only_its_statistics_move():
  state, bound = _start(target_decay=1.0)
  after, _ = byol.update(state, _batch(), jax.random.key(0), **bound)
  jax.tree.map(np.testing.assert_array_equal, after.target_params, state.target_params)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), after.network_state.target, state.network_state.target
  )
  assert all(move > 0 for move in jax.tree.leaves(moved))


def test_without_a_target_the_online_network_is_its_own(x64):
  """As with a moving target whose parameters equal the online network's."""
  stopped, bound = _start(target="stopped")
  assert stopped.target_params == ()
  batch, key = _batch(), jax.random.key(0)
  after, metrics = byol.update(stopped, batch, key, **bound)
  assert "byol/target_decay" not in metrics
  moving, moving_bound = _start()
  moving = moving._replace(target_params=byol.Parts(*moving.params[:2]))
  expected, expected_metrics = byol.update(moving, batch, key, **moving_bound)
  np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], atol=1e-12)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-12), after.params, expected.params
  )
  # SimCLR's target passes the gradient on, so the same loss has another gradient.
  online, online_bound = _start(target="online")
  _, simclr_metrics = byol.update(online, batch, key, **online_bound)
  np.testing.assert_allclose(simclr_metrics["loss"], metrics["loss"], atol=1e-12)
  assert abs(simclr_metrics["grad_norm"] - metrics["grad_norm"]) > 1e-3


# --- the ablations --------------------------------------------------------------------------------


def test_the_far_end_of_the_interpolation_is_simclr(x64):
  """GRACE's loss is NT-Xent averaged over both directions; without beta the loss is BYOL's."""
  options = {"target": "online", "predictor": "none", "temperature": 0.3}
  batch, key = _batch(), jax.random.key(4)
  rows = []
  state, bound = _start(negative_weight=1.0, **options)
  online = state.network_state.online
  for view in _views(batch.images, key):
    features, _ = _apply(NETWORKS.encoder, state.params.encoder, online.encoder, view)
    rows.append(_apply(NETWORKS.projector, state.params.projector, online.projector, features)[0])
  first, second = rows
  nt_xent = 2 * jnp.mean(grace.grace_loss(first, second, temperature=0.3))
  _, (metrics, _) = _loss(state, batch, bound, key)
  np.testing.assert_allclose(metrics["byol/prediction_loss"], 4 + 0.6 * nt_xent, atol=1e-10)
  found = []
  for weight in (None, 0.0, 0.5):
    state, bound = _start(negative_weight=weight, **options)
    found.append(_loss(state, batch, bound, key)[1][0]["byol/prediction_loss"])
  np.testing.assert_allclose(found[0], found[1], atol=1e-12)
  half = (found[0] + metrics["byol/prediction_loss"]) / 2  # the loss is linear in beta
  np.testing.assert_allclose(found[2], half, atol=1e-10)


def test_negatives_compare_with_all_images_but_the_own(x64):
  """A slow sum over pairs, with targets that are not the predictions."""
  rng = np.random.default_rng(0)
  predictions, same, other = rng.normal(size=(3, 5, 4))
  p, s, o = map(_unit, (predictions, same, other))
  expected = [
    2 * 0.4 * np.log(
      sum(np.exp(p[i] @ s[j] / 0.4) for j in range(5) if j != i)
      + sum(np.exp(p[i] @ o[j] / 0.4) for j in range(5))
    )
    for i in range(5)
  ]  # fmt: skip
  found = byol_variants.negatives_loss(
    *map(jnp.asarray, (predictions, same, other)), temperature=0.4
  )
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_linear_predictor_is_numpys_least_squares(x64):
  rng = np.random.default_rng(0)
  inputs, targets = rng.normal(size=(30, 4)), rng.normal(size=(30, 3))
  found = byol_variants.least_squares_predictor(jnp.asarray(inputs), jnp.asarray(targets))
  np.testing.assert_allclose(found, np.linalg.lstsq(inputs, targets)[0], atol=1e-10)
  # With a ridge the result is finite where directions are missing, and close to the best.
  narrow = inputs @ rng.normal(size=(4, 2)) @ rng.normal(size=(2, 4))
  found = byol_variants.least_squares_predictor(
    jnp.asarray(narrow), jnp.asarray(targets), ridge=1e-9
  )
  best = narrow @ np.linalg.lstsq(narrow, targets)[0]
  np.testing.assert_allclose(narrow @ found, best, atol=1e-6)  # the ridge moves it by 1e-8


@pytest.mark.parametrize("target", ["moving", "stopped"])
def test_no_other_linear_predictor_is_better(x64, target):
  """Random predictors have a larger loss, and so has a small change of NumPy's solution."""
  state, bound = _start(predictor="least_squares", target=target, ridge=0.0, normalise=False)
  batch, key = _batch(size=64), jax.random.key(4)
  _, (metrics, _) = _loss(state, batch, bound, key)
  best, online = metrics["byol/prediction_loss"], state.network_state.online

  def project(view):
    features, _ = _apply(NETWORKS.encoder, state.params.encoder, online.encoder, view)
    return _apply(NETWORKS.projector, state.params.projector, online.projector, features)[0]

  projections = [project(view) for view in _views(batch.images, key)]

  def loss_of(weights):
    params = state.params._replace(predictor=jnp.asarray(weights))
    linear = {
      "apply_fn": NETWORKS._replace(predictor=_linear),
      "config": byol.Config(target=target, normalise=False),
    }
    return _loss(state._replace(params=params), batch, linear, key)[1][0]["byol/prediction_loss"]

  rng = np.random.default_rng(0)
  assert all(loss_of(rng.normal(size=(WIDTH, WIDTH))) > best for _ in range(3))
  if target == "stopped":
    inputs, outputs = jnp.concatenate(projections), jnp.concatenate(projections[::-1])
    weights = np.linalg.lstsq(inputs, outputs)[0]
    np.testing.assert_allclose(loss_of(weights), best, atol=1e-10)
    assert loss_of(weights + 1e-3 * rng.normal(size=weights.shape)) > best


def test_the_linear_predictor_gets_no_gradient(x64):
  """With normalisation the fit does not minimise the loss, so its gradient would show."""
  state, bound = _start(predictor="least_squares", target="stopped", ridge=0.0)
  batch, key, online = _batch(size=64), jax.random.key(4), state.network_state.online
  rows = []
  for view in _views(batch.images, key):
    features, _ = _apply(NETWORKS.encoder, state.params.encoder, online.encoder, view)
    rows.append(_apply(NETWORKS.projector, state.params.projector, online.projector, features)[0])
  targets = [moving_targets.normalise(projections) for projections in rows[::-1]]
  fixed = jnp.asarray(np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets))[0])
  found, _ = _loss(state, batch, bound, key, run=_compiled_gradient)
  linear = {
    "apply_fn": NETWORKS._replace(predictor=_linear),
    "config": byol.Config(target="stopped"),
  }
  state = state._replace(params=state.params._replace(predictor=fixed))
  expected, _ = _loss(state, batch, linear, key, run=_compiled_gradient)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-10), found[:2], expected[:2]
  )  # fmt: skip


def test_linear_byol_keeps_the_gram_matrix(x64):
  """With linear networks, no normalisation and the best predictor, Phi^T dPhi/dt is zero.

  This is the invariant that keeps self-predictive learning from collapsing (arXiv:2212.03319,
  theorem 1), for views in place of successive states. A predictor that is not the best breaks it.
  """
  rng = np.random.default_rng(0)
  batch = byol.Batch(jnp.asarray(rng.normal(size=(40, INPUTS))))
  networks = byol.Networks(_linear, _identity, _linear, None, _views)
  params = byol.Parts(jnp.asarray(rng.normal(size=(INPUTS, 3))), (), jnp.eye(3))

  def drift(predictor):
    config = byol.Config(target="stopped", predictor=predictor, normalise=False, ridge=0.0)
    state = byol.init(params, optimizer=optax.sgd(0.1), config=config)
    bound = {"apply_fn": networks, "config": config}
    gradient, _ = _loss(state, batch, bound, run=_compiled_gradient)
    assert np.abs(gradient.encoder).max() > 1e-2
    return np.abs(params.encoder.T @ gradient.encoder).max()

  assert drift("least_squares") < 1e-10
  assert drift("network") > 1e-2


@pytest.mark.slow
def test_training_collapses_without_predictor_and_target_and_only_then():
  """300 steps on random vectors, whose views have noise added."""
  batch, found = _batch(size=128)._replace(labels=None), {}
  networks = NETWORKS._replace(classifier=None)
  for name, options in {
    "byol": {"target_decay": 0.9, "num_steps": 300},
    "neither": {"target": "stopped", "predictor": "none"},
  }.items():
    state, bound = _start(**options)
    bound["apply_fn"] = networks
    step = functools.partial(byol.update, **bound)
    _, metrics = jax.lax.scan(
      lambda state, key, step=step: step(state, batch, key),
      state, jax.random.split(jax.random.key(1), 300),
    )  # fmt: skip
    found[name] = {key: np.asarray(values)[-50:].mean() for key, values in metrics.items()}
  # Over two seeds and two learning rates the mean cosine is at most 0.27 and at least 0.998.
  assert found["byol"]["collapse/mean_cosine"] < 0.6 and found["byol"]["loss"] > 0.1
  assert found["neither"]["collapse/mean_cosine"] > 0.95 and found["neither"]["loss"] < 0.05


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"target_decay": 1.1}, "target_decay must lie in"),
    ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
    ({"target": "ema"}, "target must be one of 'moving', 'stopped', 'online', got 'ema'"),
    ({"predictor": "linear"}, "predictor must be one of 'network', 'none', 'least_squares'"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"negative_weight": -1.0}, "negative_weight must be finite and not negative"),
    ({"negative_weight": 1.0, "normalise": False}, "normalise must be True with a negative_weight"),
    ({"ridge": -1.0}, "ridge must be finite and not negative"),
    ({"num_microbatches": 2}, "num_microbatches must be 1, got 2"),
  ],
)
def test_bad_hyperparameters_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    byol.Config(**options)


def test_missing_parts_are_refused():
  state, bound = _start()
  with pytest.raises(ValueError, match="apply_fn has no predictor"):
    _loss(state, _batch(), bound | {"apply_fn": NETWORKS._replace(predictor=None)})
  with pytest.raises(ValueError, match="labels must be given to train a classifier"):
    _loss(state, _batch()._replace(labels=None), bound)
  with pytest.raises(ValueError, match="target_params must be None with target='stopped'"):
    byol.init(
      state.params, optimizer=bound["optimizer"], config=byol.Config(target="stopped"),
      target_params=state.target_params,
    )  # fmt: skip
