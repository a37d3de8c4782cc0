"""Runs on a compiled game: several seeds at once, measured by the exact NashConv of each.

Each step of the training loop applies `Solver.update` to every seed, with vmap. For ARMAC and NFSP
that is an epoch, for CFR a scan of iterations. The loop then measures each mean policy on the whole
tree. This is cheap compared with the update, so every step gives a point of the learning curve.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import files
from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits, game_figures
from rl_theory import armac, games, policy_arrays, policy_files
from rl_theory.networks import actor_critic
from sharding import checks

_MAX_ROWS = 40  # information states in a heat map
# NashConv of ARMAC's mean policy over steps, read off the figure of its paper (arXiv:2008.12234).
PUBLISHED = {
  "leduc_poker": ((1.26e6, 0.98), (3.6e6, 0.55), (5.6e6, 0.41), (1.2e7, 0.25), (2.2e7, 0.18)),
}


class Solver(NamedTuple):
  """One method on one game, for one seed. All functions are pure.

  Attributes:
    init: `init(key) -> state`.
    update: `update(state, key) -> (state, metrics)`, one step of the loop.
    mean_policy: `mean_policy(state) -> [S, A]`, the policy that is measured.
    env_steps: `env_steps(state) -> []`, decisions that were played or visited so far.
    figures: `figures(history) -> figures`, drawn beside those of all solvers.
  """

  init: Callable[[jax.Array], Any]
  update: Callable[[Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
  mean_policy: Callable[[Any], jax.Array]
  env_steps: Callable[[Any], jax.Array]
  figures: Callable[[Sequence[dict[str, Any]]], list[results.Figure]] = lambda history: []


class Runs(NamedTuple):
  """State of the training loop.

  learners: the state of each seed, leaves `[num_seeds, ...]`.
  step: `[]` int32, counts steps of the training loop.
  """

  learners: Any
  step: jax.Array


def compile_game(config: Any) -> games.Game:
  """Returns the game of a config.

  Raises:
    ValueError: if a field of `environment` is invalid.
  """
  checks.count("config.environment.num_seeds", config.environment.num_seeds)
  game = config.environment.game
  if game.lower().endswith(".efg"):
    game = str(files.local_path("config.environment.game", game))
  return games.compile_game(game, max_nodes=config.environment.max_nodes)


def armac_networks(
  config: Any, game: games.Game, observations: jax.Array, *, recurrent: bool = False
) -> tuple[armac.Networks, Callable[[jax.Array], armac.Params]]:
  """Returns ARMAC's networks and `init(key) -> params`.

  Args:
    config: `network.width` and `network.block_width` are used.
    game: the game.
    observations: `[H, n, ...]`, what the networks read.
    recurrent: whether observations are sequences.

  Raises:
    ValueError: the game has one player, who would have no mean policy.
  """
  if game.num_players < 2:
    raise ValueError(
      f"config.environment.game: ARMAC learns its mean policy where others play, and "
      f"{game.layout.name} has one player; use cfr:, or exploration: for ARMAC as a single agent"
    )
  sizes = (config.network.width, config.network.block_width, recurrent)
  actor = actor_critic.Actor(game.layout.num_actions, *sizes)
  critic = actor_critic.Critic(game.num_players, game.layout.num_actions, *sizes)

  def init(key: jax.Array) -> armac.Params:
    actor_key, critic_key = jax.random.split(key)
    return armac.Params(
      actor.init(actor_key, observations[:1, 0]), critic.init(critic_key, observations[:1])
    )

  return armac.Networks(actor.apply, critic.apply), init


def make_optimizer(config: Any, num_steps: int) -> optax.GradientTransformation:
  """Returns Adam with clipped gradients; its rate falls linearly to `final_scale` of itself."""
  rate = config.learning_rate
  schedule = optax.linear_schedule(rate, rate * config.final_scale, num_steps)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule))


def build(config: Any, game: games.Game, solver: Solver) -> training.Experiment:
  """Returns the experiment that runs a solver with `environment.num_seeds` seeds."""
  num_seeds = config.environment.num_seeds

  def init(key):
    learners = jax.vmap(solver.init)(jax.random.split(key, num_seeds))
    return Runs(learners, jnp.zeros((), jnp.int32))

  def update(runs, batch, key):
    del batch  # each seed plays its own episodes
    learners, metrics = jax.vmap(solver.update)(runs.learners, jax.random.split(key, num_seeds))
    distances = jax.vmap(lambda one: games.nash_conv(game, solver.mean_policy(one)))(learners)
    measured = {
      "nash_conv": jnp.mean(distances),
      "nash_conv/low": jnp.min(distances),
      "nash_conv/high": jnp.max(distances),
      "env_steps": jnp.mean(jax.vmap(solver.env_steps)(learners).astype(jnp.float32)),
    }
    return Runs(learners, runs.step + 1), jax.tree.map(jnp.mean, metrics) | measured

  policies = jax.jit(lambda runs: jax.vmap(solver.mean_policy)(runs.learners))
  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="nash_conv",
    maximise=False,
    evaluate=lambda runs: _result(config, game, policies(runs), runs, solver),
    sample=lambda runs: policy_table(game, np.asarray(policies(runs))[0]),
    export=lambda runs, folder: _export(game, np.asarray(policies(runs))[0], folder),
    figures=lambda history, result: [
      curves({str(config.paper): history}, game=config.environment.game),
      *solver.figures(history),
      game_figures.policy_heat_map(game, result.arrays["policy"], states=_first_states(game)),
    ],
  )


def _result(
  config: Any, game: games.Game, policies: jax.Array, runs: Runs, solver: Solver
) -> results.Result:
  distances = np.asarray(jax.vmap(functools.partial(games.nash_conv, game))(policies))
  values = np.asarray(jax.vmap(functools.partial(games.expected_values, game))(policies))
  uniform = float(games.nash_conv(game, policy_arrays.uniform(game)))
  steps = int(np.mean(np.asarray(jax.vmap(solver.env_steps)(runs.learners))))
  metrics = {
    "nash_conv": results.Estimate(
      float(distances.mean()),
      float(distances.min()),
      float(distances.max()),
      note=f"range of {len(distances)} seeds" if len(distances) > 1 else "",
    ),
    "env_steps": float(steps),
  }
  tables = [
    results.Table(
      "Mean policies",
      ["seed", "NashConv", "exploitability", "values of the players"],
      [
        [k, float(d), float(d) / game.num_players, [*map(float, value)]]
        for k, (d, value) in enumerate(zip(distances, values, strict=True))
      ],
      caption="NashConv sums what each player gains by a best response; exploitability is the mean "
      f"over players. Uniform play has a NashConv of {uniform:.4f}.",
    ),
  ]
  bar = float(config.environment.bar)
  if bar:
    criteria = [(f"NashConv of every seed below {bar:g}", bool(np.all(distances < bar)))]
    tables.insert(0, results.checks_table("Pass criteria", criteria))
    metrics["criteria_passed"] = statistics.fraction_passed(criteria)
  notes = []
  if game.num_players > 1 and not games.is_constant_sum(game):
    notes.append(
      f"{game.layout.name} is not a two-player zero-sum game. Only in those is it proved that the "
      "mean policy nears an equilibrium: here NashConv may stay above zero, however long the run."
    )
  arrays = {"policy": np.asarray(policies[0])}
  return results.Result(metrics=metrics, tables=tables, notes=notes, arrays=arrays)


def policy_table(game: games.Game, policy: np.ndarray) -> results.Table:
  """Returns a table of the policy, one row for each information state."""
  rows = [
    [player, string, [*map(float, probs)]]
    for player, string, probs in zip(
      np.asarray(game.state_players).tolist(), game.state_strings, policy, strict=True
    )
  ]
  return results.Table(
    "Mean policy of seed 0", ["player", "information state", "probabilities of actions"], rows
  )


def _export(game: games.Game, policy: np.ndarray, folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for ending in ("json", "csv"):  # an interrupted run may have left files: replace them
    policy_files.write_policy(folder / f"policy.{ending}", game, policy, overwrite=True)


def curves(records: Mapping[str, Sequence[dict[str, Any]]], game: str) -> results.Figure:
  """Draws NashConv against decisions and against seconds, with one curve for each method."""
  figure, axes = plots.subplots(1, 2, sharey=True)
  for axis, name, label, scale in (
    (axes[0][0], "env_steps", "decisions", "log"),
    (axes[0][1], "seconds", "seconds, with compilation", "linear"),
  ):
    for number, (method, rows) in enumerate(records.items()):
      along = np.array([row[name] for row in rows])
      dashes = "--" if number >= len(plots.PALETTE) else "-"  # the colours start again
      (line,) = axis.plot(along, [row["nash_conv"] for row in rows], dashes, label=method)
      low, high = ([row[f"nash_conv/{end}"] for row in rows] for end in ("low", "high"))
      axis.fill_between(along, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel=label, xscale=scale, yscale="log")
  axes[0][0].set_ylabel("NashConv of the mean policy")
  caption = "The curves show the exact NashConv of the mean policy, computed on the whole tree."
  published = PUBLISHED.get(game, ())
  if published:
    axes[0][0].plot(*zip(*published, strict=True), "kx", label="ARMAC, published")
    caption += " Crosses were read off the figure of the ARMAC paper; it counts steps."
  if len(records) > 1 or published:
    plots.legend_below(figure, axes[0][0])
  if any(row["nash_conv/low"] < row["nash_conv/high"] for rows in records.values() for row in rows):
    caption += " Lines are means over seeds, and bands reach from the best to the worst seed."
  return results.Figure(name="nash_conv", caption=caption, figure=figure)


def _first_states(game: games.Game) -> list[int]:
  """Returns the first information states of each player, as many as fit into one figure."""
  each = _MAX_ROWS // game.num_players
  slices = [game.layout.player_slice(player) for player in range(game.num_players)]
  return [row for own in slices for row in range(own.start, min(own.start + each, own.stop))]
