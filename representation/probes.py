"""Linear probes of frozen embeddings by logistic regression, and how probes are scored.

`evaluate_nodes` is the protocol of node classification: one-vs-rest logistic regression, with C
chosen within the training nodes. `adamw_probes` has the protocols whose linear layer is trained by
AdamW.

Logistic regression minimises the objective of liblinear, in which the bias is penalised like a
weight. With a 1 appended to each row x and targets y in {0, 1}, the objective of one class is

  1/2 |w|^2 + C sum_i s_i (softplus(w x_i) - y_i w x_i).

A whole evaluation runs on the device, with matrix products in full precision. Splits have equal
numbers of rows, so all of them share one compilation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from representation import logistic_newton
from sharding import checks

INVERSE_STRENGTHS = tuple(2.0**k for k in range(-10, 11))


class Probe(NamedTuple):
  """A linear layer whose logits are `features @ weights + bias`.

  Attributes:
    weights: `[D, num_classes]`.
    bias: `[num_classes]`.
  """

  weights: jax.Array
  bias: jax.Array


class Splits(NamedTuple):
  """Row numbers of S splits into training and test rows, with H folds each to choose C.

  Random splits use H = 5 random halves of the training rows. Where a data set has validation rows
  (WikiCS), H = 1, `fit_rows` equals `train_rows`, and the validation rows lie outside of them.

  Attributes:
    train_rows: `[S, n]` int, on which the chosen C is fitted again.
    test_rows: `[S, m]` int, on which that fit is scored.
    fit_rows: `[S, H, a]` int, on which each C is fitted.
    validation_rows: `[S, H, b]` int, on which those fits are scored to choose C.
  """

  train_rows: Any
  test_rows: Any
  fit_rows: Any
  validation_rows: Any


class Evaluation(NamedTuple):
  """The result of a protocol; `[...]` is `[S]`, or `[]` for a protocol with one split.

  Attributes:
    score: `[...]`, on the test rows; NaN if an embedding is not finite.
    chosen: `[...]`, the C or the weight decay with the best validation score.
    validation_scores: `[..., number of candidates]`.
  """

  score: jax.Array
  chosen: jax.Array
  validation_scores: jax.Array


def l2_normalise(features: jax.Array) -> jax.Array:
  """Returns features `[..., D]` divided by their L2 norms along the last axis; zeros stay zeros."""
  features = jnp.asarray(features)
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  norms = jnp.linalg.norm(features, axis=-1, keepdims=True)
  return features / jnp.where(norms == 0, 1, norms)


def accuracy(predictions: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the share of equal entries, in [0, 1].

  Raises:
    ValueError: if the arrays differ in shape or are empty.
  """
  checks.same_shape(predictions=predictions, labels=labels)
  checks.not_empty(predictions=predictions)
  return jnp.mean(jnp.asarray(predictions) == jnp.asarray(labels))


def top_accuracy(scores: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the share of rows where the label has the largest of the scores.

  The lower class is the prediction if several have the largest score. A score of -inf is a class
  that is never predicted.

  Args:
    scores: `[..., C]`, for example logits.
    labels: `[...]` int in [0, C).

  Returns:
    A number in [0, 1], or NaN if a score is NaN or +inf: comparisons with NaN are false, so the
    accuracy of diverged numbers would look ordinary.

  Raises:
    ValueError: if the shapes do not fit or are empty.

  Example:
    >>> top_accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1]))
    Array(0.5, dtype=float32)
  """
  scores = jnp.asarray(scores)
  share = accuracy(jnp.argmax(scores, axis=-1), labels)
  return jnp.where(jnp.all(scores < jnp.inf), share, jnp.nan)


def micro_f1(predictions: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns 2 TP / (2 TP + FP + FN), with counts over all entries; 0 if there is no positive.

  Args:
    predictions: `[...]` bool or 0/1.
    labels: `[...]` bool or 0/1.

  Raises:
    ValueError: if the arrays differ in shape or are empty.

  Example:
    >>> micro_f1(jnp.array([[1, 1], [0, 0]]), jnp.array([[1, 0], [0, 1]]))
    Array(0.5, dtype=float32)
  """
  checks.same_shape(predictions=predictions, labels=labels)
  checks.not_empty(predictions=predictions)
  predictions, labels = jnp.asarray(predictions) != 0, jnp.asarray(labels) != 0
  positives = jnp.sum(predictions) + jnp.sum(labels)
  return 2 * jnp.sum(predictions & labels) / jnp.maximum(positives, 1)


def held_out(
  features: Any,
  labels: Any,
  test_features: Any,
  test_labels: Any,
  validation_rows: Any,
  *,
  num_classes: int,
) -> np.ndarray:
  """Returns the training rows outside of `validation_rows`, on which a candidate is fitted.

  For protocols with one training set and one test set, whose settings are chosen on the validation
  rows.

  Args:
    features: `[N, F]` of the training set.
    labels: `[N]` int in [0, num_classes).
    test_features: `[M, F]`.
    test_labels: `[M]` int in [0, num_classes).
    validation_rows: `[v]` int, distinct rows of the training set; not traced.
    num_classes: number of classes.

  Raises:
    ValueError: if shapes do not fit, labels are out of range, validation rows are repeated, or the
      rows that are left hold no two classes.

  Example:
    >>> held_out(np.eye(4), np.array([0, 1, 0, 1]), np.eye(4), np.arange(4) % 2, [1], num_classes=2)
    array([0, 2, 3])
  """
  checks.labels(labels, num_classes, fetch=True)
  checks.matrix("features", features, len(labels))
  checks.labels(test_labels, num_classes, fetch=True)
  checks.matrix("test_features", test_features, len(test_labels))
  checks.shape("test_features", test_features, (len(test_labels), features.shape[1]), "[M, F]")
  checks.row_numbers("validation_rows", validation_rows, len(labels), 1, fetch=True)
  rows, counts = np.unique(np.asarray(validation_rows), return_counts=True)
  if counts.max() > 1:
    raise ValueError(
      f"validation_rows must be distinct, got row {rows[counts.argmax()]} {counts.max()} times"
    )
  left = np.setdiff1d(np.arange(len(labels)), rows)
  if not left.size:
    raise ValueError(f"validation_rows must leave rows to fit, got all {len(labels)} training rows")
  checks.several_classes(np.asarray(labels)[left])
  return left


def logistic_loss(
  probe: Probe, features: jax.Array, labels: jax.Array, *, C: Any, sample_weights: Any = None
) -> jax.Array:
  """Returns the objective of `logistic_regression` for each class, `[num_classes]`.

  The arguments are those of `logistic_regression`.
  """
  num_classes = probe.bias.shape[0]
  checks.labels(labels, num_classes, fetch=True)
  checks.matrix("features", features, len(labels))
  logits = jnp.matmul(features, probe.weights, precision="highest") + probe.bias
  targets = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
  losses = jax.nn.softplus(logits) - targets * logits
  if sample_weights is not None:
    checks.same_shape(sample_weights=sample_weights, labels=labels)
    losses = losses * jnp.asarray(sample_weights)[:, None]
  return 0.5 * (jnp.sum(probe.weights**2, 0) + probe.bias**2) + C * jnp.sum(losses, 0)


def logistic_regression(
  features: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  C: Any,
  sample_weights: Any = None,
  tolerance: float = 1e-5,
  max_steps: int = 100,
) -> Probe:
  """Returns the L2-regularised one-vs-rest logistic regression of liblinear.

  It equals scikit-learn's `OneVsRestClassifier(LogisticRegression(solver="liblinear", C=C))`. The
  bias is penalised. A class without a sample gets weights 0 and bias -inf, so it is never
  predicted.

  Args:
    features: `[N, D]` floating.
    labels: `[N]` int in [0, num_classes).
    num_classes: number of one-vs-rest problems.
    C: positive, the inverse strength of the regulariser; it may be traced (for example by `vmap`).
    sample_weights: `[N]`, not negative; None means 1. A weight of 0 leaves a row out, so subsets of
      the rows can share one shape.
    tolerance: a class stops when the norm of its gradient is below this times the norm at 0. The
      default of liblinear is of the same order: 1e-4 times the share of the rarer of the two
      targets. float32 reaches about 1e-6.
    max_steps: the most steps of Newton's method. Whether it has converged is shown by the norm of
      `jax.grad` of `logistic_loss`.

  Raises:
    ValueError: if shapes do not fit, or an argument that is not traced is out of range.

  Example:
    >>> features, labels = jnp.array([[1.0], [0.0]]), jnp.array([1, 0])
    >>> probe = logistic_regression(features, labels, num_classes=2, C=1.0)
    >>> jnp.argmax(features @ probe.weights + probe.bias, axis=-1)
    Array([1, 0], dtype=int32)

  Reference: Lin, Weng and Keerthi 2008, "Trust region Newton method for logistic regression".
  """
  checks.positive("tolerance", tolerance, fetch=True)
  checks.count("max_steps", max_steps)
  checks.labels(labels, num_classes, fetch=True)
  checks.matrix("features", features, len(labels))
  checks.positive("C", C, fetch=True)
  if sample_weights is not None:
    checks.same_shape(sample_weights=sample_weights, labels=labels)
    checks.not_negative("sample_weights", sample_weights, fetch=True)
    sample_weights = jnp.asarray(sample_weights)
  return _fit(
    jnp.asarray(features), jnp.asarray(labels), C, sample_weights, tolerance, num_classes, max_steps
  )


def evaluate_nodes(
  embeddings: jax.Array,
  labels: jax.Array,
  splits: Splits,
  *,
  num_classes: int,
  inverse_strengths: Any = INVERSE_STRENGTHS,
  choose_by: str = "accuracy",
  tolerance: float = 1e-5,
  max_steps: int = 100,
) -> Evaluation:
  """Returns the test accuracy of logistic regression in each split; C is chosen by validation.

  Embeddings are L2-normalised. In each split every C is fitted on each set of `fit_rows` and scored
  on the matching `validation_rows`. The C with the best mean score is fitted again on `train_rows`
  and scored on `test_rows`. The prediction is the class with the largest probability.

  Args:
    embeddings: `[N, D]`.
    labels: `[N]` int in [0, num_classes).
    splits: row numbers; rows used for scoring must not be among those used for fitting.
    num_classes: of the whole data set; a split may lack some of them.
    inverse_strengths: the candidates for C, positive. Give them in ascending order: each fit starts
      from the one before, and the first of equally good candidates is chosen.
    choose_by: the validation score. "accuracy" is that of the class with the largest probability.
      "exact_match" is the share of rows where only the right class has a probability above 1/2; the
      grid search of the released BGRL code computes this on random splits (not on WikiCS).
    tolerance: as in `logistic_regression`.
    max_steps: as in `logistic_regression`.

  Returns:
    `Evaluation` with arrays over the S splits; test scores are accuracies.

  Raises:
    ValueError: if shapes do not fit, or an argument that is not traced is out of range.

  Reference: Thakoor et al. 2022, https://arxiv.org/abs/2102.06514, section 4 and appendix.
  """
  checks.positive("tolerance", tolerance, fetch=True)
  checks.count("max_steps", max_steps)
  checks.labels(labels, num_classes, fetch=True)
  checks.matrix("embeddings", embeddings, len(labels))
  checks.vector("inverse_strengths", inverse_strengths)
  checks.not_empty(inverse_strengths=inverse_strengths)
  checks.positive("inverse_strengths", inverse_strengths, fetch=True)
  checks.choice("choose_by", choose_by, ("accuracy", "exact_match"))
  _check_splits(splits, len(labels))
  return _evaluate_nodes(
    l2_normalise(embeddings), jnp.asarray(labels), Splits(*map(jnp.asarray, splits)),
    jnp.asarray(inverse_strengths), tolerance, num_classes, choose_by, max_steps,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def _fit(features, labels, C, sample_weights, tolerance, num_classes, max_steps) -> Probe:
  with jax.default_matmul_precision("highest"):
    problem = logistic_newton.make_problem(features, labels, sample_weights, num_classes)
    start = jnp.zeros((problem.rows.shape[1], num_classes), problem.rows.dtype)
    solution = logistic_newton.minimise(problem, jnp.asarray(C), start, tolerance, max_steps)
    solution = problem.basis @ solution
  present = jnp.any(problem.targets * problem.sample_weights > 0, axis=0)
  return Probe(jnp.where(present, solution[:-1], 0), jnp.where(present, solution[-1], -jnp.inf))


@functools.partial(jax.jit, static_argnames=("num_classes", "choose_by", "max_steps"))
def _evaluate_nodes(
  embeddings, labels, splits, inverse_strengths, tolerance, num_classes, choose_by, max_steps
) -> Evaluation:
  def choice(rows: Any) -> jax.Array:
    """Returns how many validation rows each C predicts correctly, after a fit on one fold."""
    fit_rows, validation_rows = rows
    problem = logistic_newton.make_problem(
      embeddings[fit_rows], labels[fit_rows], None, num_classes
    )
    present = jnp.any(problem.targets > 0, axis=0)
    unseen = logistic_newton.with_ones(embeddings[validation_rows]) @ problem.basis
    targets = labels[validation_rows]

    def count(start: jax.Array, C: jax.Array) -> tuple[jax.Array, jax.Array]:
      solution = logistic_newton.minimise(problem, C, start, tolerance, max_steps)
      logits = jnp.where(present, unseen @ solution, -jnp.inf)
      right = jnp.argmax(logits, -1) == targets
      if choose_by == "exact_match":
        right = jnp.all((logits > 0) == jax.nn.one_hot(targets, num_classes, dtype=bool), -1)
      return solution, jnp.sum(right)

    start = jnp.zeros((problem.rows.shape[1], num_classes), problem.rows.dtype)
    return jax.lax.scan(count, start, inverse_strengths)[1]

  def split(rows: Splits) -> Evaluation:
    # Counts, unlike means, have exact ties.
    counts = jax.lax.map(choice, (rows.fit_rows, rows.validation_rows)).sum(0)
    C = inverse_strengths[jnp.argmax(counts)]
    probe = _fit(
      embeddings[rows.train_rows], labels[rows.train_rows], C, None, tolerance, num_classes,
      max_steps,
    )  # fmt: skip
    logits = embeddings[rows.test_rows] @ probe.weights + probe.bias
    score = accuracy(jnp.argmax(logits, -1), labels[rows.test_rows])
    return Evaluation(score, C, counts / rows.validation_rows.size)

  with jax.default_matmul_precision("highest"):
    found = jax.lax.map(split, splits)
  # Comparisons with NaN are false, so the accuracy of NaN embeddings would look ordinary.
  finite = jnp.all(jnp.isfinite(embeddings))
  return found._replace(score=jnp.where(finite, found.score, jnp.nan))


def _check_splits(splits: Splits, num_rows: int) -> None:
  for name, rows in splits._asdict().items():
    ndim = 2 if name in ("train_rows", "test_rows") else 3
    checks.row_numbers(name, rows, num_rows, ndim, fetch=True)
  leading = {name: jnp.shape(rows)[:-1] for name, rows in splits._asdict().items()}
  if len({shape[0] for shape in leading.values()}) > 1 or (
    leading["fit_rows"] != leading["validation_rows"]
  ):
    raise ValueError(
      f"splits must have equal numbers of splits and of folds, got leading axes {leading}"
    )
  checks.disjoint(
    "validation_rows", splits.validation_rows, "fit_rows", splits.fit_rows, fetch=True
  )
  for name in ("train_rows", "fit_rows", "validation_rows"):
    rows = getattr(splits, name)
    rows = np.reshape(rows, (len(rows), -1))
    checks.disjoint("test_rows", splits.test_rows, name, rows, fetch=True)
