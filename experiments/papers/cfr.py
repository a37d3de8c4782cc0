"""CFR over the whole tree and outcome-sampling MCCFR, what ARMAC is measured beside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import training
from experiments.tasks import game_runs
from rl_theory import cfr, games, mccfr


class State(NamedTuple):
  """The solver's state, and decisions passed so far."""

  inner: cfr.State
  env_steps: jax.Array


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns the variant `algorithm.variant`: one of CFR's, or "mccfr"."""
  variant, inner_steps = config.algorithm.variant, config.train.inner_steps
  if variant != "mccfr" and variant not in cfr.VARIANTS:
    listed = ", ".join(map(repr, (*cfr.VARIANTS, "mccfr")))
    raise ValueError(f"config.algorithm.variant={variant!r}: give one of {listed}")
  sampled = variant == "mccfr"
  hyperparameters: Any = (
    mccfr.Config(num_samples=config.algorithm.num_samples) if sampled else cfr.make_config(variant)
  )
  # Each player's pass over the tree meets all decisions.
  whole = int(np.sum(np.asarray(game.players) >= 0)) * game.num_players

  def update(state, key):
    def body(state, key):
      if sampled:
        inner, metrics = mccfr.update(state.inner, game, key, config=hyperparameters)
        # Moves of chance are met too and counted: what it has seen is a little overstated.
        met = (metrics["mccfr/nodes"] - 1) * game.num_players * config.algorithm.num_samples
      else:
        inner, metrics = cfr.update(state.inner, game, config=hyperparameters)
        met = jnp.asarray(whole, jnp.float32)
      return State(inner, state.env_steps + met), metrics

    state, metrics = jax.lax.scan(body, state, jax.random.split(key, inner_steps))
    return state, jax.tree.map(lambda x: x[-1], metrics)

  return game_runs.Solver(
    init=lambda key: State(cfr.init(game), jnp.zeros(())),
    update=update,
    mean_policy=lambda state: cfr.average_policy(game, state.inner),
    env_steps=lambda state: state.env_steps,
  )
