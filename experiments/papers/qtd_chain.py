"""Quantile TD (arXiv:2301.04462) on a chain of four states with Gaussian rewards.

The chain runs from x0 to x3 and ends. Its returns are Gaussian, so that their distribution is known
in closed form. All states are updated in every step, with a constant step size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits, markov_runs, traced_runs
from rl_theory import markov, qtd
from sharding import checks

SETTLED = 0.6  # the estimates have settled after this part of the run


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `chain`."""
  num_seeds, num_quantiles = config.data.num_seeds, config.algorithm.num_quantiles
  checks.count("config.data.num_seeds", num_seeds, least=2)
  checks.count("config.algorithm.num_quantiles", num_quantiles)
  checks.positive("config.optimizer.learning_rate", config.optimizer.learning_rate)
  mrp = markov.chain()
  num_states = len(mrp.transitions)
  optimizer = optax.sgd(config.optimizer.learning_rate)
  hyperparameters = qtd.Config(discount=mrp.discount)
  limit = markov_runs.fixed_point(markov.chain, num_quantiles=num_quantiles)
  step = markov_runs.synchronous(mrp, optimizer=optimizer, config=hyperparameters)

  def start(key):
    table = jnp.zeros((num_states, num_quantiles))
    learner = qtd.init(table, optimizer=optimizer, config=hyperparameters)
    return jax.random.key_data(key), bandits.broadcast(learner, (num_seeds,))

  def advance(key_data, learners):
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), learners.step[0])
    return jax.vmap(step)(learners, jax.random.split(key, num_seeds))

  def measure(key_data, learners):
    del key_data
    mean = learners.params.mean(0)
    return {
      "theta": learners.params[0],
      "mean": mean,
      "sd": learners.params.std(0, ddof=1),
      "error": jnp.abs(mean - jnp.asarray(limit, mean.dtype)).max(),
    }

  times = traced_runs.even_times(config)
  return traced_runs.experiment(
    config,
    start=start,
    advance=advance,
    measure=measure,
    result=lambda problem, learners, traces: _result(times, traces, mrp, limit, num_seeds),
    figures=lambda result: [_figure(times, result, mrp, limit)],
    headline="error",
    even=True,
  )


def true_returns(mrp: markov.MarkovRewardProcess) -> Any:
  """Returns the Gaussian returns of the states before the end, as a SciPy distribution.

  Every state has one successor, so the variances obey a linear equation as the means do.
  """
  transitions = np.asarray(mrp.transitions, float)
  variances = np.linalg.solve(
    np.eye(len(transitions)) - float(mrp.discount) ** 2 * transitions,
    np.asarray(mrp.rewards.scales, float) ** 2,
  )
  alive = np.diag(transitions) < 1
  return stats.norm(np.asarray(markov.value(mrp), float)[alive], np.sqrt(variances[alive]))


def _error(atoms: np.ndarray, returns: Any) -> np.ndarray:
  """Returns the Wasserstein-1 distance of the atoms `[states, m]` to the returns, `[states]`."""
  levels = (np.arange(20_000) + 0.5) / 20_000
  inverse = returns.ppf(levels[:, None]).T
  steps = np.sort(atoms)[:, (levels * atoms.shape[1]).astype(int)]
  return np.abs(steps - inverse).mean(1)


def _result(times, traces, mrp, limit, num_seeds) -> results.Result:
  returns = true_returns(mrp)
  num_states = len(returns.mean())
  late = times[: len(traces["mean"])] >= SETTLED * times[-1]
  tail = traces["mean"][late][:, :num_states]
  average, limit = tail.mean(0), limit[:num_states]
  farthest, bias = np.abs(tail - limit).max(), np.abs(average - limit).max()
  value_error = np.abs(average.mean(1) - returns.mean()).max()
  learned, best = _error(average, returns), _error(limit, returns)
  settled = f"{int(SETTLED * times[-1]):,}"
  criteria = [
    (f"after {settled} updates the mean over seeds stays within 0.1 of the fixed point",
     bool(farthest < 0.1)),
    ("the average of these updates is within 0.05 of the fixed point", bool(bias < 0.05)),
    ("the mean of its quantiles is within 0.1 of the value in every state",
     bool(value_error < 0.1)),
    ("it is as near to the true returns as the fixed point, within a tenth (w1)",
     bool(np.all(learned < 1.1 * best))),
  ]  # fmt: skip
  rows = [
    [f"x{x}", float(returns.mean()[x]), float(returns.std()[x]), [*map(float, limit[x])],
     [*map(float, average[x])], float(best[x]), float(learned[x])]
    for x in range(num_states)
  ]  # fmt: skip
  return results.Result(
    metrics={
      "criteria_passed": statistics.fraction_passed(criteria),
      "quantile_error": float(bias),
      "value_error": float(value_error),
    },
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        f"Returns of each state, and quantiles averaged over updates from {settled} on and over "
        f"{num_seeds} seeds",
        ["state", "mean", "standard deviation", "fixed point", "learned", "w1, fixed point",
         "w1, learned"],
        rows,
      ),
    ],
    arrays={"theta": traces["theta"]},
  )  # fmt: skip


def _figure(times, result, mrp, limit) -> results.Figure:
  returns, arrays = true_returns(mrp), result.arrays
  num_states, num_quantiles = len(returns.mean()), limit.shape[1]
  updates = times[: len(arrays["theta"])]
  levels = (2 * np.arange(num_quantiles) + 1) / (2 * num_quantiles)
  figure, axes = plots.subplots(3, num_states, size=(2.75, 2.3))
  ink, exact, learned = "0.25", plots.PALETTE[0], plots.PALETTE[1]
  for x in range(num_states):
    mean, sd = returns.mean()[x], returns.std()[x]
    values = np.linspace(mean - 3.3 * sd, mean + 3.3 * sd, 400)
    atoms, true_atoms = np.sort(arrays["theta"][-1, x]), mean + sd * stats.norm.ppf(levels)
    cdf, pdf = stats.norm.cdf(values, mean, sd), stats.norm.pdf(values, mean, sd)
    for i in range(num_quantiles):
      color = plots.PALETTE[i % len(plots.PALETTE)]
      axes[0][x].plot(updates, arrays["theta"][:, x, i], color=color, linewidth=0.9)
      axes[0][x].axhline(limit[x, i], color=ink, linewidth=0.9, linestyle=":")
    axes[0][x].set(title=f"$x_{x}$", xlabel="updates", xticks=np.linspace(0, times[-1], 3))
    axes[1][x].plot(values, cdf, color=exact, label="true return")
    axes[1][x].step(
      [values[0], *atoms, values[-1]],
      [0, *(np.arange(num_quantiles) + 1) / num_quantiles, 1],
      where="post", color=learned, label="quantile TD, one run",
    )  # fmt: skip
    axes[1][x].plot(
      true_atoms, levels, linestyle="", marker="o", markersize=4.5, markerfacecolor="white",
      markeredgecolor=exact, label="true quantiles", zorder=3,
    )  # fmt: skip
    axes[2][x].fill_between(values, pdf, color=exact, alpha=0.15, linewidth=0)
    axes[2][x].plot(values, pdf, color=exact)
    axes[2][x].vlines(atoms, 0, stats.norm.pdf(atoms, mean, sd), color=learned, linewidth=1.8)
    axes[2][x].plot(
      true_atoms, 0 * true_atoms, linestyle="", marker="o", markersize=4.5, clip_on=False,
      markerfacecolor="white", markeredgecolor=exact, zorder=3,
    )  # fmt: skip
    axes[2][x].set(xlabel="return", ylim=(0, None))
    axes[1][x].set(ylim=(-0.03, 1.03))
  for row, name in enumerate(("quantiles", "P(return <= z)", "density")):
    axes[row][0].set_ylabel(name)
  figure.align_ylabels()
  plots.legend_below(figure, axes[1][0])
  return results.Figure(
    "qtd_chain",
    "Top: the quantiles of each state during one run; dotted lines show the fixed point. Middle "
    "and bottom: distribution function and density of the true return, with the quantiles of that "
    "run after its last update and the true quantiles at the same levels.",
    figure,
  )
