"""Linear layers trained by AdamW: against AdamW in NumPy, at convergence, and with bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.linear_model
import sklearn.metrics

from representation import adamw_probes


def _data(num_rows, num_features=7, num_classes=4, noise=1.0):
  rng = np.random.default_rng(0)
  labels = np.arange(num_rows) % num_classes
  means = rng.normal(size=(num_classes, num_features))
  return means[labels] + noise * rng.normal(size=(num_rows, num_features)), labels


def _adamw(loss, width, num_labels, weight_decay, num_steps):
  """AdamW in NumPy with learning rate 0.01; Loshchilov and Hutter 2017, arXiv:1711.05101."""
  slope, params = jax.jit(jax.grad(loss)), np.zeros((width + 1, num_labels))
  first, second = np.zeros_like(params), np.zeros_like(params)
  for step in range(1, num_steps + 1):
    gradient = np.asarray(slope(params))
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    scaled = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    params = params * (1 - 0.01 * weight_decay) - 0.01 * scaled
  return params


def test_multilabel_equals_adamw_in_numpy(x64):
  rng = np.random.default_rng(3)
  embeddings = rng.normal(size=(90, 5)) * [1, 2, 3, 4, 0] + 1  # the last column is constant
  labels = (embeddings @ rng.normal(size=(5, 6)) + rng.normal(size=(90, 6)) > 1).astype(int)
  train, validation, test = np.split(np.arange(90), [50, 70])
  found = adamw_probes.evaluate_multilabel(embeddings, labels, train, validation, test)
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
  # 1e-9: rounding of shares in float64.
  np.testing.assert_allclose(found.validation_scores, validation_scores, rtol=1e-9)
  best = np.argmax(validation_scores)
  assert found.chosen == decays[best]
  np.testing.assert_allclose(found.score, test_scores[best], rtol=1e-9)


def test_softmax_trains_for_its_steps_or_to_convergence(x64):
  embeddings, labels = _data(num_rows=300, num_features=5, noise=0.7)
  train, validation, test = np.split(np.arange(300), [200, 250])
  rows = np.c_[embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), np.ones(300)]

  def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(
      rows[train] @ params, labels[train]
    ).mean()

  def evaluate(**kwargs):
    return adamw_probes.evaluate_softmax(
      embeddings, labels, train, validation, test, num_classes=4, **kwargs
    )

  found = evaluate(num_steps=7, weight_decays=[0.5, 20.0])
  for decay, score in zip([0.5, 20.0], found.validation_scores, strict=True):
    predictions = np.argmax(rows @ _adamw(loss, 5, 4, decay, 7), -1)
    expected = np.mean(predictions[validation] == labels[validation])
    np.testing.assert_allclose(score, expected, rtol=1e-6)  # a float32 share of 50
  # Almost without decay it converges to the maximum of the likelihood.
  converged = evaluate(weight_decays=[1e-6], tolerance=1e-7)
  model = sklearn.linear_model.LogisticRegression(C=np.inf, tol=1e-8, max_iter=10_000)
  model.fit(rows[train, :-1], labels[train])
  expected = np.mean(model.predict(rows[test, :-1]) == labels[test])
  # One test node at the boundary between two classes may differ.
  np.testing.assert_allclose(converged.score, expected, atol=1.1 / len(test))


def test_a_decay_that_diverges_is_not_chosen():
  embeddings, labels = _data(num_rows=60)
  train, validation, test = np.split(np.arange(60), [20, 40])
  # Each step multiplies the parameters by 1 - 0.01 * 2^20, about -10^4, until they leave float32.
  found = adamw_probes.evaluate_softmax(
    embeddings, labels, train, validation, test, num_classes=4, weight_decays=[2.0**20, 1.0]
  )
  assert np.isnan(found.validation_scores[0]) and found.chosen == 1 and np.isfinite(found.score)


def test_bad_input_is_named():
  embeddings, labels = _data(num_rows=40)
  rows = np.split(np.arange(40), [20, 30])
  with pytest.raises(ValueError, match=r"labels must be 0 or 1, got 0 to 3: encode .* one-hot"):
    adamw_probes.evaluate_multilabel(embeddings, labels[:, None], *rows)

  def evaluate(rows=rows, **kwargs):
    return adamw_probes.evaluate_softmax(embeddings, labels, *rows, num_classes=4, **kwargs)

  with pytest.raises(ValueError, match="weight_decays must be finite and not negative"):
    evaluate(weight_decays=[-1.0])
  with pytest.raises(ValueError, match="weight_decays must be finite and not negative"):
    evaluate(weight_decays=jnp.array([-1.0]))
  with pytest.raises(ValueError, match="weight_decays must not be empty"):
    evaluate(weight_decays=[])
  with pytest.raises(ValueError, match=r"weight_decays must be a list .* give \[0.5\] for one"):
    evaluate(weight_decays=0.5)
  with pytest.raises(ValueError, match="test_rows must share no row with validation_rows"):
    evaluate(rows=(rows[0], rows[1], rows[1]))
  with pytest.raises(ValueError, match="num_steps must be an integer >= 1, got 0"):
    evaluate(num_steps=0)
