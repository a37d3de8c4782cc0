"""BYOL (arXiv:2006.07733) on images; probes evaluate the features of its encoder."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.loop import training
from experiments.tasks import image_evaluation, image_figures, image_runs
from representation import byol
from representation.networks import adapters, mlp


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  settings = dict(config.algorithm)
  predictor_rate = settings.pop("predictor_rate")
  algorithm = byol.Config(**settings, num_steps=config.train.num_steps)
  data = image_runs.load(config)
  apply_fn = make_networks(config, num_classes=len(data.class_names))
  optimizer = image_runs.make_optimizer(config)
  if predictor_rate != 1:
    faster = byol.Parts(False, False, True, False)
    optimizer = optax.chain(optimizer, optax.masked(optax.scale(predictor_rate), faster))

  def init(key):
    return init_state(key, config, apply_fn, optimizer=optimizer, algorithm=algorithm)

  def update(state, batch, key):
    return byol.update(
      state,
      byol.Batch(*image_runs.take(batch)),
      key,
      apply_fn=apply_fn,
      optimizer=optimizer,
      config=algorithm,
    )

  evaluator = image_evaluation.Evaluator(config, data, apply_fn.encoder)

  def evaluate(state):
    params, network_state = state.params.encoder, state.network_state.online.encoder
    final = int(state.step) == config.train.num_steps
    return evaluator.result(params, network_state, final=final)

  return training.Experiment(
    init=init,
    update=update,
    batches=image_runs.make_batches(config, data),
    headline="knn_accuracy",
    evaluate=evaluate,
    figures=lambda history, result: image_figures.draw(config, data, history, result),
  )


def make_networks(config: Any, *, num_classes: int) -> Any:
  """Returns the `byol.Networks` of a config, which are adapters; the classifier only observes."""
  section, dtype = config.network, image_runs.compute_dtype(config)

  def head():
    return adapters.Encoder(mlp.BatchNormMLP(section.hidden, section.projection, dtype=dtype))

  return byol.Networks(
    encoder=image_runs.make_encoder(config),
    projector=head(),
    predictor=head() if config.algorithm.predictor == "network" else None,
    classifier=adapters.Predictor(nn.Dense(num_classes, kernel_init=mlp.TRUNCATED)),
    views=image_runs.make_views(config),
  )


def init_state(
  key: jax.Array,
  config: Any,
  networks: Any,
  *,
  optimizer: optax.GradientTransformation,
  algorithm: byol.Config,
) -> byol.State:
  """Returns the first state; online and target network start from parameters of their own."""
  size = config.views.size
  images = jnp.zeros((2, size, size, 3))

  def both(key):
    encoder_key, projector_key = jax.random.split(key)
    params, state = networks.encoder.init(encoder_key, images)
    features = jax.eval_shape(lambda: networks.encoder(params, state, images, train=False)[0])
    features = jnp.zeros(features.shape, features.dtype)
    projector, projector_state = networks.projector.init(projector_key, features)
    return byol.Parts(params, projector), byol.Parts(state, projector_state), features

  online_key, target_key, predictor_key, classifier_key = jax.random.split(key, 4)
  params, state, features = both(online_key)
  target_params, target_state, _ = both(target_key)
  if networks.predictor is not None:
    projections = jnp.zeros((2, config.network.projection))
    predictor, predictor_state = networks.predictor.init(predictor_key, projections)
    params, state = params._replace(predictor=predictor), state._replace(predictor=predictor_state)
  params = params._replace(classifier=networks.classifier.init(classifier_key, features))
  moving = algorithm.target == "moving"
  return byol.init(
    params,
    optimizer=optimizer,
    config=algorithm,
    target_params=target_params if moving else None,
    network_state=byol.NetworkState(state, target_state if moving else byol.Parts((), ())),
  )
