"""What can be read off frozen embeddings with a linear layer: the protocols of evaluation.

  evaluate_nodes        one-vs-rest logistic regression, C chosen inside the training nodes
  evaluate_multilabel   many yes-or-no labels a node (PPI): 100 steps of AdamW, micro-F1
  evaluate_softmax      one label a node (ogbn-arxiv): AdamW, the weight decay chosen

Rows of the embeddings are gathered by index, with as many rows in each split, so that all splits
share one compilation. Whole evaluations run on the device; matrix products are full precision.

Logistic regression minimises what liblinear does, the bias penalised like a weight: with a 1
appended to each row x and targets y in {0, 1}, per class and independently of other classes,

  1/2 |w|^2 + C sum_i s_i (softplus(w x_i) - y_i w x_i).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from representation import checks, logistic_newton

INVERSE_STRENGTHS = tuple(2.0**k for k in range(-10, 11))
WEIGHT_DECAYS = tuple(2.0**k for k in range(-10, 11, 2))


class Probe(NamedTuple):
  """A linear layer: `features @ weights + bias` are logits."""

  weights: jax.Array  # [D, num_classes]
  bias: jax.Array  # [num_classes]


class Splits(NamedTuple):
  """Row numbers of S random splits, each of H choices of C; axes S and H of length 1 are fine.

  Random splits of 20 % choose C by H = 5 halves of the training rows. Where validation rows are
  given (WikiCS), H = 1, `fit_rows` repeats `train_rows`, and validation rows lie outside.
  """

  train_rows: Any  # [S, n] int: the chosen C is fitted again on these
  test_rows: Any  # [S, m] int: and judged on these
  fit_rows: Any  # [S, H, a] int: each C is fitted on these
  validation_rows: Any  # [S, H, b] int: and chosen by these


class Evaluation(NamedTuple):
  """What a protocol found; `[...]` is `[S]` or, for the protocols with one split, `[]`."""

  score: jax.Array  # [...] on the test rows; NaN if an embedding is not finite
  chosen: jax.Array  # [...] C or weight decay
  validation_scores: jax.Array  # [..., number of candidates]


def l2_normalise(features: jax.Array) -> jax.Array:
  """Returns `[..., D]` features over their length along the last axis; zeros stay zeros."""
  features = _floating(features)
  norms = jnp.linalg.norm(features, axis=-1, keepdims=True)
  return features / jnp.where(norms == 0, 1, norms)


def accuracy(predictions: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the share of equal entries, in [0, 1].

  Raises:
    ValueError: if the shapes differ or are empty.
  """
  checks.same_shape(predictions=predictions, labels=labels)
  return jnp.mean(jnp.asarray(predictions) == jnp.asarray(labels))


def micro_f1(predictions: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns 2 TP / (2 TP + FP + FN), counted over all entries together; 0 without any positive.

  Args:
    predictions: `[...]` bool or 0/1.
    labels: `[...]` bool or 0/1.

  Raises:
    ValueError: if the shapes differ or are empty.

  Example:
    >>> micro_f1(jnp.array([[1, 1], [0, 0]]), jnp.array([[1, 0], [0, 1]]))
    Array(0.5, dtype=float32)
  """
  checks.same_shape(predictions=predictions, labels=labels)
  predictions, labels = jnp.asarray(predictions) != 0, jnp.asarray(labels) != 0
  positives = jnp.sum(predictions) + jnp.sum(labels)
  return 2 * jnp.sum(predictions & labels) / jnp.maximum(positives, 1)


def logistic_loss(
  probe: Probe, features: jax.Array, labels: jax.Array, *, C: Any, sample_weights: Any = None
) -> jax.Array:
  """Returns what `logistic_regression` minimises, `[num_classes]`; the arguments are the same."""
  num_classes = probe.bias.shape[0]
  checks.labels(labels, num_classes)
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

  Equal to scikit-learn's `OneVsRestClassifier(LogisticRegression(solver="liblinear", C=C))`: the
  bias is penalised, and a class without a sample is never predicted (weights 0, bias -inf).

  Args:
    features: `[N, D]` floating.
    labels: `[N]` int in [0, num_classes).
    num_classes: how many one-vs-rest problems are solved.
    C: positive, the inverse strength of the regulariser; may be traced (`vmap` it).
    sample_weights: `[N]`, not negative; None is all 1. Zeros take rows out, so that different
      subsets of one set have one shape.
    tolerance: Newton's method stops for a class once its gradient is shorter than this times the
      gradient at 0. liblinear's own default, 1e-4 times the share of the rarer of the two sides,
      is of this order. float32 reaches about 1e-6.
    max_steps: it stops here in any case; `jax.grad` of `logistic_loss` tells how far it got.

  Raises:
    ValueError: if the shapes do not fit, or a concrete argument is out of range.

  Example:
    >>> features, labels = jnp.array([[1.0], [0.0]]), jnp.array([1, 0])
    >>> probe = logistic_regression(features, labels, num_classes=2, C=1.0)
    >>> jnp.argmax(features @ probe.weights + probe.bias, axis=-1)
    Array([1, 0], dtype=int32)

  Reference: Lin, Weng and Keerthi 2008, "Trust region Newton method for logistic regression".
  """
  checks.positive("tolerance", tolerance)
  checks.count("max_steps", max_steps)
  checks.labels(labels, num_classes)
  checks.matrix("features", features, len(labels))
  checks.positive("C", C)
  if sample_weights is not None:
    checks.same_shape(sample_weights=sample_weights, labels=labels)
    checks.not_negative("sample_weights", sample_weights)
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
  """Returns the test accuracy of logistic regression in each split, C chosen without the test rows.

  Embeddings are l2-normalised. In each split every C is fitted on each set of `fit_rows` and scored
  on its `validation_rows`; the one with the best mean (the first of several) is fitted again on all
  of `train_rows`, and the class of the largest probability is compared with the label.

  Args:
    embeddings: `[N, D]`.
    labels: `[N]` int in [0, num_classes).
    splits: row numbers, see there; no row to be judged by may lie among those fitted on.
    num_classes: of the whole data set; a split may lack some.
    inverse_strengths: the C to choose from, positive, best in ascending order: each starts where
      the one before it ended, and the first wins a tie.
    choose_by: "accuracy" of the class of the largest probability; or "exact_match", the share of
      rows in which the right class alone has a probability above 1/2, which is what the grid search
      of the released BGRL code computes on random splits (not on WikiCS).
    tolerance: see `logistic_regression`.
    max_steps: see `logistic_regression`.

  Returns:
    `Evaluation` over the S splits; scores are accuracies.

  Raises:
    ValueError: if the shapes do not fit, or a concrete argument is out of range.

  Reference: Thakoor et al. 2022, https://arxiv.org/abs/2102.06514, section 4 and appendix.
  """
  checks.positive("tolerance", tolerance)
  checks.count("max_steps", max_steps)
  checks.labels(labels, num_classes)
  checks.matrix("embeddings", embeddings, len(labels))
  checks.positive("inverse_strengths", inverse_strengths)
  checks.candidates("inverse_strengths", inverse_strengths)
  if choose_by not in ("accuracy", "exact_match"):
    raise ValueError(f"choose_by must be 'accuracy' or 'exact_match', got {choose_by!r}")
  _check_splits(splits, len(labels))
  return _evaluate_nodes(
    l2_normalise(embeddings), jnp.asarray(labels), Splits(*map(jnp.asarray, splits)),
    jnp.asarray(inverse_strengths), tolerance, num_classes, choose_by, max_steps,
  )  # fmt: skip


def evaluate_multilabel(
  embeddings: jax.Array,
  labels: jax.Array,
  train_rows: Any,
  validation_rows: Any,
  test_rows: Any,
  *,
  weight_decays: Any = WEIGHT_DECAYS,
  learning_rate: Any = 0.01,
  num_steps: int = 100,
) -> Evaluation:
  """Returns the micro-F1 of a linear layer on nodes that have many labels each (PPI).

  Embeddings are standardised with mean and deviation of the training rows. For each weight decay
  the layer is trained with binary cross-entropy by full-batch AdamW; a label is predicted where its
  logit is positive; the best (first) decay on the validation rows counts. The layer starts from
  zeros, where the released code draws it.

  Args:
    embeddings: `[N, D]`.
    labels: `[N, L]` 0/1.
    train_rows: `[n]` int.
    validation_rows: `[v]` int.
    test_rows: `[m]` int.
    weight_decays: decoupled, as in AdamW, on weights and bias. With `learning_rate` times decay
      above 2 the layer diverges, as it does in the released code; its score is low or NaN, and
      NaN is never chosen.
    learning_rate: of AdamW.
    num_steps: how many, exactly.

  Returns:
    `Evaluation` of the one split; scores are micro-F1.

  Raises:
    ValueError: if the shapes do not fit, or a concrete argument is out of range.

  Reference: Thakoor et al. 2022, https://arxiv.org/abs/2102.06514, section 4 and appendix.
  """
  checks.binary("labels", labels)
  checks.matrix("embeddings", embeddings, len(labels))
  rows = _check_layer(
    len(labels), train_rows, validation_rows, test_rows, weight_decays, learning_rate, num_steps
  )
  return _evaluate_layer(
    _floating(embeddings), jnp.asarray(labels), rows, jnp.asarray(weight_decays), learning_rate,
    0.0, num_labels=jnp.shape(labels)[1], num_steps=num_steps, multilabel=True,
  )  # fmt: skip


def evaluate_softmax(
  embeddings: jax.Array,
  labels: jax.Array,
  train_rows: Any,
  validation_rows: Any,
  test_rows: Any,
  *,
  num_classes: int,
  weight_decays: Any = WEIGHT_DECAYS,
  learning_rate: Any = 0.01,
  num_steps: int | None = None,
  tolerance: float = 1e-3,
  max_steps: int = 10_000,
) -> Evaluation:
  """Returns the test accuracy of a linear softmax layer trained by AdamW (ogbn-arxiv).

  Embeddings are l2-normalised; otherwise as `evaluate_multilabel`. The recipe's 100 steps leave the
  layer far from fitted, so the default trains until it is: then gains over an untrained encoder are
  the encoder's.

  Args:
    embeddings: `[N, D]`.
    labels: `[N]` int in [0, num_classes).
    train_rows: `[n]` int.
    validation_rows: `[v]` int.
    test_rows: `[m]` int.
    num_classes: width of the layer.
    weight_decays: decoupled, as in AdamW, on weights and bias.
    learning_rate: of AdamW.
    num_steps: how many, exactly; None trains to convergence.
    tolerance: converged is when 100 steps change the training loss by less than this times it.
    max_steps: where training to convergence ends in any case.

  Returns:
    `Evaluation` of the one split; scores are accuracies.

  Raises:
    ValueError: if the shapes do not fit, or a concrete argument is out of range.
  """
  checks.labels(labels, num_classes)
  checks.matrix("embeddings", embeddings, len(labels))
  checks.positive("tolerance", tolerance)
  checks.count("max_steps", max_steps)
  steps = max_steps if num_steps is None else num_steps
  rows = _check_layer(
    len(labels), train_rows, validation_rows, test_rows, weight_decays, learning_rate, steps
  )
  return _evaluate_layer(
    l2_normalise(embeddings), jnp.asarray(labels), rows, jnp.asarray(weight_decays), learning_rate,
    tolerance if num_steps is None else 0.0,
    num_labels=num_classes, num_steps=steps, multilabel=False,
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
    """How many validation rows each C gets right, after a fit on one half."""
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
    # Counts rather than means: ties are exact.
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
  # Comparisons with NaN are false, and would give an ordinary accuracy.
  finite = jnp.all(jnp.isfinite(embeddings))
  return found._replace(score=jnp.where(finite, found.score, jnp.nan))


@functools.partial(jax.jit, static_argnames=("num_labels", "num_steps", "multilabel"))
def _evaluate_layer(
  features, labels, rows, weight_decays, learning_rate, tolerance, *, num_labels, num_steps,
  multilabel,
) -> Evaluation:  # fmt: skip
  """A linear layer by AdamW for each weight decay; zero `tolerance` takes all the steps."""
  if multilabel:
    train = features[rows[0]]
    deviations = jnp.std(train, axis=0)
    features = (features - jnp.mean(train, axis=0)) / jnp.where(deviations == 0, 1, deviations)
  (train, *unseen), (train_labels, *targets) = (
    [array[each] for each in rows] for array in (features, labels)
  )

  def loss(probe: Probe) -> jax.Array:
    logits = train @ probe.weights + probe.bias
    if multilabel:
      return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, train_labels))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, train_labels))

  def score(probe: Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
    logits = features @ probe.weights + probe.bias
    found = micro_f1(logits > 0, labels) if multilabel else accuracy(jnp.argmax(logits, -1), labels)
    return jnp.where(jnp.all(jnp.isfinite(logits)), found, jnp.nan)

  def run(weight_decay: jax.Array) -> jax.Array:
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def improve(carry: Any) -> Any:
      probe, state, last, before, step = carry
      value, gradients = jax.value_and_grad(loss)(probe)
      updates, state = optimizer.update(gradients, state, probe)
      last, before = (jnp.where(step % 100 == 0, x, y) for x, y in ((value, last), (last, before)))
      return optax.apply_updates(probe, updates), state, last, before, step + 1

    def unfinished(carry: Any) -> jax.Array:
      _, _, last, before, step = carry
      # NaN and infinite losses move no more.
      moving = jnp.abs(last - before) > tolerance * last
      return (step < num_steps) & ((tolerance == 0) | (step <= 100) | moving)

    zeros = Probe(
      jnp.zeros((features.shape[1], num_labels), features.dtype),
      jnp.zeros(num_labels, features.dtype),
    )
    nowhere = jnp.array(jnp.inf, features.dtype)
    carry = (zeros, optimizer.init(zeros), nowhere, nowhere, 0)
    probe = jax.lax.while_loop(unfinished, improve, carry)[0]
    return jnp.stack([score(probe, *pair) for pair in zip(unseen, targets, strict=True)])

  with jax.default_matmul_precision("highest"):
    validation_scores, test_scores = jax.lax.map(run, weight_decays).T
  best = jnp.argmax(jnp.where(jnp.isnan(validation_scores), -1, validation_scores))
  return Evaluation(test_scores[best], weight_decays[best], validation_scores)


def _floating(features: jax.Array) -> jax.Array:
  """`features` in float32 or better."""
  features = jnp.asarray(features)
  return features.astype(jnp.promote_types(features.dtype, jnp.float32))


def _check_splits(splits: Splits, num_rows: int) -> None:
  for name, rows in splits._asdict().items():
    checks.row_numbers(name, rows, num_rows, 2 if name in ("train_rows", "test_rows") else 3)
  leading = {name: jnp.shape(rows)[:-1] for name, rows in splits._asdict().items()}
  if len({shape[0] for shape in leading.values()}) > 1 or (
    leading["fit_rows"] != leading["validation_rows"]
  ):
    raise ValueError(
      f"splits must agree in their number of splits and of choices, got leading axes {leading}"
    )
  checks.disjoint("validation_rows", splits.validation_rows, "fit_rows", splits.fit_rows)
  for name in ("train_rows", "fit_rows", "validation_rows"):
    rows = getattr(splits, name)
    checks.disjoint("test_rows", splits.test_rows, name, np.reshape(rows, (len(rows), -1)))


def _check_layer(
  num_rows: int, train: Any, validation: Any, test: Any, weight_decays: Any, learning_rate: Any,
  num_steps: Any,
) -> tuple[jax.Array, ...]:  # fmt: skip
  rows = {"train_rows": train, "validation_rows": validation, "test_rows": test}
  for name, each in rows.items():
    checks.row_numbers(name, each, num_rows, 1)
  checks.disjoint("validation_rows", validation, "train_rows", train)
  checks.disjoint("test_rows", test, "train_rows", train)
  checks.disjoint("test_rows", test, "validation_rows", validation)
  checks.not_negative("weight_decays", weight_decays)
  checks.candidates("weight_decays", weight_decays)
  checks.positive("learning_rate", learning_rate)
  checks.count("num_steps", num_steps)
  return tuple(jnp.asarray(each) for each in rows.values())
