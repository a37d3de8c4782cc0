"""ARMAC (arXiv:2008.12234) as a single agent: deep sea, where one way of 2^size brings a reward.

With one player there is nobody to average over, and the actor plays regret matching on the mean of
its own past advantages. Once a policy is good its advantages vanish, but those of its predecessors
stay in the mean. Beside it runs the same method on the advantages of its newest policy alone, as an
actor-critic has them. Both by tables; the explorers, two thirds of them uniform, are the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits
from rl_theory import armac, armac_tables, games, policy_arrays, regret_matching
from sharding import checks


class Runs(NamedTuple):
  """State of the loop; leaves of the dictionaries, by size, begin with `[recencies, seeds]`.

  learners: states of ARMAC.
  returns: sums over the epochs of what pi^t gets.
  step: `[]` int32, epochs done.
  """

  learners: dict[str, Any]
  returns: dict[str, jax.Array]
  step: jax.Array


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  sizes, num_seeds = config.environment.sizes, config.environment.num_seeds
  if not sizes:
    raise ValueError("config.environment.sizes is empty: give one or more, such as (3, 5)")
  for size in sizes:
    checks.count("config.environment.sizes", size)
  checks.count("config.environment.num_seeds", num_seeds)
  algorithm = config.algorithm.to_dict()
  recencies = tuple(float(value) for value in algorithm.pop("recency"))
  if len(recencies) != 2 or recencies[0] >= recencies[1]:
    raise ValueError(f"config.algorithm.recency={recencies}: give two numbers, the smaller first")
  hyperparameters = armac.Config(**algorithm)
  solved = {
    str(size): games.compile_game(
      f"{config.environment.game}(size={size})", max_nodes=config.environment.max_nodes
    )
    for size in sizes
  }

  def init(key):
    del key  # tables begin empty
    learners = {
      size: bandits.broadcast(armac_tables.init(game, config=hyperparameters), (2, num_seeds))
      for size, game in solved.items()
    }
    returns = {size: jnp.zeros((2, num_seeds)) for size in solved}
    return Runs(learners, returns, jnp.zeros((), jnp.int32))

  def update(runs, batch, key):
    del batch
    learners, returns, metrics = {}, {}, {}
    for size, game in solved.items():

      def epoch(learner, recency, key, game=game):
        learner, _ = armac_tables.update(
          learner, game, key,
          config=armac.Config(**algorithm, recency=recency),
          learning_rate=config.optimizer.learning_rate,
        )  # fmt: skip
        policy = regret_matching.regret_matching(learner.params.actor.regrets, game.legal)
        return learner, games.expected_values(game, policy)[0]

      over_seeds = jax.vmap(epoch, in_axes=(0, None, 0))
      learners[size], gained = jax.vmap(over_seeds, in_axes=(0, 0, None))(
        runs.learners[size], jnp.array(recencies), jax.random.split(key, num_seeds)
      )
      returns[size] = runs.returns[size] + gained
      for name, rows in zip(_names(recencies), gained, strict=True):
        metrics[f"return/{size}/{name}"] = rows.mean()
    metrics["return"] = metrics[f"return/{size}/{_names(recencies)[0]}"]
    return Runs(learners, returns, runs.step + 1), metrics

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="return",
    evaluate=lambda runs: _result(runs, solved, recencies),
    figures=lambda history, result: [_figure(history, result, solved, recencies)],
  )


def _names(recencies: tuple[float, ...]) -> list[str]:
  return [f"recency {recency:g}" for recency in recencies]


def _result(
  runs: Runs, solved: dict[str, games.Game], recencies: tuple[float, ...]
) -> results.Result:
  """Judges the mean return over all epochs: what would have been earned by playing pi^t."""
  names, step = _names(recencies), max(int(runs.step), 1)
  rows, criteria, found, arrays = [], [], {}, {}
  for size, game in solved.items():
    means = np.asarray(runs.returns[size], float) / step  # [2, seeds]
    uniform = policy_arrays.uniform(game)
    best = float(games.best_response_values(game, uniform)[0])
    chance = float(games.expected_values(game, uniform)[0])
    arrays[f"returns/{size}"] = means
    arrays[f"chance/{size}"] = np.array(chance)
    decisions = int(np.mean(np.asarray(runs.learners[size].env_steps)))
    cells = [results.Estimate(float(x.mean()), float(x.min()), float(x.max())) for x in means]
    rows.append([size, decisions, best, chance, *cells])
    gap = means[0] - means[1]
    found[f"gain/{size}"] = statistics.mean_interval(gap)
    criteria.append(
      (f"size {size}: the whole past earns more with every seed", bool(gap.min() > 0))
    )
  columns = ["size", "decisions", "best", "uniform play", *names]
  title = "Return of the current policy, mean over epochs; mean of seeds [worst, best]"
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(criteria), **found},
    tables=[results.checks_table("Pass criteria", criteria), results.Table(title, columns, rows)],
    arrays=arrays,
  )


def _figure(
  history: Any, result: Any, solved: dict[str, games.Game], recencies: tuple[float, ...]
) -> results.Figure:
  figure, axes = plots.subplots(1, 2, sharey=True)
  largest, names = list(solved)[-1], _names(recencies)
  sizes = [int(size) for size in solved]
  for k, name in enumerate(names):
    curve = np.array([row[f"return/{largest}/{name}"] for row in history])
    window = np.ones(max(len(curve) // 20, 1))
    smooth = np.convolve(curve, window / len(window), "valid")
    (line,) = axes[0][0].plot(np.arange(len(smooth)) + len(window), smooth, label=name)
    ends = np.stack([result.arrays[f"returns/{size}"][k] for size in solved])
    axes[0][1].plot(sizes, ends.mean(1), marker="o", color=line.get_color())
    axes[0][1].fill_between(
      sizes, ends.min(1), ends.max(1), color=line.get_color(), alpha=0.2, linewidth=0
    )
  chances = [float(result.arrays[f"chance/{size}"]) for size in solved]
  axes[0][1].plot(sizes, chances, color="0.5", linestyle=":")
  axes[0][0].axhline(chances[-1], color="0.5", linestyle=":", label="uniform play")
  axes[0][0].set(xlabel=f"epochs, size {largest}", ylabel="return of the current policy")
  axes[0][1].set(xlabel="size of the sea", xticks=sizes)
  plots.legend_below(figure, axes[0][0])
  caption = (
    "Left: mean over seeds, smoothed over a twentieth of the run. Right: mean over all epochs; "
    "bands from the worst to the best seed. Recency 0 learns from the advantages of its whole "
    "past, the other from those of its newest policy."
  )
  return results.Figure("exploration", caption, figure)
