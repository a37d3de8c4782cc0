"""Nearest neighbours and linear layers against NumPy and scikit-learn on fixed features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.neighbors

from representation import image_probes, probes


def _data(num_rows=360, num_features=6, num_classes=4, noise=1.0, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(num_rows) % num_classes
  features = rng.normal(size=(num_classes, num_features))[labels]
  features = features + noise * rng.normal(size=features.shape)
  return features.astype(np.float32), labels


def _split(test=100, **kwargs):
  features, labels = _data(**kwargs)
  return features[test:], labels[test:], features[:test], labels[:test]


def _sorted_cosines(features, queries, num_neighbours):
  """Rows and cosines by a full matrix in float64; the stable sort puts lower rows first."""
  features, queries = (
    rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for rows in (features.astype(float), queries.astype(float))
  )
  cosines = queries @ features.T
  rows = np.argsort(-cosines, axis=1, kind="stable")[:, :num_neighbours]
  return rows, np.take_along_axis(cosines, rows, axis=1)


# --- nearest neighbours ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_cosines", [image_probes._MAX_COSINES, 260 * 7, 1])
def test_neighbours_equal_a_sort_of_all_cosines_in_chunks_of_any_size(monkeypatch, max_cosines):
  monkeypatch.setattr(image_probes, "_MAX_COSINES", max_cosines)
  jax.clear_caches()  # the chunk is chosen when the function is traced
  features, _, queries, _ = _split()
  rows, cosines = image_probes.neighbour_rows(features, queries, num_neighbours=9)
  expected_rows, expected = _sorted_cosines(features, queries, 9)
  np.testing.assert_array_equal(rows, expected_rows)
  np.testing.assert_allclose(cosines, expected, atol=1e-6)  # float32


@pytest.mark.parametrize("num_neighbours, temperature", [(1, 0.07), (20, 0.07), (260, 0.5)])
def test_scores_equal_those_of_numpy_and_scikit_learn(num_neighbours, temperature):
  features, labels, queries, _ = _split()
  scores = image_probes.nearest_neighbours(
    features, labels, queries, num_classes=4, num_neighbours=num_neighbours, temperature=temperature
  )
  rows, cosines = _sorted_cosines(features, queries, num_neighbours)
  weights = np.exp(cosines / temperature)
  expected = np.stack([np.sum(weights * (labels[rows] == label), 1) for label in range(4)], axis=1)
  expected /= weights.sum(1, keepdims=True)
  # float32 cosines are divided by 0.07, so weights have errors of about 1e-6.
  np.testing.assert_allclose(scores, expected, atol=1e-5)
  model = sklearn.neighbors.KNeighborsClassifier(
    num_neighbours, metric="cosine", weights=lambda far: np.exp((1 - far) / temperature)
  ).fit(features, labels)
  np.testing.assert_array_equal(np.argmax(scores, 1), model.predict(queries))


def test_ties_go_to_the_lower_row_and_the_lower_class():
  # Rows point along the axes, so their cosines are exactly 0 or 1 in any order of summation.
  features = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 1, 0]]
  rows, _ = image_probes.neighbour_rows(features, features[[1, 5]], num_neighbours=4)
  np.testing.assert_array_equal(rows, [[1, 2, 4, 0], [0, 5, 1, 2]])
  scores = image_probes.nearest_neighbours(
    features, np.array([0, 2, 1, 0, 0, 1]), features[[1]], num_classes=3, num_neighbours=2
  )
  np.testing.assert_array_equal(scores, [[0, 0.5, 0.5]])
  assert probes.top_accuracy(scores, np.array([1])) == 1
  # Collapsed features: all rows tie.
  rows, cosines = image_probes.neighbour_rows(np.zeros((5, 2)), np.ones((1, 2)), num_neighbours=3)
  np.testing.assert_array_equal(rows, [[0, 1, 2]])
  np.testing.assert_array_equal(cosines, 0)


def test_a_tiny_temperature_leaves_the_nearest_neighbour():
  features, labels, queries, _ = _split()
  scores = image_probes.nearest_neighbours(
    features, labels, queries, num_classes=4, num_neighbours=30, temperature=1e-4
  )
  nearest = labels[_sorted_cosines(features, queries, 1)[0][:, 0]]
  np.testing.assert_array_equal(np.argmax(scores, 1), nearest)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_features_that_are_not_finite_score_nan(value):
  features, labels, queries, targets = _split()
  options = {"num_classes": 4, "num_neighbours": 5}
  spoiled = np.copy(queries)
  spoiled[3, 1] = value
  scores = image_probes.nearest_neighbours(features, labels, spoiled, **options)
  np.testing.assert_array_equal(np.isnan(scores).all(1), np.arange(len(queries)) == 3)
  assert np.isnan(probes.top_accuracy(scores, targets))
  spoiled = np.copy(features)
  spoiled[3, 1] = value
  assert np.isnan(image_probes.nearest_neighbours(spoiled, labels, queries, **options)).all()


# --- linear layers --------------------------------------------------------------------------------


def _sgd(key, features, labels, rate, num_classes, num_epochs, batch_size):
  """The layer of one learning rate, trained by a loop in float64."""
  rows = np.c_[features, np.ones(len(features))].astype(float)
  targets = np.eye(num_classes)[labels]
  weights = velocity = np.zeros((rows.shape[1], num_classes))
  batch_size = min(batch_size, len(rows))
  per_epoch = len(rows) // batch_size
  for epoch, each in enumerate(jax.random.split(key, num_epochs)):
    order = np.asarray(jax.random.permutation(each, len(rows)))
    for step in range(per_epoch):
      batch = order[step * batch_size : (step + 1) * batch_size]
      logits = rows[batch] @ weights
      probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
      slope = rows[batch].T @ (probs - targets[batch]) / batch_size
      velocity = 0.9 * velocity + slope
      done = (epoch * per_epoch + step) / (num_epochs * per_epoch)
      size = rate * batch_size / 256 * (1 + np.cos(np.pi * done)) / 2
      weights = weights - size * (0.9 * velocity + slope)
  return weights


@pytest.mark.parametrize("batch_size", [64, 1024])
@pytest.mark.parametrize("standardise", [False, True])
def test_layers_equal_those_of_a_loop(x64, batch_size, standardise):
  features, labels = _data(num_rows=150)
  features = features.astype(float) * np.array([1, 1, 1, 1, 0.1, 0]) + 2
  rates, key = (0.4, 0.1), jax.random.key(3)
  layers = image_probes.fit_linear(
    key, features, labels, num_classes=4, learning_rates=rates, num_epochs=5,
    batch_size=batch_size, standardise=standardise,
  )  # fmt: skip
  seen = features
  if standardise:
    seen = (features - features.mean(0)) / np.array([*features.std(0)[:5], 1])
  for weights, bias, rate in zip(*layers, rates, strict=True):
    expected = _sgd(key, seen, labels, rate, 4, 5, batch_size)
    # Without its scale, the layer applies to the features as they were given. 1e-10: float64.
    logits = np.c_[seen, np.ones(len(seen))] @ expected
    np.testing.assert_allclose(features @ weights + bias, logits, atol=1e-10)


def test_a_layer_reaches_the_optimum_of_scikit_learn():
  # Classes overlap, so the unregularised optimum is finite. The test rows are many, because 0.1
  # points are asserted.
  features, labels, test_features, test_labels = _split(num_rows=6048, test=4000)
  layers = image_probes.fit_linear(
    jax.random.key(0), features, labels, num_classes=4, num_epochs=40
  )
  found = image_probes._linear_scores(layers, test_features, test_labels)
  model = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-8).fit(features, labels)
  np.testing.assert_allclose(found[0], model.score(test_features, test_labels), atol=1e-3)


def test_the_rate_is_chosen_by_validation_and_trained_again_on_all_rows():
  features, labels, test_features, test_labels = _split()
  validation = np.arange(0, 260, 5)
  fit = np.setdiff1d(np.arange(260), validation)
  rates = jnp.array([1e-5, 0.3, 3e38])
  key = jax.random.key(1)
  options = {"num_classes": 4, "num_epochs": 10, "batch_size": 128}
  found = image_probes.evaluate_linear(
    key, features, labels, test_features, test_labels, validation, learning_rates=rates, **options
  )
  first, second = jax.random.split(key)
  layers = image_probes.fit_linear(
    first, features[fit], labels[fit], learning_rates=rates, **options
  )
  for score, weights, bias in zip(found.validation_scores[:2], *layers, strict=False):
    predictions = np.argmax(features[validation] @ weights + bias, 1)
    np.testing.assert_allclose(score, np.mean(predictions == labels[validation]), rtol=1e-6)
  # The last rate diverges, and is not chosen.
  best = int(np.argmax(found.validation_scores[:2]))
  assert np.isnan(found.validation_scores[2]) and found.chosen == rates[best]
  layer = image_probes.fit_linear(
    second, features, labels, learning_rates=rates[best, None], **options
  )
  predictions = np.argmax(test_features @ layer.weights[0] + layer.bias[0], 1)
  np.testing.assert_allclose(found.score, np.mean(predictions == test_labels), rtol=1e-6)


def test_the_key_determines_the_layers_and_equal_shapes_share_a_compilation():
  features, labels = _data()

  def fit(seed, rates=(0.3, 0.1)):
    return image_probes.fit_linear(
      jax.random.key(seed), features, labels, num_classes=4, learning_rates=rates, num_epochs=2,
      batch_size=64,
    )  # fmt: skip

  def vote(temperature):
    return image_probes.nearest_neighbours(
      features, labels, features, num_classes=4, num_neighbours=3, temperature=temperature
    )

  first = fit(0)
  vote(0.07)
  sizes = image_probes._fit_linear._cache_size(), image_probes._vote._cache_size()
  np.testing.assert_array_equal(fit(0).weights, first.weights)
  assert np.any(fit(1).weights != first.weights)
  # A layer does not depend on the rates beside it; 1e-5: sums of float32 in another order.
  np.testing.assert_allclose(fit(0, (0.2, 0.1)).weights[1], first.weights[1], atol=1e-5)
  vote(0.5)
  assert sizes == (image_probes._fit_linear._cache_size(), image_probes._vote._cache_size())


@pytest.mark.parametrize("where", ["fit", "validation", "test"])
def test_linear_evaluation_of_features_that_are_not_finite_is_nan(where):
  features, labels, test_features, test_labels = map(np.copy, _split())
  {"fit": features[20:], "validation": features, "test": test_features}[where][7, 2] = np.nan
  found = image_probes.evaluate_linear(
    jax.random.key(0), features, labels, test_features, test_labels, np.arange(20), num_classes=4,
    num_epochs=1, batch_size=100,
  )  # fmt: skip
  assert np.isnan(found.score)
  assert np.isnan(found.validation_scores).all() == (where != "test")


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named():
  features, labels, test_features, test_labels = _split()

  def vote(labels=labels, queries=test_features, **kwargs):
    options = {"num_classes": 4, "num_neighbours": 5, **kwargs}
    return image_probes.nearest_neighbours(features, labels, queries, **options)

  with pytest.raises(ValueError, match=r"num_neighbours must be at most .* 260, got 261"):
    vote(num_neighbours=261)
  with pytest.raises(ValueError, match="temperature must be positive"):
    vote(temperature=0.0)
  with pytest.raises(ValueError, match="at least two classes, got 260 rows of class 1 only"):
    vote(labels=np.ones_like(labels))
  with pytest.raises(ValueError, match=r"labels must lie in .* \[0, 3\), got 0 to 3"):
    vote(num_classes=3)
  with pytest.raises(ValueError, match="queries must have shape"):
    vote(queries=test_features[:, :3])

  def evaluate(rows=np.arange(9), labels=labels, test_features=test_features, **kwargs):
    return image_probes.evaluate_linear(
      jax.random.key(0), features, labels, test_features, test_labels, rows, num_classes=4, **kwargs
    )

  with pytest.raises(ValueError, match="at least two classes"):
    evaluate(labels=jnp.zeros(260, int))
  with pytest.raises(ValueError, match="at least two classes, got 1 rows"):
    evaluate(rows=np.arange(259))
  with pytest.raises(ValueError, match="labels must lie in"):
    evaluate(labels=labels - 1)
  with pytest.raises(ValueError, match="validation_rows must be distinct, got row 3 2 times"):
    evaluate(rows=[3, 4, 3])
  with pytest.raises(ValueError, match="validation_rows must leave rows to fit, got all 260"):
    evaluate(rows=np.arange(260))
  with pytest.raises(ValueError, match=r"validation_rows must lie in \[0, 260\)"):
    evaluate(rows=[260])
  with pytest.raises(ValueError, match="test_features must have shape"):
    evaluate(test_features=test_features[:, :2])
  with pytest.raises(ValueError, match="learning_rates must be positive"):
    evaluate(learning_rates=[0.1, 0.0])
  with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
    evaluate(batch_size=0)
