"""ARMAC from sums over all episodes, on a compiled game (arXiv:2008.12234, `rl_theory.armac_sums`).

Each training step runs one epoch for every seed.
"""

from collections.abc import Sequence
from typing import Any

from experiments.loop import training
from experiments.report import plots, results
from experiments.tasks import game_runs
from rl_theory import armac_play, armac_sums, armac_sums_epochs, games


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  game = game_runs.compile_game(config)
  return game_runs.build(config, game, solver(config, game))


def solver(config: Any, game: games.Game) -> game_runs.Solver:
  """Returns the solver with networks of the sizes in the config."""
  hyperparameters = armac_sums.Config(**config.algorithm)
  observations = games.information_state_tensors(game)
  found = armac_sums.decisions(game, observations)
  apply_fn, init_params = game_runs.armac_networks(config, game, observations)
  num_steps = config.train.num_steps * hyperparameters.num_actor_steps
  optimizer = game_runs.make_optimizer(config.optimizer, num_steps)

  def init(key):
    return armac_sums.init(init_params(key), game, optimizer=optimizer, config=hyperparameters)

  def update(state, key):
    policy = state.policy
    state, metrics = armac_sums_epochs.epoch(
      state, game, found, key, apply_fn=apply_fn, optimizer=optimizer, config=hyperparameters
    )
    regrets = armac_sums_epochs.advantages(state.params, policy, found, apply_fn=apply_fn)
    error = armac_sums_epochs.advantage_error(regrets, policy, game, found)
    imitated = armac_sums_epochs.mean_policy_of(state.sums, game)
    return state, metrics | {
      "armac/advantage_error": error,
      "nash_conv/imitated": games.nash_conv(game, imitated),
    }

  return game_runs.Solver(
    init=init,
    update=update,
    mean_policy=lambda state: armac_play.mean_policy(
      state.params, game, observations, apply_fn=apply_fn
    ),
    env_steps=lambda state: state.env_steps,
    figures=lambda history: [_what_limits(history)],
  )


def _what_limits(history: Sequence[dict[str, Any]]) -> results.Figure:
  """Draws the two networks against the exact things that they stand for."""
  figure, axes = plots.subplots(1, 2)
  epochs = [row["step"] for row in history]
  policy, values = axes[0]
  policy.plot(epochs, [row["nash_conv"] for row in history], label="policy head")
  policy.plot(epochs, [row["nash_conv/imitated"] for row in history], "--", label="past policies")
  policy.set(xlabel="epochs", ylabel="NashConv", yscale="log")
  plots.legend_below(figure, policy)
  values.plot(epochs, [row["armac/advantage_error"] for row in history])
  values.set(xlabel="epochs", ylabel="advantage error", ylim=(0, None))
  return results.Figure(
    name="what_limits",
    caption="Left: the mean policy as the head has learned it, and as the mean of the past "
    "policies themselves. Right: root mean squared error of the advantages that the critic gives, "
    "in utilities, against those of the whole tree. Means over seeds.",
    figure=figure,
  )
