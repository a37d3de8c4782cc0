"""BGRL (arXiv:2102.06514) on one graph: full-graph steps, then a linear layer on the embeddings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.loop import training
from experiments.tasks import graph_runs
from representation import bgrl
from representation.networks import adapters, mlp


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  algorithm = bgrl.Config(**config.algorithm, num_steps=config.train.num_steps)
  optimizer = graph_runs.make_optimizer(config)
  encoder, width = graph_runs.make_encoder(config), config.network.widths[-1]
  predictor = adapters.Predictor(mlp.MLP(config.network.predictor_width, width))
  apply_fn = bgrl.Networks(encoder, predictor)

  def init(key, graph):
    online_key, target_key, predictor_key = jax.random.split(key, 3)
    params, online_state = encoder.init(online_key, graph)
    # Drawn for itself, as the authors do, not copied.
    target_params, target_state = encoder.init(target_key, graph)
    return bgrl.init(
      bgrl.Params(params, predictor.init(predictor_key, jnp.zeros((1, width)))),
      optimizer=optimizer,
      config=algorithm,
      target_params=target_params,
      network_state=bgrl.NetworkState(online_state, target_state),
    )

  return graph_runs.build(
    config,
    encoder=encoder,
    init=init,
    update=functools.partial(bgrl.update, apply_fn=apply_fn, optimizer=optimizer, config=algorithm),
    embed=functools.partial(bgrl.embed, apply_fn=apply_fn),
  )
