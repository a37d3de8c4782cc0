"""Logistic regression against scikit-learn and its optimality conditions; scores by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import sklearn.model_selection
import sklearn.multiclass

import sharding
from representation import probes

GRID = 2.0 ** np.arange(-10, 11)


def _data(num_rows=120, num_features=7, num_classes=4, noise=1.0, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(num_rows) % num_classes
  means = rng.normal(size=(num_classes, num_features))
  return means[labels] + noise * rng.normal(size=(num_rows, num_features)), labels


def _sklearn(C, tol=1e-12):
  # intercept_scaling 1 (its default) puts the bias among the penalised weights.
  return sklearn.multiclass.OneVsRestClassifier(
    sklearn.linear_model.LogisticRegression(solver="liblinear", C=C, tol=tol, max_iter=10_000)
  )


@jax.jit
@jax.grad
def _gradient(probe, features, labels, C, **kwargs):
  return probes.logistic_loss(probe, features, labels, C=C, **kwargs).sum()


def _residual(probe, features, labels, C, **kwargs):
  """The gradient's length, largest over classes: it bounds the distance to the optimum."""
  gradient = _gradient(probe, features, labels, C, **kwargs)
  return np.sqrt((gradient.weights**2).sum(0) + gradient.bias**2).max()


def _splits(num_rows, num_splits=3, num_halves=5, share=0.3, seed=0):
  rng = np.random.default_rng(seed)
  num_train = int(share * num_rows) // 2 * 2
  orders = [rng.permutation(num_rows) for _ in range(num_splits)]
  halves = np.array(
    [[rng.permutation(each[:num_train]) for _ in range(num_halves)] for each in orders]
  )
  return probes.Splits(
    np.array([each[:num_train] for each in orders]),
    np.array([each[num_train:] for each in orders]),
    halves[..., : num_train // 2],
    halves[..., num_train // 2 :],
  )


def _deficient(features):
  features[:, 4:] = features[:, :3] * [1, -2, 0]
  return features


@pytest.mark.parametrize("C", [2.0**-10, 1.0, 2.0**10])
@pytest.mark.parametrize("kind", ["overlapping", "separable", "rank deficient", "wide"])
def test_coefficients_equal_those_of_scikit_learn(x64, kind, C):
  features, labels = {
    "overlapping": lambda: _data(),
    "separable": lambda: _data(noise=0.01),
    "rank deficient": lambda: (lambda x, y: (_deficient(x), y))(*_data()),
    "wide": lambda: _data(num_rows=20, num_features=30),
  }[kind]()
  probe = probes.logistic_regression(features, labels, num_classes=4, C=C, tolerance=1e-12)
  # The gradient at 0 has norm about 60 C, and the terms that cancel in it are rounded to 1e-16.
  assert _residual(probe, features, labels, C) < 1e-10 * max(C, 1)
  reference = _sklearn(C).fit(features, labels).estimators_
  # 1e-5: how far liblinear itself is from the optimum.
  np.testing.assert_allclose(probe.weights.T, [e.coef_[0] for e in reference], atol=1e-5)
  np.testing.assert_allclose(probe.bias, [e.intercept_[0] for e in reference], atol=1e-5)


def test_one_dimension_by_hand(x64):
  # Samples at +1 and -1: bias 0 by symmetry, and w = 2 C sigmoid(-w), C = w / (2 sigmoid(-w)).
  weight = 1.5
  C = weight * (1 + np.exp(weight)) / 2
  probe = probes.logistic_regression(
    np.array([[1.0], [-1.0]]), np.array([1, 0]), num_classes=2, C=C, tolerance=1e-12
  )
  np.testing.assert_allclose(probe.weights, [[-weight, weight]], rtol=1e-10)
  np.testing.assert_allclose(probe.bias, 0, atol=1e-10)


def test_float32_comes_as_near_as_its_tolerance_promises():
  features, labels = _data(num_rows=600, num_features=20)
  features = features.astype(np.float32)
  for C in (2.0**-10, 1.0, 2.0**10):
    probe = probes.logistic_regression(features, labels, num_classes=4, C=C)
    assert probe.weights.dtype == jnp.float32
    zero = jax.tree.map(jnp.zeros_like, probe)
    at_zero = _residual(zero, features, labels, C)
    # Twice the tolerance of 1e-5: rounding, and here the largest norms over classes are compared.
    assert _residual(probe, features, labels, C) < 2e-5 * at_zero


def test_a_class_that_is_absent_is_never_predicted(x64):
  features, labels = _data()
  kept = labels != 2
  probe = probes.logistic_regression(features[kept], labels[kept], num_classes=4, C=1.0)
  assert probe.bias[2] == -np.inf and not probe.weights[:, 2].any()
  predictions = np.argmax(features @ probe.weights + probe.bias, -1)
  reference = _sklearn(1.0).fit(features[kept], labels[kept]).predict(features)
  np.testing.assert_array_equal(predictions, reference)


def test_weights_take_rows_out_and_one_compilation_serves_all_subsets_and_strengths(x64):
  features, labels = _data()
  masks = np.random.default_rng(1).permuted(np.tile([True, False, False], (3, 40)), axis=1)
  strengths = np.array([0.1, 1.0, 10.0])

  @jax.jit
  @jax.vmap
  def fit(weights, C):
    return probes.logistic_regression(
      features, labels, num_classes=4, C=C, sample_weights=weights, tolerance=1e-11
    )

  found = fit(jnp.asarray(masks, float), jnp.asarray(strengths))
  # Each fit is within 1e-11 times the norm of its gradient at 0, at most a few hundred, of the
  # optimum.
  for i, (mask, C) in enumerate(zip(masks, strengths, strict=True)):
    alone = probes.logistic_regression(
      features[mask], labels[mask], num_classes=4, C=C, tolerance=1e-11
    )
    np.testing.assert_allclose(found.weights[i], alone.weights, atol=1e-8)
    np.testing.assert_allclose(found.bias[i], alone.bias, atol=1e-8)
    one = jax.tree.map(lambda leaf, i=i: leaf[i], found)
    assert _residual(one, features, labels, C, sample_weights=mask.astype(float)) < 1e-7


def test_rows_over_eight_devices_give_the_same_probe(x64):
  features, labels = _data()
  mesh = sharding.make_mesh({"data": 8})
  many = probes.logistic_regression(
    *sharding.shard_batch((features, labels), mesh), num_classes=4, C=2.0, tolerance=1e-11
  )
  one = probes.logistic_regression(features, labels, num_classes=4, C=2.0, tolerance=1e-11)
  # 1e-9: about the tolerance of 1e-11 times the norm of the gradient at 0, about 60 C.
  np.testing.assert_allclose(many.weights, one.weights, atol=1e-9)


@pytest.mark.parametrize("choose_by, sizes", [("accuracy", (1, 5)), ("exact_match", (2, 1))])
def test_nodes_are_evaluated_as_by_scikit_learn(x64, choose_by, sizes):
  embeddings, labels = _data(num_rows=300, noise=1.5)
  splits = _splits(300, num_splits=sizes[0], num_halves=sizes[1])
  found = probes.evaluate_nodes(
    embeddings, labels, splits, num_classes=4, choose_by=choose_by, tolerance=1e-9
  )
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  # With one-hot targets scikit-learn scores exact matches of whole rows.
  targets = labels if choose_by == "accuracy" else np.eye(4, dtype=int)[labels]
  for i, (train, test, fits, validations) in enumerate(zip(*splits, strict=True)):
    search = sklearn.model_selection.GridSearchCV(
      _sklearn(1.0, tol=1e-9), {"estimator__C": GRID}, cv=list(zip(fits, validations, strict=True)),
      refit=False,
    ).fit(unit, targets)  # fmt: skip
    # Rounded, because means of five float64 numbers differ by rounding where counts are tied.
    means = search.cv_results_["mean_test_score"].round(12)
    np.testing.assert_allclose(found.validation_scores[i], means, atol=1e-12)
    C = GRID[np.argmax(means)]
    assert found.chosen[i] == C
    predictions = _sklearn(C).fit(unit[train], labels[train]).predict_proba(unit[test]).argmax(1)
    np.testing.assert_allclose(found.score[i], np.mean(predictions == labels[test]), atol=1e-12)


def test_given_validation_rows_and_a_tie():
  # Every C separates these two clusters, so all score 1 and the first is chosen.
  embeddings = np.tile(np.eye(2, dtype=np.float32), (15, 1))
  labels = np.tile([0, 1], 15)
  train, validation, test = (np.arange(10 * i, 10 * i + 10)[None] for i in range(3))
  splits = probes.Splits(train, test, train[:, None], validation[:, None])
  found = probes.evaluate_nodes(embeddings, labels, splits, num_classes=3)
  np.testing.assert_array_equal(found.validation_scores, np.ones((1, 21)))
  assert found.score[0] == 1 and found.chosen[0] == 2.0**-10
  embeddings[0, 0] = np.nan
  assert np.isnan(probes.evaluate_nodes(embeddings, labels, splits, num_classes=3).score[0])


def test_scores_by_hand():
  assert probes.accuracy(jnp.array([0, 1, 2, 2]), jnp.array([0, 1, 1, 2])) == 0.75
  # One true positive, one false one, two missed: 2 / (2 + 1 + 2).
  predictions, labels = jnp.array([[1, 1, 0], [0, 0, 0]]), jnp.array([[1, 0, 1], [0, 1, 0]])
  np.testing.assert_allclose(probes.micro_f1(predictions, labels), 0.4)
  assert probes.micro_f1(jnp.zeros((2, 2)), jnp.zeros((2, 2))) == 0
  rows = probes.l2_normalise(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def _bad_fits():
  features, labels = np.zeros((4, 2)), np.array([0, 1, 0, 1])
  good = {"features": features, "labels": labels, "num_classes": 2, "C": 1.0}
  yield {**good, "C": 0}, "C must be positive and finite, got 0"
  yield {**good, "C": np.array(-1.0)}, "C must be positive and finite, got -1"
  yield {**good, "labels": np.array([0, 1, 2, 1])}, r"labels must lie in .* got 0 to 2: leave rows"
  yield {**good, "labels": np.array([0, -1, 0, 1])}, r"labels must lie in .* got -1 to 1"
  yield {**good, "labels": labels / 2}, "labels must be integers"
  yield {**good, "features": features[:3]}, "features must have one row for each label, 4, got 3"
  yield {**good, "features": features[0]}, r"features must have shape \[N, D\]"
  yield {**good, "labels": labels[:0]}, "labels must be integers of shape .* not empty"
  yield {**good, "num_classes": 1}, "num_classes must be an integer >= 2, got 1"
  yield {**good, "sample_weights": np.ones(3)}, "sample_weights .3., labels .4."
  yield {**good, "sample_weights": -np.ones(4)}, "sample_weights must be finite and not negative"
  yield {**good, "tolerance": 0.0}, "tolerance must be positive and finite, got 0"
  yield {**good, "max_steps": 0}, "max_steps must be an integer >= 1, got 0"


@pytest.mark.parametrize("arguments, message", _bad_fits(), ids=lambda value: str(value)[:24])
def test_bad_input_of_a_fit_is_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    probes.logistic_regression(**arguments)


def test_bad_input_of_an_evaluation_is_named():
  embeddings, labels = _data(num_rows=40)
  splits = _splits(40)

  def evaluate(splits, **kwargs):
    return probes.evaluate_nodes(embeddings, labels, splits, num_classes=4, **kwargs)

  for field, value, message in (
    ("test_rows", splits.test_rows + 20, r"test_rows must lie in \[0, 40\)"),
    ("test_rows", splits.test_rows[:, :0], "test_rows must have 2 axes, none of them empty"),
    ("train_rows", splits.train_rows > 3, "train_rows must be row numbers, got bool"),
    ("fit_rows", splits.fit_rows[:, 0], "fit_rows must have 3 axes"),
    ("fit_rows", splits.fit_rows[:, :2], "splits must have equal numbers"),
    ("train_rows", splits.test_rows, "test_rows must share no row with train_rows"),
    ("validation_rows", splits.fit_rows, "validation_rows must share no row with fit_rows"),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate(splits._replace(**{field: value}))
  with pytest.raises(ValueError, match="inverse_strengths must be positive and finite"):
    evaluate(splits, inverse_strengths=[1.0, 0.0])
  with pytest.raises(ValueError, match=r"inverse_strengths must be a list .* give \[1.0\] for one"):
    evaluate(splits, inverse_strengths=1.0)
  with pytest.raises(ValueError, match="inverse_strengths must not be empty"):
    evaluate(splits, inverse_strengths=[])
  with pytest.raises(ValueError, match=r"choose_by must be one of .* got 'f1'"):
    evaluate(splits, choose_by="f1")
  with pytest.raises(ValueError, match=r"sample_weights \[1\], labels \[40\]"):
    probe = probes.Probe(np.zeros((embeddings.shape[1], 4)), np.zeros(4))
    probes.logistic_loss(probe, embeddings, labels, C=1.0, sample_weights=np.ones(1))
  lists = probes.Splits(*(rows.tolist() for rows in splits))
  with pytest.raises(ValueError, match="test_rows must share no row with train_rows"):
    evaluate(lists._replace(train_rows=lists.test_rows))
  # Values that lie on a device are looked at too.
  with pytest.raises(ValueError, match=r"labels must lie in .* got 1 to 4"):
    probes.evaluate_nodes(embeddings, jnp.asarray(labels + 1), splits, num_classes=4)


def test_scores_refuse_arrays_that_do_not_match():
  for score in (probes.accuracy, probes.micro_f1):
    with pytest.raises(ValueError, match=r"must be equal, got predictions \[3\], labels \[4\]"):
      score(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(ValueError, match="predictions must not be empty"):
      score(jnp.zeros(0), jnp.zeros(0))
