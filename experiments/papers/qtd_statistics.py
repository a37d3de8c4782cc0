"""Quantile TD, TD and categorical TD as estimators of the value (arXiv:2305.18388).

All methods see the same transitions, one from every state in each update, and start at zero. The
problems are random processes, a new one for every seed: a deterministic cycle, sparse and dense
random transitions, each with four laws of rewards. Each method has the step size of its grid that
is best for the problem: the one with the least mean error over seeds. The error is the squared
difference of value estimate and value, averaged over states.

The support of categorical TD reaches from -3 to 3 times 1 / (1 - discount); mean rewards lie in
[-1, 1]. While no target leaves the support, its mean obeys the equation of TD exactly.

With t_2 rewards the variance of a reward is infinite, and so is the expected error of TD. Its mean
over seeds is then a number of these seeds alone, mostly of the worst ones; medians are shown too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import ticker

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits, traced_runs
from rl_theory import markov, qtd
from rl_theory.baselines import categorical_td, td
from sharding import checks

REWARDS = ("deterministic", "gaussian", "exponential", "student_t2")
TRANSITIONS = ("cycle", "sparse", "dense")
DISCOUNT = 0.9
REACH = 3.0  # of the support of categorical TD, in rewards
TITLES = {
  "deterministic": "no noise",
  "gaussian": "Gaussian noise",
  "exponential": "exponential noise",
  "student_t2": "Student t noise, 2 degrees",
}


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `statistics`."""
  data = config.data
  discounts = tuple(config.data.discounts)
  checks.count("config.data.num_seeds", data.num_seeds, least=2)
  checks.positive("config.data.noise", data.noise)
  checks.fractions("config.data.discounts", discounts)
  for name in ("num_quantiles", "num_atoms"):
    for count in config.algorithm[name]:
      checks.count(f"config.algorithm.{name}", count, least=1 + (name == "num_atoms"))
  if DISCOUNT in discounts:
    raise ValueError(
      f"config.data.discounts={discounts} must not repeat {DISCOUNT}, which is there"
    )
  # The sparse process is run with the other discounts too.
  settings = [(name, DISCOUNT) for name in TRANSITIONS] + [("sparse", d) for d in discounts]
  methods = _methods(config)
  rates = {
    name: bandits.positives(
      config, f"optimizer.{'quantile_' if name.startswith('quantile') else ''}learning_rate"
    )
    for name in methods
  }
  states = jnp.arange(data.num_states)

  def start(key):
    key, *keys = jax.random.split(key, 4)
    size, seeds = data.num_states, data.num_seeds
    make = functools.partial(markov.sparse_transitions, num_states=size, branching=data.branching)
    sparse = jax.vmap(make)(jax.random.split(keys[0], seeds))
    make = functools.partial(markov.dense_transitions, num_states=size)
    dense = jax.vmap(make)(jax.random.split(keys[1], seeds))
    cycle = bandits.broadcast(markov.cycle_transitions(size), (seeds,))
    chains = {"cycle": cycle, "sparse": sparse, "dense": dense}
    problem = {
      "key": jax.random.key_data(key),
      "transitions": jnp.stack([chains[name] for name, _ in settings]),
      "discounts": jnp.array([discount for _, discount in settings]),
      "means": jax.random.uniform(keys[2], (seeds, size), minval=-1, maxval=1),
    }
    tables = {
      name: bandits.broadcast(first, (len(REWARDS), len(settings), len(rates[name]), seeds, size))
      for name, (first, _, _) in methods.items()
    }
    return problem, {"tables": tables, "count": jnp.zeros((), jnp.int32)}

  def advance(problem, learners):
    key = jax.random.fold_in(jax.random.wrap_key_data(problem["key"]), learners["count"])
    move_key, reward_key = jax.random.split(key)
    move_keys = jax.random.split(move_key, data.num_seeds)
    draw = jax.vmap(functools.partial(markov.sample_next_states, states=states))
    next_states = jax.vmap(draw, in_axes=(0, None))(_processes(problem), move_keys)
    rewards = _rewards(problem["means"], reward_key, data.noise)
    tables = {
      name: _over_all(step)(
        learners["tables"][name], rewards, next_states, problem["discounts"], jnp.array(rates[name])
      )
      for name, (_, step, _) in methods.items()
    }
    return {"tables": tables, "count": learners["count"] + 1}

  def errors(problem, learners):
    values = jax.vmap(jax.vmap(markov.value))(_processes(problem))[:, None]
    scales = problem["discounts"][:, None, None, None]
    return {
      name: jnp.mean((mean(learners["tables"][name], scales) - values) ** 2, axis=-1)
      for name, (_, _, mean) in methods.items()
    }

  def measure(problem, learners):
    found = errors(problem, learners)
    return {"error": jnp.stack([_mean_of_best(found[name]) for name in methods])}

  return traced_runs.experiment(
    config,
    start=start,
    advance=advance,
    measure=measure,
    result=lambda problem, learners, traces: _result(
      {name: np.asarray(x, float) for name, x in errors(problem, learners).items()}, settings, rates
    ),
    figures=lambda result: _figures(result, settings, rates),
    headline="error",
    even=True,
  )


def _processes(problem: Any) -> markov.MarkovRewardProcess:
  """Returns the processes with the mean rewards, leaves `[settings, seeds, ...]`."""
  over_seeds = jax.vmap(markov.MarkovRewardProcess, in_axes=(0, 0, None))
  return jax.vmap(over_seeds, in_axes=(0, None, 0))(
    problem["transitions"], problem["means"], problem["discounts"]
  )


def _rewards(means: jax.Array, key: Any, scale: float) -> jax.Array:
  """Returns a reward of every law, `[laws, seeds, states]`; all laws have the same means."""
  zeros, states = jnp.zeros(means.size), jnp.arange(means.size)
  drawn = [
    markov.NoisyRewards(zeros, scale, noise).sample(key, states).reshape(means.shape)
    for noise in REWARDS[1:]
  ]
  return means + jnp.stack([jnp.zeros_like(means), *drawn])


def _over_all(step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Maps `step(table, rewards, next_states, discount, rate)` over all leading axes of tables."""
  over_seeds = jax.vmap(step, in_axes=(0, 0, 0, None, None))
  over_rates = jax.vmap(over_seeds, in_axes=(0, None, None, None, 0))
  over_settings = jax.vmap(over_rates, in_axes=(0, None, 0, 0, None))
  return jax.vmap(over_settings, in_axes=(0, 0, None, None, None))


def _methods(config: Any) -> dict[str, tuple[Any, Callable, Callable]]:
  """Returns, by name: the first row of a table, its update, and from tables to value estimates."""

  def td_step(table, rewards, next_states, discount, rate):
    return table + rate * td.td_error(table, rewards, table[next_states], discount=discount)

  def quantile_step(table, rewards, next_states, discount, rate):
    targets = rewards[:, None] + discount * table[next_states]
    return table + rate * qtd.quantile_td_error(table, targets, method="pairs")

  def categorical_step(table, rewards, next_states, discount, rate):
    reach = REACH / (1 - discount)
    target = categorical_td.categorical_target(
      table[next_states], rewards, discount=discount, low=-reach, high=reach
    )
    return table + rate * (target - table)

  def categorical_mean(table, discounts):
    return table @ categorical_td.atoms(-REACH, REACH, table.shape[-1]) / (1 - discounts)

  found = {"TD": (jnp.zeros(()), td_step, lambda table, _: table)}
  for count in config.algorithm.num_atoms:
    found[f"categorical TD {count}"] = (
      jnp.full(count, 1 / count),
      categorical_step,
      categorical_mean,
    )
  for count in config.algorithm.num_quantiles:
    found[f"quantile TD {count}"] = (
      jnp.zeros(count),
      quantile_step,
      lambda table, _: table.mean(-1),
    )
  return found


def _mean_of_best(errors: jax.Array) -> jax.Array:
  """Returns the error with the best step sizes, averaged over the problems of one discount."""
  return errors[:, : len(TRANSITIONS)].mean(-1).min(-1).mean()


def _result(errors, settings, rates) -> results.Result:
  """Reports errors `[laws, settings, rates, seeds]`, by method."""
  interval = functools.partial(statistics.mean_interval, method="bootstrap")
  index = {name: found.mean(-1).argmin(-1) for name, found in errors.items()}
  best = {
    name: np.take_along_axis(found, index[name][..., None, None], axis=2)[:, :, 0]
    for name, found in errors.items()
  }
  names = list(errors)
  quantiles = [name for name in names if name.startswith("quantile")]
  categorical = [name for name in names if name.startswith("categorical")]
  ours, first = quantiles[-1], slice(len(TRANSITIONS))  # the settings of the common discount
  tails, certain = REWARDS.index("student_t2"), REWARDS.index("deterministic")
  gaps = best[ours] - best["TD"]
  wins = [interval(gap) for gap in gaps[tails, first]]
  cycle = interval(gaps[certain, 0])
  means = [best[name][:, first].mean() for name in quantiles]
  # The sum of float32 masses drifts by rounding: errors below 1e-5 are not compared.
  follows = [
    bool(np.allclose(errors[name][certain], errors["TD"][certain], rtol=0.01, atol=1e-5))
    for name in categorical
  ]
  criteria = [
    (f"t_2 rewards: {ours} has a smaller error than TD on all three transitions",
     all((win.high or 0) < 0 for win in wins)),
    (f"deterministic cycle: TD has a smaller error than {ours}", (cycle.low or 0) > 0),
    ("deterministic rewards: categorical TD has the error of TD, within 1 %", all(follows)),
    ("the error of quantile TD, averaged over problems, falls with m",
     bool(np.all(np.diff(means) < 0))),
  ]  # fmt: skip
  rows, medians, steps = [], [], []
  ends = np.zeros((len(names), 3, len(REWARDS), len(settings)))
  for column, (transitions, discount) in enumerate(settings):
    for law, rewards in enumerate(REWARDS):
      problem = [transitions, rewards, discount]
      cells = [interval(best[name][law, column]) for name in names]
      ends[:, :, law, column] = [[cell.value, cell.low, cell.high] for cell in cells]
      rows.append([*problem, *cells])
      medians.append([*problem, *(float(np.median(best[n][law, column])) for n in names)])
      steps.append([*problem, *(rates[n][index[n][law, column]] for n in names)])
  head = ["transitions", "rewards", "discount", *names]
  grids = [", ".join(f"{rate:g}" for rate in rates[name]) for name in ("TD", ours)]
  return results.Result(
    metrics={
      "criteria_passed": statistics.fraction_passed(criteria),
      **{f"error/{name}": interval(best[name][:, first].mean((0, 1))) for name in names},
    },
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        "Squared error of the value with the best step size: mean over seeds", head, rows,
        caption="Intervals are 95 % bootstrap intervals over seeds.",
      ),
      results.Table("Squared error of the value: median over seeds", head, medians),
      results.Table(
        "The best step sizes", head, steps,
        caption=f"The grids are {grids[0]}, and for quantile TD {grids[1]}.",
      ),
    ],
    arrays={
      **{f"best/{name}": ends[i] for i, name in enumerate(names)},
      **{f"mean/{name}": errors[name].mean(-1) for name in names},
    },
  )  # fmt: skip


def _log_errors(axis: Any) -> None:
  """Gives the errors a logarithmic axis with plain numbers; errors below 1e-12 are cut off."""
  axis.set_yscale("log")
  low, high = axis.get_ylim()
  axis.set_ylim(max(low, 1e-12), high)
  subs = (1, 2, 3, 5) if high < 30 * low else (1,)
  axis.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
  axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axis.yaxis.set_minor_locator(ticker.NullLocator())


def _figures(result, settings, rates) -> list[results.Figure]:
  arrays = result.arrays
  names = [name.removeprefix("best/") for name in arrays if name.startswith("best/")]
  families = {
    family: [name for name in names if name.startswith(family)]
    for family in ("TD", "categorical TD", "quantile TD")
  }
  colors = dict(zip(families, (plots.PALETTE[2], plots.PALETTE[0], plots.PALETTE[1]), strict=True))
  shape = len(TRANSITIONS), len(REWARDS)

  sizes, axes = plots.subplots(*shape, size=(2.7, 2.1), sharex=True)
  steps, step_axes = plots.subplots(*shape, size=(2.7, 2.1), sharex=True)
  for row, transitions in enumerate(TRANSITIONS):
    column = settings.index((transitions, DISCOUNT))
    for law, rewards in enumerate(REWARDS):
      axis, other = axes[row][law], step_axes[row][law]
      for family, members in families.items():
        color = colors[family]
        mean, low, high = (
          np.array([arrays[f"best/{name}"][end, law, column] for name in members])
          for end in range(3)
        )
        if family == "TD":
          axis.axhline(mean[0], color=color, linestyle="--", label=family, zorder=3)
          axis.axhspan(low[0], high[0], color=color, alpha=0.15, linewidth=0)
        else:
          counts = [int(name.split()[-1]) for name in members]
          axis.plot(counts, mean, color=color, marker="o", markersize=4, label=family)
          axis.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
        curve = arrays[f"mean/{members[-1]}"][law, column]
        dashed = {"linestyle": "--", "zorder": 3} if family == "TD" else {}
        other.plot(
          rates[members[-1]], curve, color=color, marker="o", markersize=3.5,
          label=members[-1], **dashed,
        )  # fmt: skip
      axis.set(xscale="log", xticks=counts, xticklabels=counts)
      axis.minorticks_off()
      other.set(xscale="log")
      for panel in (axis, other):
        _log_errors(panel)
        if row == 0:
          panel.set_title(TITLES[rewards])
        if law == 0:
          panel.set_ylabel(f"{transitions}\nsquared error")
      if row == len(TRANSITIONS) - 1:
        axis.set_xlabel("m")
        other.set_xlabel("step size")
  plots.legend_below(sizes, axes[0][0])
  plots.legend_below(steps, step_axes[0][0])

  discounts, axes = plots.subplots(1, len(REWARDS), size=(2.7, 2.6), sharex=True)
  order = sorted(
    (discount, column) for column, (name, discount) in enumerate(settings) if name == "sparse"
  )
  for law, rewards in enumerate(REWARDS):
    axis = axes[0][law]
    for family, members in families.items():
      found = arrays[f"best/{members[-1]}"][:, law, [column for _, column in order]]
      horizon = [1 / (1 - discount) for discount, _ in order]
      axis.plot(
        horizon, found[0], color=colors[family], marker="o", markersize=4, label=members[-1],
        **({"linestyle": "--", "zorder": 3} if family == "TD" else {}),
      )  # fmt: skip
      axis.fill_between(horizon, *found[1:], color=colors[family], alpha=0.15, linewidth=0)
    axis.set(title=TITLES[rewards], xlabel="discount", xscale="log")
    _log_errors(axis)
    axis.set_xticks(horizon, [f"{discount:g}" for discount, _ in order])
    axis.minorticks_off()
  axes[0][0].set_ylabel("squared error")
  plots.legend_below(discounts, axes[0][0])
  bands = "Bands are 95 % intervals over seeds."
  return [
    results.Figure(
      "qtd_error",
      "Mean squared error of the value against the number m of quantiles or atoms, with the best "
      f"step size of each method, at discount {DISCOUNT}. {bands} Errors below 1e-12 are cut off: "
      "without any noise TD has only that of rounding.",
      sizes,
    ),
    results.Figure(
      "qtd_step_sizes",
      f"The same error against the step size, at the largest m and discount {DISCOUNT}.",
      steps,
    ),
    results.Figure(
      "qtd_discounts",
      f"The same error against the discount on sparse transitions, at the largest m. {bands}",
      discounts,
    ),
  ]
