"""Supervised learning of images: an encoder and a linear classifier, trained on labels.

An image is augmented, the encoder makes features of it, and a linear classifier makes logits of
these. The loss is the cross-entropy:

  loss = mean_i -log softmax(W f(t(x_i)) + b)[label_i].

It serves three purposes. With `frozen` it is BYOL's linear evaluation: the encoder stays as it is,
and only the classifier learns. From an encoder that was trained without labels it is fine-tuning,
as in BYOL's semi-supervised protocol. From a random encoder it is the supervised baseline.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733, sections 3.2 and C.

| paper | here |
|---|---|
| f (theta) | `Params.encoder` |
| t | `Networks.augment` |
| y | features `[B, F]` |
| linear layer | `Params.classifier` |

A frozen encoder reads its running statistics, in evaluation mode, and gets no gradient. Neither its
parameters nor its statistics change, also under an optimiser with weight decay: the optimiser holds
the classifier alone. So its features do not depend on the learning rate. Under `jax.vmap` over the
classifier and the optimiser's state they are computed once for all learning rates.

Deviations: none in the loss. The learning rates and schedules of the paper are the optimiser's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from sharding import checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["frozen", "num_microbatches"]
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the default trains everything.

  Attributes:
    frozen: whether only the classifier is trained; static.
    num_microbatches: number of parts of a batch; static. It must be 1 unless `frozen`, because
      batch normalisation in training mode couples examples.
  """

  frozen: bool = False
  num_microbatches: int = 1

  def __post_init__(self):
    checks.choice("frozen", self.frozen, (True, False))
    checks.count("num_microbatches", self.num_microbatches)
    if self.num_microbatches != 1 and not self.frozen:
      raise ValueError(
        f"num_microbatches must be 1 unless frozen is True, got {self.num_microbatches}: batch "
        "normalisation sees the whole batch; split it over devices instead"
      )


class Batch(NamedTuple):
  """Images with labels.

  Attributes:
    images: `[B, ...]`, what `Networks.augment` takes, or the encoder if that is None.
    labels: `[B]` integers in [0, C).
  """

  images: Any
  labels: Any


class Params(NamedTuple):
  """The parameters of both networks."""

  encoder: Any
  classifier: Any


class Networks(NamedTuple):
  """The networks, as hashable functions.

  Attributes:
    encoder: `encoder(params, network_state, images, *, train) -> ([B, F], network_state)`.
    classifier: `classifier(params, features) -> logits [B, C]`.
    augment: `augment(images, key) -> images`, or None.
  """

  encoder: Callable[..., Any]
  classifier: Callable[..., Any]
  augment: Callable[..., Any] | None = None


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of the encoder and the classifier.
    network_state: of the encoder, such as running statistics; `()` for an encoder without any.
    opt_state: of the optimiser; with `Config.frozen` it is that of the classifier alone.
    step: scalar int32, the number of updates so far.
  """

  params: Params
  network_state: Any
  opt_state: Any
  step: jax.Array


def supervised_loss(logits: jax.Array, labels: Any) -> jax.Array:
  """Returns the cross-entropy of each row, -log softmax(logits)[label].

  Args:
    logits: `[B, C]`.
    labels: `[B]` integers in [0, C).

  Returns:
    `[B]`, not negative, in float32 or wider. Labels in device arrays are not looked at; a row whose
    label lies outside of [0, C) has the loss NaN.

  Raises:
    ValueError: if shapes do not fit, or labels on the host are not integers in [0, C).

  Example:
    >>> supervised_loss(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), [1]).round(4)  # log 4
    Array([1.3863], dtype=float32)
  """
  checks.matrix("logits", logits)
  num_rows, num_classes = jnp.shape(logits)
  checks.labels(labels, num_classes)
  checks.shape("labels", labels, (num_rows,), "[B]")
  logits, labels = _wide(jnp.asarray(logits)), jnp.asarray(labels)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  # Without this a label of -1 would count as the last class.
  return jnp.where((labels >= 0) & (labels < num_classes), losses, jnp.nan)


def init(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  network_state: Any = (),
) -> State:
  """Returns the state before the first step.

  Args:
    params: of the encoder, random or trained without labels, and of the classifier.
    optimizer: the one that `update` will get.
    config: says whether the encoder is frozen.
    network_state: of the encoder.
  """
  trained = params.classifier if config.frozen else params
  return State(params, network_state, optimizer.init(trained), jnp.zeros((), jnp.int32))


def loss(
  params: Params, state: State, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the cross-entropy averaged over the images.

  Args:
    params: the only argument to differentiate in; a frozen encoder gets zeros.
    state: gives the network state.
    batch: images with labels.
    key: typed PRNG key, for the augmentation.
    apply_fn: the networks.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, network_state)`. The metrics are `loss` and
    `supervised/accuracy`, both on augmented images.

  Raises:
    ValueError: as `supervised_loss`.
  """
  images = batch.images if apply_fn.augment is None else apply_fn.augment(batch.images, key)
  read = params.encoder, state.network_state
  if config.frozen:
    read = jax.lax.stop_gradient(read)
  features, network_state = apply_fn.encoder(*read, images, train=not config.frozen)
  logits = apply_fn.classifier(params.classifier, features)
  value = jnp.mean(supervised_loss(logits, batch.labels))
  accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
  if config.frozen:
    network_state = state.network_state
  metrics = {"loss": value, "supervised/accuracy": accuracy}
  return value, (metrics, jax.lax.stop_gradient(network_state))


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one gradient step.

  Args:
    state: not donated.
    batch: images with labels.
    key: typed PRNG key, for the augmentation.
    apply_fn: the networks.
    optimizer: an optax transformation. Build it once: a new one compiles the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm`.
  """
  bound = {"apply_fn": apply_fn, "optimizer": optimizer, "config": config}
  if not config.frozen:
    return sharding.gradient_step(loss, state, batch, key, **bound)
  encoder, classifier = state.params

  def loss_of_classifier(params: Any, *args: Any, **kwargs: Any) -> Any:
    return loss(Params(encoder, params), *args, **kwargs)

  stepped, metrics = sharding.gradient_step(
    loss_of_classifier, state._replace(params=classifier), batch, key, **bound
  )
  # The statistics are given back as they came, so that `jax.vmap` sees that no rate changes them.
  return stepped._replace(
    params=Params(encoder, stepped.params), network_state=state.network_state
  ), metrics


def predict(state: State, images: Any, *, apply_fn: Networks) -> jax.Array:
  """Returns the logits `[B, C]` of images without augmentation, for evaluation."""
  params = state.params
  features, _ = apply_fn.encoder(params.encoder, state.network_state, images, train=False)
  return apply_fn.classifier(params.classifier, features)


def _wide(rows: jax.Array) -> jax.Array:
  return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
