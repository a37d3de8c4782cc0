"""NFSP (arXiv:1603.01121), a baseline, on a compiled game; a step of the loop scans epochs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.loop import training
from experiments.tasks import game_runs
from rl_theory import games
from rl_theory.baselines import nfsp, nfsp_epochs
from rl_theory.networks import mlp


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns NFSP with networks of the config's sizes."""
  hyperparameters = nfsp.Config(**config.algorithm)
  observations = games.information_state_tensors(game)
  network = mlp.MLP(game.layout.num_actions, tuple(config.network.widths))
  apply_fn = nfsp.Networks(network.apply, network.apply)
  rates = config.optimizer
  optimizer = optax.multi_transform(
    {"values": optax.sgd(rates.values_learning_rate), "policy": optax.sgd(rates.learning_rate)},
    nfsp.Params("values", "policy"),
  )

  def init(key):
    keys = jax.random.split(key, (2, game.num_players))
    make = jax.vmap(lambda key: network.init(key, observations[:1, 0]))
    params = nfsp.Params(make(keys[0]), make(keys[1]))
    return nfsp.init(params, optimizer=optimizer, config=hyperparameters)

  def update(state, key):
    def body(state, key):
      return nfsp_epochs.epoch(
        state, game, observations, key, apply_fn=apply_fn, optimizer=optimizer,
        config=hyperparameters,
      )  # fmt: skip

    state, metrics = jax.lax.scan(body, state, jax.random.split(key, config.train.inner_steps))
    return state, jax.tree.map(jnp.mean, metrics)

  return game_runs.Solver(
    init=init,
    update=update,
    mean_policy=lambda state: nfsp_epochs.average_policy(
      state.params, game, observations, apply_fn=apply_fn
    ),
    env_steps=lambda state: state.env_steps,
  )
