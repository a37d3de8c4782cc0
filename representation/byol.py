"""BYOL: representations of images learned by predicting one view of an image from another.

Two views of each image are made at random. The online network is an encoder, a projector and a
predictor; the target network is an encoder and a projector of the same form. The prediction from
one view is compared with the target's projection of the other view, in both directions:

  loss = mean_i (|p_i - t'_i|^2 + |p'_i - t_i|^2) = 4 - 2 mean_i (cos(p_i, t'_i) + cos(p'_i, t_i)),

where p = predictor(projector(encoder(view))) and t = target(view) are divided by their norms. The
two directions are added, not averaged. There are no negative examples. The target gets no gradient.
After each step it becomes decay * target + (1 - decay) * online, where the decay rises to 1. A
linear classifier on the features may be trained beside it; its gradient stops at the features.

Reference: Grill et al. 2020, https://arxiv.org/abs/2006.07733.

| paper | here |
|---|---|
| f, g, q (theta) | `Parts.encoder`, `Parts.projector`, `Parts.predictor` of `State.params` |
| xi | `State.target_params` |
| T, T' | `Networks.views` |
| y, z, q(z), z' | features, projections, `online_predictions`, `target_projections` |
| tau | `moving_targets.decay_schedule(step)`, from `Config.target_decay` |
| alpha, beta (InfoNCE) | `Config.temperature`, `Config.negative_weight` |

Each view passes through a network alone, so batch normalisation sees one view at a time. Both
networks run in training mode, and each keeps its own running statistics.

The paper's ablations are options of `Config`: a constant random target (`target_decay=1`), no
target (`target="stopped"`), the best linear predictor (`predictor="least_squares"`), and the steps
from BYOL to SimCLR (`negative_weight`, with or without predictor and target). SimCLR is
`Config(target="online", predictor="none", negative_weight=1)`.

Deviations: the paper does not say to what the linear predictor is fitted. Here one predictor is
fitted to both directions, with normalised targets, and gets no gradient itself. Micro-batches are
refused, because batch normalisation would see each alone; the paper does so in its ablation of the
batch size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from representation import byol_variants, collapse, moving_targets
from sharding import averages, checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["target_decay", "negative_weight", "temperature", "ridge"],
  meta_fields=["num_steps", "target", "predictor", "normalise", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the defaults are the paper's for 1000 epochs of ImageNet at batch 4096.

  Attributes:
    target_decay: in [0, 1], tau at the first step.
    negative_weight: not negative, beta, the weight of the negative examples; None leaves them out.
    temperature: positive, alpha, the divisor of the cosines of negative examples.
    ridge: not negative, added to the second moments of the projections in the fit of the linear
      predictor, as a share of their mean.
    num_steps: positive, the step at which tau reaches 1; static.
    target: "moving" is the paper's target network. "stopped" has none: the online projections are
      the targets, without a gradient (tau = 0). "online" lets the gradient through, as in SimCLR.
      Static.
    predictor: "network", "none" (the projections are the predictions), or "least_squares" (the
      best linear map from projections to targets, found anew in each batch); static.
    normalise: whether predictions and targets are divided by their norms; static. Without it and
      with linear networks, BYOL is self-predictive learning.
    num_microbatches: must be 1, because batch normalisation couples examples.
  """

  target_decay: Any = 0.996
  negative_weight: Any = None
  temperature: Any = 0.1
  ridge: Any = 1e-6
  num_steps: int = 312_784
  target: str = "moving"
  predictor: str = "network"
  normalise: bool = True
  num_microbatches: int = 1

  def __post_init__(self):
    checks.probabilities("target_decay", self.target_decay)
    checks.positive("temperature", self.temperature)
    checks.not_negative("ridge", self.ridge)
    checks.count("num_steps", self.num_steps)
    checks.choice("target", self.target, ("moving", "stopped", "online"))
    checks.choice("predictor", self.predictor, ("network", "none", "least_squares"))
    if self.negative_weight is not None:
      checks.not_negative("negative_weight", self.negative_weight)
      if not self.normalise:
        raise ValueError(
          "normalise must be True with a negative_weight, because negative examples are compared "
          "by cosines: set negative_weight=None"
        )
    if self.num_microbatches != 1:
      raise ValueError(
        f"num_microbatches must be 1, got {self.num_microbatches}: batch normalisation sees the "
        "whole batch; split it over devices instead"
      )


class Batch(NamedTuple):
  """Images without labels, or with labels for the classifier.

  Attributes:
    images: `[B, ...]`, what `Networks.views` takes. If that is None, a pair of views.
    labels: `[B]` integers, or None.
  """

  images: Any
  labels: Any = None


class Parts(NamedTuple):
  """One entry for each network: its parameters, or its state such as running statistics.

  `()` stands for a network that is absent or has none. The target has an encoder and a projector.
  """

  encoder: Any
  projector: Any
  predictor: Any = ()
  classifier: Any = ()


class Networks(NamedTuple):
  """The networks, as hashable functions.

  The first three are called as `network(params, network_state, inputs, *, train)` and return
  `(outputs, network_state)`.

  Attributes:
    encoder: from a view to features `[B, F]`.
    projector: from features to projections `[B, K]`.
    predictor: from projections to predictions `[B, K]`; None where the config needs none.
    classifier: `classifier(params, features) -> logits [B, C]`, or None.
    views: `views(images, key) -> (first, second)`, or None if a batch holds the views.
  """

  encoder: Callable[..., Any]
  projector: Callable[..., Any]
  predictor: Callable[..., Any] | None = None
  classifier: Callable[..., Any] | None = None
  views: Callable[..., Any] | None = None


class NetworkState(NamedTuple):
  """State of both networks."""

  online: Parts
  target: Any


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: `Parts` of the online network.
    target_params: `Parts` of the target network, in float32 or wider; `()` without one.
    network_state: of both networks.
    opt_state: of the optimiser.
    step: scalar int32, the number of updates so far.
  """

  params: Parts
  target_params: Any
  network_state: NetworkState
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def byol_loss(online_predictions: jax.Array, target_projections: jax.Array) -> jax.Array:
  """Returns the squared distance of each prediction and target after normalisation, 2 - 2 cos.

  This is one direction. The loss of BYOL is the sum of both directions, in [0, 8].

  Args:
    online_predictions: `[B, K]`, from one view.
    target_projections: `[B, K]`, from the other view.

  Returns:
    `[B]` in [0, 4]. Only the predictions get gradients. A row of zeros has cosine 0.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> byol_loss(jnp.array([[3.0, 0.0], [1.0, 0.0]]), jnp.array([[5.0, 0.0], [0.0, 2.0]]))
    Array([0., 2.], dtype=float32)

  Reference: https://arxiv.org/abs/2006.07733, eq. 2.
  """
  checks.same_shape(online_predictions=online_predictions, target_projections=target_projections)
  return _distance(online_predictions, jax.lax.stop_gradient(target_projections))


def _distance(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  normalise = moving_targets.normalise
  return 2 - 2 * jnp.sum(normalise(predictions) * normalise(targets), axis=-1)


def init(
  params: Parts,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  target_params: Any = None,
  network_state: NetworkState | None = None,
) -> State:
  """Returns the state before the first step.

  Args:
    params: of the online network.
    optimizer: the one that `update` will get.
    config: says whether there is a target network.
    target_params: `Parts` of the target's encoder and projector. The paper draws them
      independently; the default is a copy of the online network's.
    network_state: of both networks; the default is `()` for each part.

  Raises:
    ValueError: if there are `target_params` and no target network.
  """
  if config.target != "moving":
    if target_params is not None:
      raise ValueError(
        f"target_params must be None with target={config.target!r}, which has no target network"
      )
    target_params = ()
  else:
    own = Parts(params.encoder, params.projector)
    target_params = averages.start(own if target_params is None else target_params)
  if network_state is None:
    network_state = NetworkState(Parts((), ()), Parts((), ()))
  return State(
    params, target_params, network_state, optimizer.init(params), jnp.zeros((), jnp.int32)
  )


def loss(
  params: Parts, state: State, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, NetworkState]]:
  """Returns the loss summed over both directions and averaged over the images.

  The cross-entropy of the classifier on the first view is added where there is a classifier.

  Args:
    params: the only argument to differentiate in.
    state: gives the target network and the network state.
    batch: images, with labels where there is a classifier.
    key: typed PRNG key, for the two views.
    apply_fn: the networks.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, network_state)`. The metrics are `loss`,
    `byol/prediction_loss` (without the classifier: in [0, 8] without negative examples, about 4 if
    predictions know nothing), `byol/cross_entropy` and `byol/accuracy` of the classifier, and those
    of `collapse.metrics` for the online projections of the first view. After a collapse the
    prediction loss is near 0 and `collapse/mean_cosine` near 1.

  Raises:
    ValueError: if a network or the labels are missing.
  """
  if config.predictor == "network" and apply_fn.predictor is None:
    raise ValueError("apply_fn has no predictor: give one, or set predictor to 'none'")
  if apply_fn.classifier is not None and batch.labels is None:
    raise ValueError("labels must be given to train a classifier: add them, or leave it out")
  views = batch.images if apply_fn.views is None else apply_fn.views(batch.images, key)
  online_state, target_state = state.network_state
  if config.target == "moving":
    target_params = averages.like(state.target_params, Parts(params.encoder, params.projector))
  features, projections, predictions, targets = [], [], [], []
  for view in views:
    seen, projected, online_state = _project(apply_fn, params, online_state, view)
    if config.predictor == "network":
      predicted, predictor_state = apply_fn.predictor(  # type: ignore[misc]
        params.predictor, online_state.predictor, projected, train=True
      )
      online_state = online_state._replace(predictor=predictor_state)
      predictions.append(_wide(predicted))
    features.append(seen)
    projections.append(_wide(projected))
    if config.target == "moving":
      _, target, target_state = _project(apply_fn, target_params, target_state, view)
      targets.append(_wide(target))
  if config.target != "moving":
    targets = projections
  if config.target != "online":
    targets = jax.lax.stop_gradient(targets)
  if config.predictor == "none":
    predictions = projections
  elif config.predictor == "least_squares":
    predictions = _predict_linearly(projections, targets, config)
  losses = jnp.zeros(len(targets[0]), targets[0].dtype)
  for here, there in ((0, 1), (1, 0)):
    if config.normalise:
      losses += _distance(predictions[here], targets[there])
    else:
      losses += jnp.sum((predictions[here] - targets[there]) ** 2, axis=-1)
    if config.negative_weight is not None:
      losses += config.negative_weight * byol_variants.negatives_loss(
        predictions[here], targets[here], targets[there], temperature=config.temperature
      )
  value = jnp.mean(losses)
  metrics = {
    "byol/prediction_loss": value,
    **collapse.metrics(jax.lax.stop_gradient(projections[0])),
  }
  if apply_fn.classifier is not None:
    logits = apply_fn.classifier(params.classifier, jax.lax.stop_gradient(features[0]))
    cross_entropy = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(_wide(logits), batch.labels)
    )
    value += cross_entropy
    metrics["byol/cross_entropy"] = cross_entropy
    metrics["byol/accuracy"] = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
  metrics["loss"] = value
  return value, (metrics, jax.lax.stop_gradient(NetworkState(online_state, target_state)))


def _project(networks: Networks, params: Parts, network_state: Parts, view: Any) -> Any:
  """Returns features, projections, and the network state after this view."""
  features, encoder_state = networks.encoder(
    params.encoder, network_state.encoder, view, train=True
  )
  projections, projector_state = networks.projector(
    params.projector, network_state.projector, features, train=True
  )
  return (
    features, projections, network_state._replace(encoder=encoder_state, projector=projector_state)
  )  # fmt: skip


def _predict_linearly(projections: Any, targets: Any, config: Config) -> list[jax.Array]:
  """Returns the predictions of one linear map that is fitted to both directions."""
  if config.normalise:
    targets = [moving_targets.normalise(rows) for rows in targets]
  inputs, outputs = jnp.concatenate(projections), jnp.concatenate(targets[::-1])
  weights = byol_variants.least_squares_predictor(inputs, outputs, ridge=config.ridge)
  return [rows @ jax.lax.stop_gradient(weights) for rows in projections]


def _wide(rows: jax.Array) -> jax.Array:
  return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


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
  """Returns the state after one gradient step, followed by one step of the target.

  Args:
    state: not donated.
    batch: images, with labels where there is a classifier.
    key: typed PRNG key, for the two views.
    apply_fn: the networks.
    optimizer: an optax transformation, in the paper `lars.lars`. Build it once: a new one compiles
      the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm` and, where there is a target network,
    `byol/target_decay`.
  """
  stepped, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  if config.target != "moving":
    return stepped, metrics
  decay = moving_targets.decay_schedule(
    state.step, target_decay=config.target_decay, num_steps=config.num_steps
  )
  online = Parts(stepped.params.encoder, stepped.params.projector)
  metrics["byol/target_decay"] = decay
  target_params = averages.move(state.target_params, online, decay)
  return stepped._replace(target_params=target_params), metrics


def embed(state: State, images: Any, *, apply_fn: Networks) -> jax.Array:
  """Returns the online encoder's features `[B, F]` of images without views, for evaluation."""
  encoder_state = state.network_state.online.encoder
  return apply_fn.encoder(state.params.encoder, encoder_state, images, train=False)[0]
