"""How frozen features of images are scored: nearest neighbours and linear layers.

* `nearest_neighbours` votes with the labels of the most similar training images. Nothing is
  trained, so the features can be scored while the encoder still learns.
* `evaluate_linear` is the linear evaluation of BYOL: a linear layer trained by SGD, whose learning
  rate is chosen on held-out training rows.

Everything runs on the device, with matrix products in full precision, and is a function of its
arguments and key. Calls whose shapes and options are equal share one compilation.

Deviations of the linear layer from the paper: features are computed once, where the paper draws a
new crop and flip of each image in each epoch; the layer starts from zeros (the problem is convex);
the rows that an epoch leaves over after its last full batch are not used in that epoch.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733, section 4 and appendix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from representation import probes
from sharding import checks

LEARNING_RATES = (0.4, 0.3, 0.2, 0.1, 0.05)

# A chunk of queries holds about this many cosines: 128 MiB of float32.
_MAX_COSINES = 2**25


def neighbour_rows(
  features: jax.Array, queries: jax.Array, *, num_neighbours: int = 200
) -> tuple[jax.Array, jax.Array]:
  """Returns the rows of `features` that are most similar to each query, and their cosines.

  Queries are compared in chunks, so the `[M, N]` matrix of all cosines never exists.

  Args:
    features: `[N, F]`; they need not be normalised. The cosine with a row of zeros is 0.
    queries: `[M, F]`.
    num_neighbours: k, at most N.

  Returns:
    Rows `[M, k]` int32 and cosines `[M, k]`, the most similar first. Of equal cosines the lower row
    comes first. Cosines are NaN if the query, or any entry of `features`, is not finite.

  Raises:
    ValueError: if shapes do not fit, or `num_neighbours` exceeds N.

  Example:
    >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]])
    >>> neighbour_rows(features, jnp.array([[0.0, 3.0]]), num_neighbours=2)[0]
    Array([[1, 2]], dtype=int32)
  """
  _check_neighbours(features, queries, num_neighbours)
  return _neighbour_rows(jnp.asarray(features), jnp.asarray(queries), num_neighbours)


def nearest_neighbours(
  features: jax.Array,
  labels: jax.Array,
  queries: jax.Array,
  *,
  num_classes: int,
  num_neighbours: int = 200,
  temperature: Any = 0.07,
) -> jax.Array:
  """Returns the scores of the weighted k-nearest-neighbour classifier.

  Each of the k training rows with the largest cosine votes for its label, with a weight
  proportional to exp(cosine / temperature). `probes.top_accuracy` compares the scores with labels.

  Args:
    features: `[N, F]` of the training images; they need not be normalised.
    labels: `[N]` int in [0, num_classes).
    queries: `[M, F]`, features of the images to classify.
    num_classes: C.
    num_neighbours: k, at most N.
    temperature: T, positive.

  Returns:
    `[M, C]`, the share of the weight for each class: rows sum to 1. A row is NaN if its query is
    not finite, and all are if an entry of `features` is not. Ties are broken as in
    `neighbour_rows`.

  Raises:
    ValueError: if shapes do not fit, `num_neighbours` exceeds N, labels are out of range or all
      equal, or the temperature is not positive.

  Example:
    >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> labels, queries = jnp.array([0, 1, 1]), jnp.array([[0.0, 2.0]])
    >>> nearest_neighbours(features, labels, queries, num_classes=2, num_neighbours=2)
    Array([[0., 1.]], dtype=float32)

  Reference: Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4.
  """
  checks.labels(labels, num_classes, fetch=True)
  checks.several_classes(labels, fetch=True)
  checks.matrix("features", features, len(labels))
  _check_neighbours(features, queries, num_neighbours)
  checks.positive("temperature", temperature, fetch=True)
  return _vote(
    jnp.asarray(features), jnp.asarray(labels), jnp.asarray(queries), temperature,
    num_classes, num_neighbours,
  )  # fmt: skip


def fit_linear(
  key: jax.Array,
  features: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  learning_rates: Any = LEARNING_RATES,
  num_epochs: int = 80,
  batch_size: int = 1024,
  standardise: bool = False,
) -> probes.Probe:
  """Returns one linear softmax layer for each learning rate, trained by SGD.

  Cross-entropy is minimised by SGD with Nesterov momentum 0.9, without weight decay or warm-up. The
  learning rate falls from `learning_rate * batch size / 256` to 0 as a cosine. Every epoch has an
  order of its own, drawn from `key`. All layers see the same batches and are trained side by side.

  Args:
    key: shuffles the rows.
    features: `[N, F]`.
    labels: `[N]` int in [0, num_classes).
    num_classes: C.
    learning_rates: `[L]`, positive, for a batch of 256.
    num_epochs: passes over the rows.
    batch_size: rows in a step; all N rows if there are fewer.
    standardise: train on features minus their mean, divided by their standard deviation. The paper
      does not. It makes the useful learning rates independent of the scale of the features.

  Returns:
    A `probes.Probe` with weights `[L, F, C]` and bias `[L, C]`, to be applied to features as they
    are given. A layer that diverges has entries that are not finite, and so has every layer if a
    feature is not finite.

  Raises:
    ValueError: if shapes do not fit, labels are out of range or all equal, or another argument that
      is not traced is out of range.
  """
  _check_linear(features, labels, num_classes, learning_rates, num_epochs, batch_size)
  return _fit_linear(
    key, jnp.asarray(features), jnp.asarray(labels), jnp.asarray(learning_rates),
    num_classes, num_epochs, batch_size, bool(standardise),
  )  # fmt: skip


def evaluate_linear(
  key: jax.Array,
  features: jax.Array,
  labels: jax.Array,
  test_features: jax.Array,
  test_labels: jax.Array,
  validation_rows: Any,
  *,
  num_classes: int,
  learning_rates: Any = LEARNING_RATES,
  num_epochs: int = 80,
  batch_size: int = 1024,
  standardise: bool = False,
) -> probes.Evaluation:
  """Returns the test accuracy of a linear layer whose learning rate is chosen by validation.

  A layer is trained for each learning rate on the rows that are not in `validation_rows`. The rate
  with the best accuracy on these is trained again on all rows and scored on the test set. The first
  rate is chosen if several are best, and never one that diverged.

  Args:
    key: shuffles the rows.
    features: `[N, F]` of the training images.
    labels: `[N]` int in [0, num_classes).
    test_features: `[M, F]`.
    test_labels: `[M]` int in [0, num_classes).
    validation_rows: `[v]` int, distinct rows of the training images; not traced.
    num_classes: C.
    learning_rates: as in `fit_linear`; so are the arguments that follow.

  Returns:
    `probes.Evaluation` without leading axes. Scores are accuracies, NaN for a layer that diverged
    and for features that are not finite.

  Raises:
    ValueError: as `fit_linear`, or if validation rows are repeated or leave no row to fit.
  """
  _check_linear(features, labels, num_classes, learning_rates, num_epochs, batch_size)
  fit_rows = probes.held_out(
    features, labels, test_features, test_labels, validation_rows, num_classes=num_classes
  )
  features, labels, rates = map(jnp.asarray, (features, labels, learning_rates))
  fit_key, final_key = jax.random.split(key)
  options = (num_classes, num_epochs, batch_size, bool(standardise))
  sweep = _fit_linear(fit_key, features[fit_rows], labels[fit_rows], rates, *options)
  rows = np.asarray(validation_rows)
  scores = _linear_scores(sweep, features[rows], labels[rows])
  best = jnp.argmax(jnp.where(jnp.isnan(scores), -1, scores))
  probe = _fit_linear(final_key, features, labels, rates[best][None], *options)
  test = _linear_scores(probe, jnp.asarray(test_features), jnp.asarray(test_labels))
  return probes.Evaluation(test[0], rates[best], scores)


@functools.partial(jax.jit, static_argnames="num_neighbours")
def _neighbour_rows(features, queries, num_neighbours) -> tuple[jax.Array, jax.Array]:
  # Where NaN is put in the order depends on its sign, so a NaN row may not be among the k.
  finite = jnp.all(jnp.isfinite(features))
  features, queries = probes.l2_normalise(features), probes.l2_normalise(queries)
  features = features.astype(jnp.promote_types(features.dtype, queries.dtype)).T

  def nearest(query: jax.Array) -> tuple[jax.Array, jax.Array]:
    cosines, rows = jax.lax.top_k(query.astype(features.dtype) @ features, num_neighbours)
    return rows, cosines

  chunk = max(1, min(_MAX_COSINES // features.shape[1], 1024, len(queries)))
  with jax.default_matmul_precision("highest"):
    rows, cosines = jax.lax.map(nearest, queries, batch_size=chunk)
  return rows, jnp.where(finite, cosines, jnp.nan)


@functools.partial(jax.jit, static_argnames=("num_classes", "num_neighbours"))
def _vote(features, labels, queries, temperature, num_classes, num_neighbours) -> jax.Array:
  rows, cosines = _neighbour_rows(features, queries, num_neighbours)
  # Normalised, because exp(1 / temperature) may exceed the largest float.
  weights = jax.nn.softmax(cosines / temperature, axis=-1)
  votes = labels[rows]

  def share(label: jax.Array) -> jax.Array:
    # A sum over k in fixed order. A scatter-add would add in any order on a GPU.
    return jnp.sum(jnp.where(votes == label, weights, 0), axis=-1)

  shares = jax.lax.map(share, jnp.arange(num_classes)).T
  return jnp.where(jnp.isnan(cosines[:, :1]), jnp.nan, shares)


@functools.partial(
  jax.jit, static_argnames=("num_classes", "num_epochs", "batch_size", "standardise")
)
def _fit_linear(
  key, features, labels, learning_rates, num_classes, num_epochs, batch_size, standardise
) -> probes.Probe:
  num_rows, num_features = features.shape
  num_rates = len(learning_rates)
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  batch_size = min(batch_size, num_rows)
  steps_per_epoch = num_rows // batch_size
  schedule = optax.cosine_decay_schedule(batch_size / 256, num_epochs * steps_per_epoch)
  momentum = optax.trace(decay=0.9, nesterov=True)
  mean, scale = jnp.zeros(num_features, dtype), jnp.ones(num_features, dtype)
  if standardise:
    mean = jnp.mean(features, axis=0, dtype=dtype)
    scale = jnp.std(features, axis=0, dtype=dtype)
    scale = jnp.where(scale == 0, 1, scale)

  def gradient(layers: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, bias = layers
    batch = features[rows].astype(dtype)
    if standardise:
      batch = (batch - mean) / scale
    # The layers are side by side in one matrix product.
    logits = (batch @ weights.T + bias).reshape(batch_size, num_rates, num_classes)
    targets = jax.nn.one_hot(labels[rows], num_classes, dtype=dtype)[:, None]
    errors = (jax.nn.softmax(logits, axis=-1) - targets).reshape(batch_size, -1) / batch_size
    return errors.T @ batch, jnp.sum(errors, axis=0)

  def improve(carry: Any, rows: jax.Array) -> tuple[Any, None]:
    layers, state, step = carry
    (weights, bias), state = momentum.update(gradient(layers, rows), state)
    sizes = jnp.repeat(learning_rates * schedule(step), num_classes).astype(dtype)
    layers = layers[0] - sizes[:, None] * weights, layers[1] - sizes * bias
    return (layers, state, step + 1), None

  def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
    order = jax.random.permutation(key, num_rows)[: steps_per_epoch * batch_size]
    return jax.lax.scan(improve, carry, order.reshape(steps_per_epoch, batch_size))

  # Weights are transposed: XLA is slow on a CPU where the large factor of a product must be.
  num_outputs = num_rates * num_classes
  layers = jnp.zeros((num_outputs, num_features), dtype), jnp.zeros(num_outputs, dtype)
  with jax.default_matmul_precision("highest"):
    carry = (layers, momentum.init(layers), 0)
    ((weights, bias), _, _), _ = jax.lax.scan(epoch, carry, jax.random.split(key, num_epochs))
    weights = weights / scale
    bias = bias - weights @ mean
  weights = jnp.swapaxes(weights.reshape(num_rates, num_classes, num_features), 1, 2)
  bias = bias.reshape(num_rates, num_classes)
  # A row that is not finite may have been left over in every epoch.
  finite = jnp.all(jnp.isfinite(features))
  return probes.Probe(jnp.where(finite, weights, jnp.nan), jnp.where(finite, bias, jnp.nan))


@jax.jit
def _linear_scores(layers: probes.Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the accuracy of each layer, `[L]`."""
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))

  def score(layer: probes.Probe) -> jax.Array:
    return probes.top_accuracy(features @ layer.weights + layer.bias, labels)

  with jax.default_matmul_precision("highest"):
    return jax.lax.map(score, layers)


def _check_linear(
  features: Any, labels: Any, num_classes: Any, learning_rates: Any, num_epochs: Any,
  batch_size: Any,
) -> None:  # fmt: skip
  checks.labels(labels, num_classes, fetch=True)
  checks.several_classes(labels, fetch=True)
  checks.matrix("features", features, len(labels))
  checks.vector("learning_rates", learning_rates)
  checks.not_empty(learning_rates=learning_rates)
  checks.positive("learning_rates", learning_rates, fetch=True)
  checks.count("num_epochs", num_epochs)
  checks.count("batch_size", batch_size)


def _check_neighbours(features: Any, queries: Any, num_neighbours: Any) -> None:
  checks.matrix("features", features)
  checks.matrix("queries", queries)
  checks.shape("queries", queries, (len(queries), features.shape[1]), "[M, F]")
  checks.count("num_neighbours", num_neighbours)
  if num_neighbours > len(features):
    raise ValueError(
      f"num_neighbours must be at most the number of rows of features, {len(features)}, got "
      f"{num_neighbours}: give fewer"
    )
