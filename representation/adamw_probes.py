"""Linear probes trained by AdamW on frozen embeddings: the protocols of PPI and ogbn-arxiv.

A linear layer is trained once for each weight decay, by full-batch AdamW from zeros. The weight
decay with the best validation score is chosen, and the first one if several are best. A whole
evaluation runs on the device, with matrix products in full precision.

Deviation: the released BGRL code draws the layer at random, where ours starts from zeros.

Reference: Thakoor et al. 2021, https://arxiv.org/abs/2102.06514, section 4 and appendix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from representation import probes
from sharding import checks

WEIGHT_DECAYS = tuple(2.0**k for k in range(-10, 11, 2))


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
) -> probes.Evaluation:
  """Returns the test micro-F1 of a linear layer where each node has several labels (PPI).

  Embeddings are standardised with the mean and the standard deviation of the training rows. The
  loss is binary cross-entropy. A label is predicted where its logit is positive.

  Args:
    embeddings: `[N, D]`.
    labels: `[N, L]` 0/1.
    train_rows: `[n]` int.
    validation_rows: `[v]` int.
    test_rows: `[m]` int.
    weight_decays: the candidates, not negative; decoupled, on weights and bias. If `learning_rate`
      times the decay exceeds 2 the layer diverges, as it does in the released code. Its score is
      then low or NaN, and NaN is never chosen.
    learning_rate: of AdamW.
    num_steps: number of steps.

  Returns:
    `probes.Evaluation` without leading axes; scores are micro-F1.

  Raises:
    ValueError: if shapes do not fit, or an argument that is not traced is out of range.
  """
  checks.binary("labels", labels, fetch=True)
  checks.matrix("embeddings", embeddings, len(labels))
  rows = _check_layer(
    len(labels), train_rows, validation_rows, test_rows, weight_decays, learning_rate, num_steps
  )
  return _evaluate_layer(
    jnp.asarray(embeddings), jnp.asarray(labels), rows, jnp.asarray(weight_decays), learning_rate,
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
) -> probes.Evaluation:
  """Returns the test accuracy of a linear softmax layer (ogbn-arxiv).

  Embeddings are L2-normalised. The loss is softmax cross-entropy. The 100 steps of
  `evaluate_multilabel` leave the layer far from its optimum. The default trains to convergence
  instead, so that a gain over an untrained encoder is due to the encoder.

  Args:
    embeddings: `[N, D]`.
    labels: `[N]` int in [0, num_classes).
    train_rows: `[n]` int.
    validation_rows: `[v]` int.
    test_rows: `[m]` int.
    num_classes: number of classes.
    weight_decays: as in `evaluate_multilabel`.
    learning_rate: of AdamW.
    num_steps: number of steps; None trains to convergence.
    tolerance: training has converged when the loss changes by less than this share in 100 steps.
    max_steps: the most steps of training to convergence.

  Returns:
    `probes.Evaluation` without leading axes; scores are accuracies.

  Raises:
    ValueError: if shapes do not fit, or an argument that is not traced is out of range.
  """
  checks.labels(labels, num_classes, fetch=True)
  checks.matrix("embeddings", embeddings, len(labels))
  checks.positive("tolerance", tolerance, fetch=True)
  checks.count("max_steps", max_steps)
  steps = max_steps if num_steps is None else num_steps
  rows = _check_layer(
    len(labels), train_rows, validation_rows, test_rows, weight_decays, learning_rate, steps
  )
  return _evaluate_layer(
    probes.l2_normalise(embeddings), jnp.asarray(labels), rows, jnp.asarray(weight_decays),
    learning_rate, tolerance if num_steps is None else 0.0,
    num_labels=num_classes, num_steps=steps, multilabel=False,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("num_labels", "num_steps", "multilabel"))
def _evaluate_layer(
  features, labels, rows, weight_decays, learning_rate, tolerance, *, num_labels, num_steps,
  multilabel,
) -> probes.Evaluation:  # fmt: skip
  """Trains a layer for each weight decay and scores it; with `tolerance` 0 it takes all steps."""
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  if multilabel:
    train = features[rows[0]]
    deviations = jnp.std(train, axis=0)
    features = (features - jnp.mean(train, axis=0)) / jnp.where(deviations == 0, 1, deviations)
  (train, *unseen), (train_labels, *targets) = (
    [array[each] for each in rows] for array in (features, labels)
  )

  def loss(probe: probes.Probe) -> jax.Array:
    logits = train @ probe.weights + probe.bias
    if multilabel:
      return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, train_labels))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, train_labels))

  def score(probe: probes.Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
    logits = features @ probe.weights + probe.bias
    if multilabel:
      found = probes.micro_f1(logits > 0, labels)
    else:
      found = probes.accuracy(jnp.argmax(logits, -1), labels)
    return jnp.where(jnp.all(jnp.isfinite(logits)), found, jnp.nan)

  def run(weight_decay: jax.Array) -> jax.Array:
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def improve(carry: Any) -> Any:
      probe, state, last, before, step = carry
      value, gradients = jax.value_and_grad(loss)(probe)
      updates, state = optimizer.update(gradients, state, probe)
      recorded = step % 100 == 0
      before, last = jnp.where(recorded, last, before), jnp.where(recorded, value, last)
      return optax.apply_updates(probe, updates), state, last, before, step + 1

    def unfinished(carry: Any) -> jax.Array:
      _, _, last, before, step = carry
      # This is false for NaN and for losses that stay infinite, so diverged layers stop.
      moving = jnp.abs(last - before) > tolerance * last
      return (step < num_steps) & ((tolerance == 0) | (step <= 100) | moving)

    zeros = probes.Probe(
      jnp.zeros((features.shape[1], num_labels), features.dtype),
      jnp.zeros(num_labels, features.dtype),
    )
    unknown = jnp.array(jnp.inf, features.dtype)
    carry = (zeros, optimizer.init(zeros), unknown, unknown, 0)
    probe = jax.lax.while_loop(unfinished, improve, carry)[0]
    return jnp.stack([score(probe, *pair) for pair in zip(unseen, targets, strict=True)])

  with jax.default_matmul_precision("highest"):
    validation_scores, test_scores = jax.lax.map(run, weight_decays).T
  best = jnp.argmax(jnp.where(jnp.isnan(validation_scores), -1, validation_scores))
  return probes.Evaluation(test_scores[best], weight_decays[best], validation_scores)


def _check_layer(
  num_rows: int, train: Any, validation: Any, test: Any, weight_decays: Any, learning_rate: Any,
  num_steps: Any,
) -> tuple[jax.Array, ...]:  # fmt: skip
  rows = {"train_rows": train, "validation_rows": validation, "test_rows": test}
  for name, each in rows.items():
    checks.row_numbers(name, each, num_rows, 1, fetch=True)
  checks.disjoint("validation_rows", validation, "train_rows", train, fetch=True)
  checks.disjoint("test_rows", test, "train_rows", train, fetch=True)
  checks.disjoint("test_rows", test, "validation_rows", validation, fetch=True)
  checks.vector("weight_decays", weight_decays)
  checks.not_empty(weight_decays=weight_decays)
  checks.not_negative("weight_decays", weight_decays, fetch=True)
  checks.positive("learning_rate", learning_rate, fetch=True)
  checks.count("num_steps", num_steps)
  return tuple(jnp.asarray(each) for each in rows.values())
