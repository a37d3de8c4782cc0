"""Quantile TD (arXiv:2301.04462) with few quantiles: an atom at the largest possible return.

Two states have the rewards 2 and -1. The largest quantile of the first one can bootstrap from
itself, and then sits at 2 / (1 - discount) with a mass of 1 / m, though that return is next to
impossible. The other quantiles bootstrap from it. The local back-up diagram shows who bootstraps
from whom at the fixed point.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits, markov_runs, traced_runs
from rl_theory import markov, qtd, return_distributions
from sharding import checks

DIAGRAM = 5  # quantiles of the back-up diagram
NUM_ATOMS = 4001  # of the exact distribution's grid


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `artefact`."""
  counts, num_seeds = tuple(config.algorithm.num_quantiles), config.data.num_seeds
  for count in counts:
    checks.count("config.algorithm.num_quantiles", count)
  if len(counts) < 2 or list(counts) != sorted(set(counts)):
    raise ValueError(
      f"config.algorithm.num_quantiles={counts} must be two or more counts, ascending"
    )
  checks.count("config.data.num_seeds", num_seeds)
  rate, decay = config.optimizer.learning_rate, config.optimizer.decay
  optimizer = optax.sgd(qtd.step_sizes("polynomial", scale=rate, power=decay))
  mrp = markov.artefact()
  hyperparameters = qtd.Config(discount=mrp.discount, method=config.algorithm.method)
  step = markov_runs.synchronous(mrp, optimizer=optimizer, config=hyperparameters)
  limits = {
    count: markov_runs.fixed_point(markov.artefact, num_quantiles=count) for count in counts
  }

  def start(key):
    learners = {
      count: qtd.init(jnp.zeros((2, count)), optimizer=optimizer, config=hyperparameters)
      for count in counts
    }
    return jax.random.key_data(key), bandits.broadcast(learners, (num_seeds,))

  def advance(key_data, learners):
    # All numbers of quantiles see the same transitions.
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), learners[counts[0]].step[0])
    keys = jax.random.split(key, num_seeds)
    return {count: jax.vmap(step)(learner, keys) for count, learner in learners.items()}

  def measure(key_data, learners):
    del key_data
    gaps = [
      jnp.abs(jnp.sort(learners[count].params) - np.sort(limit)).mean()
      for count, limit in limits.items()
    ]
    return {"error": jnp.stack(gaps)}

  return traced_runs.experiment(
    config,
    start=start,
    advance=advance,
    measure=measure,
    result=lambda problem, learners, traces: _result(learners, traces, limits, mrp),
    figures=lambda result: [_cdf_figure(result, limits, mrp), _diagram(mrp)],
    headline="error",
  )


def _exact(mrp: markov.MarkovRewardProcess) -> return_distributions.ReturnDistribution:
  return return_distributions.return_distribution(mrp, num_atoms=NUM_ATOMS)


def _result(learners, traces, limits, mrp) -> results.Result:
  law = _exact(mrp)
  discount, rewards = float(mrp.discount), np.asarray(mrp.rewards, float)
  top, bottom = rewards.max() / (1 - discount), rewards.min() / (1 - discount)
  rows, errors, gaps, highest, bounds = [], [], [], [], []
  for count, limit in limits.items():
    atoms = learners[count].params  # [seeds, 2, m]
    error = return_distributions.wasserstein(limit, law.atoms, second_probs=law.probs)
    gap = return_distributions.wasserstein(atoms, limit).max(-1)
    own = return_distributions.wasserstein(atoms, law.atoms, second_probs=law.probs).max(-1)
    errors.append(float(np.max(error)))
    bounds.append((top - bottom) / (2 * count * (1 - discount)))
    gaps.append(float(np.mean(gap)))
    highest.append(float(limit[0].max()))
    rows.append(
      [count, highest[-1], float(limit[0].mean()), errors[-1], bounds[-1],
       *(statistics.mean_interval(x, method="log") for x in (own, gap))]
    )  # fmt: skip
  few = np.asarray(limits[min(limits)])[0]
  share = float(np.mean(np.abs(few - top) < 0.1))
  many = max(limits)
  criteria = [
    (f"with {min(limits)} quantiles the fixed point has half its mass or more at {top:g}",
     share >= 0.5),
    (f"its largest quantile is {top:g} for every m",
     bool(np.abs(np.array(highest) - top).max() < 0.01)),
    ("the distance of the fixed point to the true returns falls with m (w1)",
     bool(np.all(np.diff(errors) < 0))),
    ("it is below the bound for every m", bool(np.all(np.array(errors) < bounds))),
    (f"with {many} quantiles it is below 0.25", errors[-1] < 0.25),
    ("quantile TD ends within 0.3 of its fixed point for every m (w1)", max(gaps) < 0.3),
  ]  # fmt: skip
  return results.Result(
    metrics={
      "criteria_passed": statistics.fraction_passed(criteria),
      "distance_to_the_fixed_points": max(gaps),
    },
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        "Wasserstein-1 distances, the largest of both states; quantile TD: mean of the seeds",
        ["m", "largest quantile at x1", "their mean at x1 (value "
         f"{float(markov.value(mrp)[0]):.3g})", "fixed point to true returns", "bound",
         "quantile TD to true returns", "quantile TD to fixed point"],
        rows,
        caption=f"The exact distribution is known to {float(law.error):.3f}.",
      ),
    ],
    arrays={
      **{f"learned/{count}": learners[count].params[0, 0] for count in limits},
      "errors": np.array(errors),
    },
  )  # fmt: skip


def _cdf_figure(result, limits, mrp) -> results.Figure:
  law = _exact(mrp)
  values, cdf = np.asarray(law.atoms), np.cumsum(np.asarray(law.probs)[0])
  figure, axes = plots.subplots(1, len(limits), size=(3.1, 3.1), sharey=True)
  ends = values[np.searchsorted(cdf, 1e-3)], 21.0
  for axis, (count, limit), error in zip(
    axes[0], limits.items(), result.arrays["errors"], strict=True
  ):
    axis.fill_between(values, cdf, color=plots.PALETTE[0], alpha=0.13, linewidth=0)
    axis.plot(values, cdf, color=plots.PALETTE[0], label="true returns")
    heights = [0, *(np.arange(count) + 1) / count, 1]
    for atoms, color, style, label in (
      (limit[0], plots.PALETTE[1], "-", "fixed point"),
      (result.arrays[f"learned/{count}"], "0.2", ":", "quantile TD, one run"),
    ):
      axis.step([ends[0], *np.sort(atoms), ends[1]], heights, where="post", color=color,
                linestyle=style, linewidth=1.6, label=label)  # fmt: skip
    axis.set(title=f"m = {count}, w1 = {error:.2f}", xlabel="return from $x_1$", xlim=ends)
  axes[0][0].set(ylabel="P(return <= z)", ylim=(0, 1.03))
  plots.legend_below(figure, axes[0][0])
  return results.Figure(
    "qtd_artefact",
    "Distribution functions of the return from the first state, and their distance w1. With two "
    "quantiles half of the mass sits at 20, the largest possible return.",
    figure,
  )


def backups(mrp: markov.MarkovRewardProcess, table: np.ndarray) -> list[tuple[int, ...]]:
  """Returns the edges (x, i, y, j) with table[x, i] = r(x) + discount * table[y, j]."""
  rewards, discount = np.asarray(mrp.rewards, float), float(mrp.discount)
  reachable = np.asarray(mrp.transitions) > 0
  gaps = np.abs(table[:, :, None, None] - rewards[:, None, None, None] - discount * table)
  return [
    tuple(map(int, edge)) for edge in np.argwhere((gaps < 1e-3) & reachable[:, None, :, None])
  ]


def _diagram(mrp) -> results.Figure:
  table = markov_runs.fixed_point(markov.artefact, num_quantiles=DIAGRAM)
  figure, axes = plots.subplots(1, 1, size=(5.6, 2.7))
  axis = axes[0][0]
  axis.grid(False)
  levels = (1.0, 0.0)  # the height of each state
  for x, i, y, j in backups(mrp, table):
    start, end = (table[x, i], levels[x]), (table[y, j], levels[y])
    style = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 9, "shrinkB": 9, "linewidth": 1.2}
    if (x, i) == (y, j):
      side = 1 if x == 0 else -1
      loop = {"color": plots.PALETTE[1], "linewidth": 1.8, "shrinkA": 7, "shrinkB": 7}
      loop["connectionstyle"] = f"arc3,rad={-1.9 * side}"
      begin, over = (
        (start[0] - 0.28, start[1] + 0.06 * side),
        (start[0] + 0.28, start[1] + 0.06 * side),
      )
      axis.annotate("", over, begin, arrowprops=style | loop)
    else:
      bend = 0.25 if x == y else 0.08
      style |= {"connectionstyle": f"arc3,rad={bend}"}
      axis.annotate("", end, start, arrowprops=style)
  for x, level in enumerate(levels):
    axis.plot(table[x], np.full(DIAGRAM, level), linestyle="", marker="o", markersize=13,
              color=plots.PALETTE[0], markeredgecolor="white", zorder=3)  # fmt: skip
    for i, atom in enumerate(table[x]):
      axis.text(atom, level, str(i + 1), color="white", ha="center", va="center", fontsize=8.5,
                zorder=4)  # fmt: skip
  axis.spines["left"].set_visible(False)
  axis.set(xlabel="quantile", yticks=levels, ylim=(-0.45, 1.6))
  axis.set_yticklabels(["$x_1$, reward 2", "$x_2$, reward -1"], fontsize=10)
  axis.tick_params(axis="y", length=0)
  return results.Figure(
    "qtd_backups",
    f"The local back-up diagram at the fixed point of {DIAGRAM} quantiles. An arrow leads from "
    "each quantile to the one that it bootstraps from: its value is the reward plus the discount "
    "times that of the other. The largest quantile of the first state bootstraps from itself, and "
    "the others from it.",
    figure,
  )
