"""ARMAC (arXiv:2008.12234) on a compiled game. Each training step runs one epoch for every seed."""

from typing import Any

import jax

from experiments.loop import training
from experiments.tasks import game_runs
from rl_theory import armac, armac_epochs, armac_play, games
from rl_theory.networks import actor_critic
from sharding import checks


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns ARMAC with networks of the sizes in the config."""
  game_runs.check_others(game, "ARMAC")
  hyperparameters = armac.Config(**config.algorithm)
  checks.choice("config.network.encoder", config.network.encoder, ("mlp", "lstm"))
  recurrent = config.network.encoder == "lstm"
  observations = games.information_state_tensors(game)
  if recurrent:
    observations = games.observation_histories(game, observations)
  sizes = (config.network.width, config.network.block_width, recurrent)
  actor = actor_critic.Actor(game.layout.num_actions, *sizes)
  critic = actor_critic.Critic(game.num_players, game.layout.num_actions, *sizes)
  apply_fn = armac.Networks(actor.apply, critic.apply)
  num_steps = config.train.num_steps * hyperparameters.num_actor_steps
  optimizer = game_runs.make_optimizer(config.optimizer, num_steps)

  def init(key):
    actor_key, critic_key = jax.random.split(key)
    params = armac.Params(
      actor.init(actor_key, observations[:1, 0]), critic.init(critic_key, observations[:1])
    )
    return armac.init(params, optimizer=optimizer, config=hyperparameters)

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
