"""Probes against scikit-learn and optima, protocols against plain loops, answers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
  # The gradient at 0 is about 60 C long, and rounding is 1e-16 of what cancels in it.
  assert _residual(probe, features, labels, C) < 1e-10 * max(C, 1)
  reference = _sklearn(C).fit(features, labels).estimators_
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
    # Twice the tolerance: rounding, and largest over largest rather than class by class.
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
  np.testing.assert_allclose(many.weights, one.weights, atol=1e-9)


@pytest.mark.parametrize("choose_by, sizes", [("accuracy", (1, 5)), ("exact_match", (2, 1))])
def test_nodes_are_evaluated_as_by_scikit_learn(x64, choose_by, sizes):
  embeddings, labels = _data(num_rows=300, noise=1.5)
  splits = _splits(300, num_splits=sizes[0], num_halves=sizes[1])
  found = probes.evaluate_nodes(
    embeddings, labels, splits, num_classes=4, choose_by=choose_by, tolerance=1e-9
  )
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  # Given one column a class, scikit-learn scores whole rows: exact matches.
  targets = labels if choose_by == "accuracy" else np.eye(4, dtype=int)[labels]
  for i, (train, test, fits, validations) in enumerate(zip(*splits, strict=True)):
    search = sklearn.model_selection.GridSearchCV(
      _sklearn(1.0, tol=1e-9), {"estimator__C": GRID}, cv=list(zip(fits, validations, strict=True)),
      refit=False,
    ).fit(unit, targets)  # fmt: skip
    # Means of five float64 numbers break ties by rounding; counts do not.
    means = search.cv_results_["mean_test_score"].round(12)
    np.testing.assert_allclose(found.validation_scores[i], means, atol=1e-12)
    C = GRID[np.argmax(means)]
    assert found.chosen[i] == C
    predictions = _sklearn(C).fit(unit[train], labels[train]).predict_proba(unit[test]).argmax(1)
    np.testing.assert_allclose(found.score[i], np.mean(predictions == labels[test]), atol=1e-12)


def test_given_validation_rows_and_a_tie():
  # Two clusters that every C tells apart: all score 1 and the first of them wins.
  embeddings = np.tile(np.eye(2, dtype=np.float32), (15, 1))
  labels = np.tile([0, 1], 15)
  train, validation, test = (np.arange(10 * i, 10 * i + 10)[None] for i in range(3))
  splits = probes.Splits(train, test, train[:, None], validation[:, None])
  found = probes.evaluate_nodes(embeddings, labels, splits, num_classes=3)
  np.testing.assert_array_equal(found.validation_scores, np.ones((1, 21)))
  assert found.score[0] == 1 and found.chosen[0] == 2.0**-10
  embeddings[0, 0] = np.nan
  assert np.isnan(probes.evaluate_nodes(embeddings, labels, splits, num_classes=3).score[0])


def _adamw(loss, width, num_labels, weight_decay, num_steps):
  """AdamW written out: decay, then the step of bias-corrected moments."""
  slope, params = jax.jit(jax.grad(loss)), np.zeros((width + 1, num_labels))
  first, second = np.zeros_like(params), np.zeros_like(params)
  for step in range(1, num_steps + 1):
    gradient = np.asarray(slope(params))
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    scaled = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    params = params * (1 - 0.01 * weight_decay) - 0.01 * scaled
  return params


def test_multilabel_equals_adamw_written_out(x64):
  rng = np.random.default_rng(3)
  embeddings = rng.normal(size=(90, 5)) * [1, 2, 3, 4, 0] + 1  # a constant column is divided by 1
  labels = (embeddings @ rng.normal(size=(5, 6)) + rng.normal(size=(90, 6)) > 1).astype(int)
  train, validation, test = np.split(np.arange(90), [50, 70])
  found = probes.evaluate_multilabel(embeddings, labels, train, validation, test)
  deviations = embeddings[train].std(0)
  deviations[4] = 1
  rows = np.c_[(embeddings - embeddings[train].mean(0)) / deviations, np.ones(90)]

  def loss(params):
    return optax.sigmoid_binary_cross_entropy(rows[train] @ params, labels[train]).mean()

  decays, scores = 2.0 ** np.arange(-10, 11, 2), []
  for decay in decays:
    predictions = rows @ _adamw(loss, 5, 6, decay, 100) > 0
    scores.append(
      [
        sklearn.metrics.f1_score(labels[r], predictions[r], average="micro")
        for r in (validation, test)
      ]
    )
  validation_scores, test_scores = np.transpose(scores)
  np.testing.assert_allclose(found.validation_scores, validation_scores, rtol=1e-9)
  best = np.argmax(validation_scores)
  assert found.chosen == decays[best]
  np.testing.assert_allclose(found.score, test_scores[best], rtol=1e-9)


def test_softmax_takes_its_steps_or_trains_until_the_loss_rests(x64):
  embeddings, labels = _data(num_rows=300, num_features=5, noise=0.7)
  train, validation, test = np.split(np.arange(300), [200, 250])
  rows = np.c_[embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), np.ones(300)]

  def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(
      rows[train] @ params, labels[train]
    ).mean()

  def evaluate(**kwargs):
    return probes.evaluate_softmax(
      embeddings, labels, train, validation, test, num_classes=4, **kwargs
    )

  found = evaluate(num_steps=7, weight_decays=[0.5, 20.0])
  for decay, score in zip([0.5, 20.0], found.validation_scores, strict=True):
    predictions = np.argmax(rows @ _adamw(loss, 5, 4, decay, 7), -1)
    expected = np.mean(predictions[validation] == labels[validation])
    np.testing.assert_allclose(score, expected, rtol=1e-6)  # a float32 share of 50
  # With hardly any decay the fit ends at the maximum of the likelihood.
  resting = evaluate(weight_decays=[1e-6], tolerance=1e-7)
  model = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-8, max_iter=10_000)
  model.fit(rows[train, :-1], labels[train])
  expected = np.mean(model.predict(rows[test, :-1]) == labels[test])
  np.testing.assert_allclose(
    resting.score, expected, atol=1.1 / len(test)
  )  # one node at a boundary


def test_a_decay_that_diverges_is_not_chosen():
  embeddings, labels = _data(num_rows=60)
  train, validation, test = np.split(np.arange(60), [20, 40])
  # 0.01 * 2^20: parameters grow 10^4 times a step and leave float32.
  found = probes.evaluate_softmax(
    embeddings, labels, train, validation, test, num_classes=4, weight_decays=[2.0**20, 1.0]
  )
  assert np.isnan(found.validation_scores[0]) and found.chosen == 1 and np.isfinite(found.score)


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
  yield {**good, "features": features[:3]}, "features must have as many rows as labels, 4, got 3"
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
    ("fit_rows", splits.fit_rows[:, :2], "splits must agree"),
    ("train_rows", splits.test_rows, "test_rows must have no row of train_rows"),
    ("validation_rows", splits.fit_rows, "validation_rows must have no row of fit_rows"),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate(splits._replace(**{field: value}))
  with pytest.raises(ValueError, match="inverse_strengths must be positive and finite"):
    evaluate(splits, inverse_strengths=[1.0, 0.0])
  with pytest.raises(ValueError, match=r"inverse_strengths must be a list .* give \[1.0\] for one"):
    evaluate(splits, inverse_strengths=1.0)
  with pytest.raises(ValueError, match="choose_by must be 'accuracy' or 'exact_match', got 'f1'"):
    evaluate(splits, choose_by="f1")
  with pytest.raises(ValueError, match=r"sample_weights \[1\], labels \[40\]"):
    probe = probes.Probe(np.zeros((embeddings.shape[1], 4)), np.zeros(4))
    probes.logistic_loss(probe, embeddings, labels, C=1.0, sample_weights=np.ones(1))
  lists = probes.Splits(*(rows.tolist() for rows in splits))
  with pytest.raises(ValueError, match="test_rows must have no row of train_rows"):
    evaluate(lists._replace(train_rows=lists.test_rows))
  rows = np.split(np.arange(40), [20, 30])
  with pytest.raises(ValueError, match=r"labels must be 0 or 1, got 0 to 3: one-hot"):
    probes.evaluate_multilabel(embeddings, labels[:, None], *rows)
  with pytest.raises(ValueError, match="weight_decays must be finite and not negative"):
    probes.evaluate_softmax(embeddings, labels, *rows, num_classes=4, weight_decays=[-1.0])
  with pytest.raises(ValueError, match="test_rows must have no row of validation_rows"):
    probes.evaluate_softmax(embeddings, labels, rows[0], rows[1], rows[1], num_classes=4)
  with pytest.raises(ValueError, match="num_steps must be an integer >= 1, got 0"):
    probes.evaluate_softmax(embeddings, labels, *rows, num_classes=4, num_steps=0)
  with pytest.raises(ValueError, match="shapes must be equal and not empty"):
    probes.micro_f1(jnp.zeros(3), jnp.zeros(4))
