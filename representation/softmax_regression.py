"""Multinomial logistic regression with an L2 penalty, and the protocol that transfers features.

BYOL's features are judged on other data sets by this regression: the penalty is one of 45 values
and is chosen on validation rows, and the regression is then fitted to all training rows.

The objective sums over rows x with labels y, and the bias is not penalised:

  sum_i (logsumexp(x_i W + b) - (x_i W + b)_{y_i}) + penalty/2 |W|^2.

`LogisticRegression(C=1 / penalty)` of scikit-learn has the same optimum. Since the losses are
summed, the effect of a penalty depends on the number of rows: one of `penalty / N` on the mean loss
is the same.

Deviations: the paper names L-BFGS, where Newton's method (`softmax_newton`) reaches the optimum. It
does not say whether losses are summed; they are here. As in the paper, features are not normalised.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733, appendix, and Kornblith et al. 2019,
https://arxiv.org/abs/1805.08974.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from representation import probes, softmax_newton
from sharding import checks

PENALTIES = tuple(map(float, np.logspace(5, -6, 45)))


def softmax_loss(
  probe: probes.Probe, features: jax.Array, labels: jax.Array, *, penalty: Any
) -> jax.Array:
  """Returns the objective of `softmax_regression`, whose arguments these are."""
  checks.labels(labels, probe.bias.shape[0], fetch=True)
  checks.matrix("features", features, len(labels))
  checks.positive("penalty", penalty, fetch=True)
  logits = jnp.matmul(features, probe.weights, precision="highest") + probe.bias
  own = jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=-1)[:, 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - own
  return jnp.sum(losses) + 0.5 * penalty * jnp.sum(probe.weights**2)


def softmax_regression(
  features: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  penalty: Any,
  tolerance: float = 1e-5,
  max_steps: int = 100,
) -> probes.Probe:
  """Returns the L2-regularised multinomial logistic regression of the module's text.

  A class without a sample gets weights 0 and bias -inf, so it is never predicted.

  Args:
    features: `[N, F]` floating. Everything is NaN if one of them is not finite.
    labels: `[N]` int in [0, num_classes).
    num_classes: C.
    penalty: positive; it may be traced.
    tolerance: the method stops after the first step before which the objective is estimated to be
      within this share of the optimum. The step leaves far less.
    max_steps: the most steps of Newton's method.

  Returns:
    A `probes.Probe` with weights `[F, C]` and bias `[C]`.

  Raises:
    ValueError: if shapes do not fit, labels are all equal, or an argument that is not traced is out
      of range.

  Example:
    >>> features, labels = jnp.array([[1.0], [0.0]]), jnp.array([1, 0])
    >>> probe = softmax_regression(features, labels, num_classes=2, penalty=1.0)
    >>> jnp.argmax(features @ probe.weights + probe.bias, axis=-1)
    Array([1, 0], dtype=int32)
  """
  _check(features, labels, num_classes, tolerance, max_steps)
  checks.positive("penalty", penalty, fetch=True)
  return _fit(
    jnp.asarray(features), jnp.asarray(labels), penalty, tolerance, num_classes, max_steps
  )


def evaluate_softmax_regression(
  features: jax.Array,
  labels: jax.Array,
  test_features: jax.Array,
  test_labels: jax.Array,
  validation_rows: Any,
  *,
  num_classes: int,
  penalties: Any = PENALTIES,
  tolerance: float = 1e-5,
  max_steps: int = 100,
) -> probes.Evaluation:
  """Returns the test accuracy of the regression whose penalty is chosen by validation.

  Each penalty is fitted on the rows that are not in `validation_rows`, all in one compiled program.
  The one with the best accuracy on these is fitted again on all rows and scored on the test set.

  Args:
    features: `[N, F]` of the training images.
    labels: `[N]` int in [0, num_classes).
    test_features: `[M, F]`.
    test_labels: `[M]` int in [0, num_classes).
    validation_rows: `[v]` int, distinct rows of the training images; not traced.
    num_classes: C.
    penalties: the candidates, positive. Give them in descending order: each fit starts from the one
      before, and the first of equally good candidates is chosen.
    tolerance: as in `softmax_regression`.
    max_steps: as in `softmax_regression`.

  Returns:
    `probes.Evaluation` without leading axes. Scores are accuracies, and NaN if the features that
    they depend on are not finite.

  Raises:
    ValueError: as `softmax_regression`, or if validation rows are repeated or leave no two classes.
  """
  _check(features, labels, num_classes, tolerance, max_steps)
  checks.vector("penalties", penalties)
  checks.not_empty(penalties=penalties)
  checks.positive("penalties", penalties, fetch=True)
  fit_rows = probes.held_out(
    features, labels, test_features, test_labels, validation_rows, num_classes=num_classes
  )
  features, labels, penalties = map(jnp.asarray, (features, labels, penalties))
  rows = np.asarray(validation_rows)
  scores = _validation_scores(
    features[fit_rows], labels[fit_rows], features[rows], labels[rows], penalties, tolerance,
    num_classes, max_steps,
  )  # fmt: skip
  chosen = penalties[jnp.argmax(jnp.where(jnp.isnan(scores), -1, scores))]
  probe = _fit(features, labels, chosen, tolerance, num_classes, max_steps)
  test = _accuracy(probe, jnp.asarray(test_features), jnp.asarray(test_labels))
  return probes.Evaluation(test, chosen, scores)


@functools.partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def _fit(features, labels, penalty, tolerance, num_classes, max_steps) -> probes.Probe:
  with jax.default_matmul_precision("highest"):
    problem = softmax_newton.make_problem(features, labels, num_classes)
    start = softmax_newton.zeros(problem)
    solution = softmax_newton.minimise(problem, penalty, start, tolerance, max_steps)
    return probes.Probe(*softmax_newton.layer(problem, solution))


@functools.partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def _validation_scores(
  features, labels, unseen, unseen_labels, penalties, tolerance, num_classes, max_steps
) -> jax.Array:
  def score(start: jax.Array, penalty: jax.Array) -> tuple[jax.Array, jax.Array]:
    solution = softmax_newton.minimise(problem, penalty, start, tolerance, max_steps)
    probe = probes.Probe(*softmax_newton.layer(problem, solution))
    return solution, _accuracy(probe, unseen, unseen_labels)

  with jax.default_matmul_precision("highest"):
    problem = softmax_newton.make_problem(features, labels, num_classes)
    return jax.lax.scan(score, softmax_newton.zeros(problem), penalties)[1]


@jax.jit
def _accuracy(probe: probes.Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
  logits = jnp.matmul(features, probe.weights, precision="highest") + probe.bias
  return probes.top_accuracy(logits, labels)


def _check(features: Any, labels: Any, num_classes: Any, tolerance: Any, max_steps: Any) -> None:
  checks.labels(labels, num_classes, fetch=True)
  checks.several_classes(labels, fetch=True)
  checks.matrix("features", features, len(labels))
  checks.positive("tolerance", tolerance, fetch=True)
  checks.count("max_steps", max_steps)
