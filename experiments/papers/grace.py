"""GRACE (arXiv:2006.04131) on one graph, beside BGRL: the same encoder, corruptions and judge."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.loop import training
from experiments.tasks import graph_runs
from representation.baselines import grace
from representation.networks import adapters, mlp


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  algorithm = grace.Config(**config.algorithm)
  optimizer = graph_runs.make_optimizer(config)
  encoder, width = graph_runs.make_encoder(config), config.network.widths[-1]
  projector = adapters.Predictor(mlp.MLP(config.network.predictor_width, width, jax.nn.elu))
  apply_fn = grace.Networks(encoder, projector)

  def init(key, graph):
    encoder_key, projector_key = jax.random.split(key)
    params, network_state = encoder.init(encoder_key, graph)
    return grace.init(
      grace.Params(params, projector.init(projector_key, jnp.zeros((1, width)))),
      optimizer=optimizer,
      config=algorithm,
      network_state=network_state,
    )

  return graph_runs.build(
    config,
    encoder=encoder,
    init=init,
    update=functools.partial(
      grace.update, apply_fn=apply_fn, optimizer=optimizer, config=algorithm
    ),
    embed=functools.partial(grace.embed, apply_fn=apply_fn),
  )
