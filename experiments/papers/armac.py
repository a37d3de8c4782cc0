"""ARMAC (arXiv:2008.12234) on a compiled game. Each training step runs one epoch for every seed."""

from typing import Any

from experiments.loop import training
from experiments.tasks import game_runs
from rl_theory import armac, armac_epochs, armac_play, games
from sharding import checks


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns ARMAC with networks of the sizes in the config."""
  hyperparameters = armac.Config(**config.algorithm)
  checks.choice("config.network.encoder", config.network.encoder, ("mlp", "lstm"))
  recurrent = config.network.encoder == "lstm"
  observations = games.information_state_tensors(game)
  if recurrent:
    observations = games.observation_histories(game, observations)
  apply_fn, init_params = game_runs.armac_networks(config, game, observations, recurrent=recurrent)
  num_steps = config.train.num_steps * hyperparameters.num_actor_steps
  optimizer = game_runs.make_optimizer(config.optimizer, num_steps)

  def init(key):
    return armac.init(init_params(key), optimizer=optimizer, config=hyperparameters)

  def update(state, key):
    return armac_epochs.epoch(
      state, game, observations, key, apply_fn=apply_fn, optimizer=optimizer,
      config=hyperparameters,
    )  # fmt: skip

  return game_runs.Solver(
    init=init,
    update=update,
    mean_policy=lambda state: armac_play.mean_policy(
      state.params, game, observations, apply_fn=apply_fn
    ),
    env_steps=lambda state: state.env_steps,
  )
