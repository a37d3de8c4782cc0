"""Multinomial logistic regression against scikit-learn and its optimality conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import sklearn.linear_model

from representation import probes, softmax_regression


def _data(num_rows=300, num_features=6, num_classes=4, noise=1.0, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(num_rows) % num_classes
  features = rng.normal(size=(num_classes, num_features))[labels]
  return features + noise * rng.normal(size=features.shape), labels


def _sklearn(penalty, tol=1e-12):
  return sklearn.linear_model.LogisticRegression(
    C=1 / penalty, solver="newton-cg", tol=tol, max_iter=10_000
  )


@jax.jit
@jax.grad
def _gradient(probe, features, labels, penalty):
  return softmax_regression.softmax_loss(probe, features, labels, penalty=penalty)


def _slope(probe, *args):
  """The largest entry of the gradient."""
  return max(np.abs(leaf).max() for leaf in _gradient(probe, *args))


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["overlapping", "separable", "rank deficient", "wide"])
def test_coefficients_equal_those_of_scikit_learn(x64, kind, penalty):
  features, labels = {
    "overlapping": lambda: _data(),
    "separable": lambda: _data(noise=0.01),
    "rank deficient": lambda: (lambda x, y: (np.c_[x, 2 * x[:, :2], np.ones(300)], y))(*_data()),
    "wide": lambda: _data(num_rows=20, num_features=30),
  }[kind]()
  probe = softmax_regression.softmax_regression(
    features, labels, num_classes=4, penalty=penalty, tolerance=1e-14
  )
  # The gap is below 1e-14 of the objective, and it is about the square of the gradient; entries of
  # the gradient at 0 are about 100.
  assert _slope(probe, features, labels, penalty) < 1e-6
  model = _sklearn(penalty).fit(features, labels)
  # 1e-5 of the largest: how far newton-cg itself is from the optimum.
  scale = 1e-5 * np.abs(model.coef_).max()
  np.testing.assert_allclose(probe.weights.T, model.coef_, atol=scale)
  # One constant for all classes changes nothing; there are only differences to compare.
  np.testing.assert_allclose(
    probe.bias - probe.bias.mean(), model.intercept_ - model.intercept_.mean(), atol=10 * scale
  )


def test_one_dimension_by_hand(x64):
  # Samples at +1 and -1, logits +w x and -w x: bias 0, and 2 w penalty = 4 sigmoid(-2 w).
  weight = 0.75
  penalty = 2 / weight / (1 + np.exp(2 * weight))
  probe = softmax_regression.softmax_regression(
    np.array([[1.0], [-1.0]]), np.array([1, 0]), num_classes=2, penalty=penalty, tolerance=1e-12
  )
  np.testing.assert_allclose(probe.weights, [[-weight, weight]], rtol=1e-10)
  np.testing.assert_allclose(probe.bias, 0, atol=1e-10)


def test_float32_reaches_the_objective_and_accuracy_of_scikit_learn():
  features, labels = sklearn.datasets.load_digits(return_X_y=True)
  test_features, test_labels = features[500:], labels[500:]
  features, labels = features[:500], labels[:500]

  def objective(weights, bias, penalty):
    logits = features @ np.asarray(weights, float) + np.asarray(bias, float)
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(500), labels]
    return losses.sum() + penalty / 2 * np.sum(np.asarray(weights, float) ** 2)

  for penalty in (1e5, 1e2, 1e-1, 1e-4):
    probe = softmax_regression.softmax_regression(
      features.astype(np.float32), labels, num_classes=10, penalty=penalty
    )
    assert probe.weights.dtype == jnp.float32
    model = _sklearn(penalty, tol=1e-9).fit(features, labels)
    best = objective(model.coef_.T, model.intercept_, penalty)
    # The tolerance is 1e-5. scikit-learn may stop early, so only an excess is a failure.
    assert objective(*probe, penalty) < best * (1 + 1e-5)
    score = probes.top_accuracy(test_features @ probe.weights + probe.bias, test_labels)
    np.testing.assert_allclose(score, model.score(test_features, test_labels), atol=1e-3)


def test_a_class_that_is_absent_is_never_predicted(x64):
  features, labels = _data()
  kept = labels != 2
  probe = softmax_regression.softmax_regression(
    features[kept], labels[kept], num_classes=4, penalty=1.0, tolerance=1e-14
  )
  assert probe.bias[2] == -np.inf and not probe.weights[:, 2].any()
  model = _sklearn(1.0).fit(features[kept], labels[kept])
  np.testing.assert_allclose(np.asarray(probe.weights.T)[[0, 1, 3]], model.coef_, atol=1e-5)
  predictions = np.argmax(features @ probe.weights + probe.bias, -1)
  np.testing.assert_array_equal(predictions, model.predict(features))


def test_the_penalty_is_chosen_by_validation_and_fitted_again_on_all_rows(x64):
  features, labels = _data(num_rows=400, num_features=20, noise=3.0)
  features, labels, unseen, targets = features[:150], labels[:150], features[150:], labels[150:]
  validation = np.arange(0, 150, 3)
  fit = np.setdiff1d(np.arange(150), validation)
  found = softmax_regression.evaluate_softmax_regression(
    features, labels, unseen, targets, validation, num_classes=4
  )
  scores = [
    _sklearn(p).fit(features[fit], labels[fit]).score(features[validation], labels[validation])
    for p in softmax_regression.PENALTIES
  ]
  assert len(scores) == 45 and len(set(scores)) > 5
  # A row at the boundary of two classes may differ.
  np.testing.assert_allclose(found.validation_scores, scores, atol=1.1 / len(validation))
  # The first of the best.
  index = int(np.argmax(found.validation_scores))
  assert found.chosen == softmax_regression.PENALTIES[index]
  model = _sklearn(float(found.chosen)).fit(features, labels)
  np.testing.assert_allclose(found.score, model.score(unseen, targets), atol=1e-6)
  compiled = softmax_regression._validation_scores._cache_size()
  again = softmax_regression.evaluate_softmax_regression(
    2 * features, labels, unseen, targets, validation, num_classes=4
  )
  assert softmax_regression._validation_scores._cache_size() == compiled
  # Features twice as long with the same penalty are another problem.
  assert np.any(again.validation_scores != found.validation_scores)


@pytest.mark.parametrize("where", ["fit", "validation", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_score_nan(where, value):
  features, labels = _data()
  unseen, targets = np.copy(features[:50]), labels[:50]
  features, labels = np.copy(features[50:]), labels[50:]
  {"fit": features[20:], "validation": features, "test": unseen}[where][7, 2] = value
  found = softmax_regression.evaluate_softmax_regression(
    features, labels, unseen, targets, np.arange(20), num_classes=4, penalties=[1.0, 0.1]
  )
  assert np.isnan(found.score)
  assert np.isnan(found.validation_scores).all() == (where != "test")


def test_bad_input_is_named():
  features, labels = _data()

  def fit(labels=labels, penalty=1.0, **kwargs):
    return softmax_regression.softmax_regression(
      features, labels, num_classes=4, penalty=penalty, **kwargs
    )

  with pytest.raises(ValueError, match="at least two classes, got 300 rows of class 2 only"):
    fit(labels=np.full(300, 2))
  with pytest.raises(ValueError, match=r"labels must lie in .* \[0, 4\), got 1 to 4"):
    fit(labels=labels + 1)
  with pytest.raises(ValueError, match="penalty must be positive"):
    fit(penalty=0)
  with pytest.raises(ValueError, match="tolerance must be positive"):
    fit(tolerance=0)
  with pytest.raises(ValueError, match="penalties must be a list of numbers"):
    softmax_regression.evaluate_softmax_regression(
      features, labels, features, labels, [0], num_classes=4, penalties=1.0
    )
