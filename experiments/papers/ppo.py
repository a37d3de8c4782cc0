"""PPO with a magnet, a baseline, on a compiled game. Each training step is one epoch."""

from typing import Any

import jax

from experiments.loop import training
from experiments.tasks import game_runs
from rl_theory import games
from rl_theory.baselines import ppo, ppo_epochs
from rl_theory.networks import mlp


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns PPO with networks of the sizes in the config, shared by all players."""
  hyperparameters = ppo.Config(**config.algorithm)
  observations = games.information_state_tensors(game)
  policy = mlp.MLP(game.layout.num_actions, tuple(config.network.widths))
  values = mlp.MLP(1, tuple(config.network.widths))
  apply_fn = ppo.Networks(policy.apply, values.apply)
  num_steps = config.train.num_steps * hyperparameters.num_steps
  optimizer = game_runs.make_optimizer(config.optimizer, num_steps)

  def init(key):
    keys = jax.random.split(key)
    params = ppo.Params(
      policy.init(keys[0], observations[:1, 0]), values.init(keys[1], observations[:1, 0])
    )
    return ppo.init(params, optimizer=optimizer, config=hyperparameters)

  def update(state, key):
    return ppo_epochs.epoch(
      state, game, observations, key, apply_fn=apply_fn, optimizer=optimizer,
      config=hyperparameters,
    )  # fmt: skip

  return game_runs.Solver(
    init=init,
    update=update,
    mean_policy=lambda state: ppo_epochs.current_policy(
      state.params, game, observations, apply_fn=apply_fn
    ),
    env_steps=lambda state: state.env_steps,
  )
