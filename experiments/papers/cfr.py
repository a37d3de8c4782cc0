"""CFR and mirror descent on the whole tree and outcome-sampling MCCFR, the baselines of ARMAC."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import training
from experiments.tasks import game_runs
from rl_theory import cfr, games, mccfr, mirror_descent
from sharding import checks


class State(NamedTuple):
  """The solver's state, and the number of decisions visited so far."""

  inner: Any
  env_steps: jax.Array


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns the solver of `algorithm.variant`: a variant of CFR, "mccfr" or "mirror_descent"."""
  variant, inner_steps = config.algorithm.variant, config.train.inner_steps
  checks.choice("config.algorithm.variant", variant, (*cfr.VARIANTS, "mccfr", "mirror_descent"))
  sampled, magnetic = variant == "mccfr", variant == "mirror_descent"
  method: Any = mccfr if sampled else mirror_descent if magnetic else cfr
  hyperparameters: Any
  start: Any
  if sampled:
    hyperparameters = mccfr.Config(num_samples=config.algorithm.num_samples)
    start = mccfr.init(game)
  elif magnetic:
    hyperparameters = _relative(mirror_descent.Config(**config.mirror_descent), game)
    start = mirror_descent.init(game, hyperparameters)
  else:
    hyperparameters = cfr.make_config(variant)
    start = cfr.init(game, hyperparameters)
  # The pass of each player visits all decisions of the tree.
  whole = int(np.sum(np.asarray(game.players) >= 0)) * game.num_players

  def update(state, key):
    def body(state, key):
      inner, metrics = method.update(state.inner, game, key, config=hyperparameters)
      if sampled:
        # Chance nodes are counted too, so the number of decisions is slightly too large.
        visited = (metrics["mccfr/nodes"] - 1) * game.num_players * config.algorithm.num_samples
      else:
        visited = jnp.asarray(whole, jnp.float32)
      return State(inner, state.env_steps + visited), metrics

    state, metrics = jax.lax.scan(body, state, jax.random.split(key, inner_steps))
    return state, jax.tree.map(lambda x: x[-1], metrics)

  # With a magnet the last policy converges, otherwise the average.
  last = magnetic and config.mirror_descent.temperature > 0
  policy = method.current_policy if last else method.average_policy
  return game_runs.Solver(
    init=lambda key: State(start, jnp.zeros(())),
    update=update,
    mean_policy=lambda state: policy(game, state.inner),
    env_steps=lambda state: state.env_steps,
  )


def _relative(config: mirror_descent.Config, game: games.Game) -> mirror_descent.Config:
  """Returns the config of a game from one for utilities of at most 1."""
  largest = float(np.max(np.abs(np.asarray(game.utilities)))) or 1.0
  return dataclasses.replace(
    config,
    learning_rate=config.learning_rate / largest,
    temperature=config.temperature * largest,
  )
