"""An algorithm of your own for the launcher, in one file: least squares by gradient descent.

PYTHONPATH=docs bootstrax --config=docs/my_paper.py:small --workdir=runs/mine
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import sharding
from experiments.loop import training
from experiments.report import results
from experiments.tasks import bandits


class State(NamedTuple):
  """What changes in training."""

  params: jax.Array
  opt_state: Any
  step: jax.Array


def get_config(preset: str = "small") -> ml_collections.ConfigDict:
  """Returns the settings: the loop reads those from `sharding` on, `build` reads the others."""
  return ml_collections.ConfigDict(
    {
      "paper": "my_paper",  # the module with `build`: this file
      "preset": preset,
      "seed": 0,
      "algorithm": {"noise": 0.1},
      "optimizer": {"learning_rate": 0.1},
      "sharding": {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}},
      "train": {"num_steps": 100, "log_every": 1},
      "eval": {"every": 25},
      "checkpoint": {"every": 25, "keep": 1},
    }
  )


def build(config: ml_collections.ConfigDict) -> training.Experiment:
  """Returns what the loop trains."""
  optimizer = optax.adam(config.optimizer.learning_rate)
  rng = np.random.default_rng(config.seed)
  inputs, weights = rng.normal(size=(64, 4)), np.arange(4.0)
  outputs = inputs @ weights + config.algorithm.noise * rng.normal(size=64)
  data = (jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32))

  def loss(params, state, batch, key, *, apply_fn, config):
    del state, key, config
    value = jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)
    return value, ({"loss": value}, ())

  def init(key):
    params = jax.random.normal(key, (4,))
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  def update(state, batch, key):
    del batch  # the data are few: every step takes all of them
    return sharding.gradient_step(
      loss, state, data, key, apply_fn=lambda w, x: x @ w, optimizer=optimizer, config=None
    )

  def evaluate(state):
    error = float(np.abs(np.asarray(state.params) - weights).max())
    return results.Result(metrics={"largest_error": error})

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="largest_error",
    maximise=False,
    evaluate=evaluate,
  )
