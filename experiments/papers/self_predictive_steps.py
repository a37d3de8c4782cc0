"""Self-predictive learning in discrete steps: when does a representation collapse?

Gradient steps on the exact loss, on random symmetric chains with uniform weights. `collapse` takes
away the stop-gradient and the fast predictor, `ratio` slows the predictor down, `ema` adds a target
that is a moving average. All settings start from the same orthonormal features, and predictors that
are trained start at 0. Step sizes are those of weights 1, as in the paper's dynamics.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from experiments.loop import training
from experiments.papers import self_predictive_flows
from experiments.report import plots, results, statistics
from experiments.tasks import bandits, traced_runs
from representation import collapse, self_predictive
from sharding import checks

# Keeps the least-squares predictor defined after features have become dependent.
RIDGE = 1e-8
# Below this largest singular value the features are 0, and their cosines mean nothing.
_ALIVE = 1e-6
_FAST, _SLOW = "optimal predictor", "slow predictor"
_Criteria = list[tuple[str, bool]]


def settings(config: Any) -> dict[str, self_predictive.Config]:
  """Returns the hyper-parameters of every line of a figure, by its label."""
  make, algorithm = self_predictive.Config, config.algorithm
  slow = functools.partial(make, predictor="gradient")
  ratios = bandits.positives(config, "algorithm.predictor_ratio")
  if config.data.name == "collapse":
    return {
      f"{_FAST}, stop-gradient": make(),
      f"{_SLOW}, stop-gradient": slow(predictor_ratio=ratios[0]),
      f"{_FAST}, full gradient": make(stop_gradient=False, ridge=RIDGE),
      f"{_SLOW}, full gradient": slow(stop_gradient=False, predictor_ratio=ratios[0]),
    }
  if config.data.name == "ratio":
    return {"optimal": make()} | {f"{ratio:g}": slow(predictor_ratio=ratio) for ratio in ratios}
  decays = tuple(float(decay) for decay in algorithm.target_decay)
  checks.probabilities("config.algorithm.target_decay", decays)
  return {f"{_FAST}, {decay:g}": make(target_decay=decay) for decay in decays} | {
    f"{_SLOW}, {decay:g}": slow(predictor_ratio=ratios[0], target_decay=decay) for decay in decays
  }


def lookup(table: jax.Array, states: jax.Array) -> jax.Array:
  """The network of a table `[S, k]`: returns the rows of `states`."""
  return table[states]


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the presets `collapse`, `ratio` and `ema`."""
  num_states, num_chains = config.data.num_states, config.data.num_chains
  width = config.algorithm.num_features
  checks.count("config.data.num_chains", num_chains, least=2)
  checks.count("config.algorithm.num_features", width, least=2)
  if width > num_states:
    raise ValueError(
      f"config.algorithm.num_features={width} must be at most config.data.num_states={num_states}: "
      "more columns than states are dependent"
    )
  checks.positive("config.optimizer.learning_rate", config.optimizer.learning_rate)
  configs = settings(config)
  # Settings that differ in numbers alone are one program.
  groups: dict[Any, list[str]] = {}
  for label, hyperparameters in configs.items():
    groups.setdefault(jax.tree.structure(hyperparameters), []).append(label)
  stacked = [
    jax.tree.map(lambda *leaves: jnp.array(leaves, jnp.float32), *map(configs.get, labels))
    for labels in groups.values()
  ]
  # A state has the weight 1 / S, so this is a step of the given size for weights of 1.
  optimizer = optax.sgd(config.optimizer.learning_rate * num_states)
  weights = np.full(num_states, 1 / num_states, np.float32)

  def start(key):
    chain_key, feature_key = jax.random.split(key)
    transitions = self_predictive_flows.chains(chain_key, "symmetric", num_chains, num_states)
    features = self_predictive_flows.orthonormal(feature_key, (num_chains, num_states, width))

    def begin(features, hyperparameters):
      params = self_predictive.Params(features, jnp.zeros((width, width)))
      return self_predictive.init(params, optimizer=optimizer, config=hyperparameters)

    over_chains = jax.vmap(begin, in_axes=(0, None))
    over_settings = jax.vmap(over_chains, in_axes=(None, 0))
    return transitions, [over_settings(features, group) for group in stacked]

  def advance(transitions, learners):
    def step(state, transitions, hyperparameters):
      batch = self_predictive.Expectation(transitions, weights)
      return self_predictive.update(
        state, batch, None, apply_fn=lookup, optimizer=optimizer, config=hyperparameters
      )[0]

    over_chains = jax.vmap(step, in_axes=(0, 0, None))
    over_settings = jax.vmap(over_chains, in_axes=(0, None, 0))
    return [
      over_settings(state, transitions, group)
      for state, group in zip(learners, stacked, strict=True)
    ]

  def measure(transitions, learners):
    over_chains = jax.vmap(_measure, in_axes=(0, 0, None))
    over_settings = jax.vmap(over_chains, in_axes=(0, None, 0))
    found: dict[str, jax.Array] = {}
    for state, group, labels in zip(learners, stacked, groups.values(), strict=True):
      for name, values in over_settings(state.params, transitions, group).items():
        found |= {f"{name}/{label}": values[i] for i, label in enumerate(labels)}
    return found

  return traced_runs.experiment(
    config,
    start=start,
    advance=advance,
    measure=measure,
    result=lambda transitions, learners, traces: _result(
      config, list(configs), np.asarray(transitions, float), traces
    ),
    figures=lambda result: _DRAW[config.data.name](config, list(configs), result),
    headline=f"cosine/{next(iter(configs))}",
  )


def _measure(params, transitions, hyperparameters) -> dict[str, jax.Array]:
  features, predictor = params
  gram = features.T @ features
  # `collapse.singular_values` returns 0 for those that are small beside the largest.
  values = jnp.linalg.svd(features, compute_uv=False)
  basis = self_predictive_flows.span(features)
  found = {
    "cosine": collapse.column_cosine(features),
    "largest": values[0],
    "smallest": values[-1],
    "objective": jnp.sum((basis.T @ transitions @ basis) ** 2),
  }
  if hyperparameters.predictor == "gradient" and hyperparameters.stop_gradient:
    kept = gram - predictor @ predictor.T / hyperparameters.predictor_ratio
    found["drift"] = jnp.max(jnp.abs(kept - jnp.eye(len(kept))))  # the predictor starts at 0
  return found


def _result(config, labels, transitions, traces) -> results.Result:
  best = np.sum(
    np.linalg.svd(transitions, compute_uv=False)[:, : config.algorithm.num_features] ** 2, axis=-1
  )
  arrays = {
    f"{name}/{label}": np.round(traces[f"{name}/{label}"], 7)
    for name in ("cosine", "smallest", "largest")
    for label in labels
  }
  arrays |= {f"ratio/{label}": np.round(traces[f"objective/{label}"] / best, 7) for label in labels}
  drifts = {name: value for name, value in traces.items() if name.startswith("drift/")}
  criteria = _CRITERIA[config.data.name](config, labels, arrays, drifts)
  rows = []
  for label in labels:
    ends = {name: arrays[f"{name}/{label}"][-1] for name in _COLUMNS}
    dead = ends["largest"].mean() < _ALIVE
    rows.append(
      [
        label,
        *("features are 0" if dead and name in ("cosine", "ratio") else traced_runs.spread(end)
          for name, end in ends.items()),
      ]
    )  # fmt: skip
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(criteria)},
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        "At the end: mean over chains [10th, 90th percentile]",
        ["setting", *_COLUMNS.values()],
        rows,
        digits=4,
      ),
    ],
    arrays=arrays,
  )


_COLUMNS = {
  "cosine": "|cosine| of two columns",
  "largest": "largest singular value",
  "smallest": "smallest singular value",
  "ratio": "f / f*",
}


def _healthy(name: str, arrays: Any, label: str) -> _Criteria:
  """The criteria of learning that cannot collapse: Phi^T Phi never shrinks, columns never align.

  Float32 moves both by less than 1e-3, and steps of size 0.01 add a little to the lengths.
  """
  return [
    traced_runs.every(
      f"{name}: columns stay orthogonal, |cosine| below 0.01",
      arrays[f"cosine/{label}"].max(0) < 0.01,
    ),
    traced_runs.every(
      f"{name}: no singular value falls by more than 1e-3",
      arrays[f"smallest/{label}"].min(0) > 1 - 1e-3,
    ),
  ]


def _collapse_criteria(config, labels, arrays, drifts) -> _Criteria:
  fast, slow, fast_full, slow_full = labels
  return [
    *_healthy(fast, arrays, fast),
    (f"{slow}: columns align, mean |cosine| above 0.1", arrays[f"cosine/{slow}"][-1].mean() > 0.1),
    *(
      traced_runs.every(
        f"{label}: the smallest singular value ends below 0.01",
        arrays[f"smallest/{label}"][-1] < 0.01,
      )
      for label in (fast_full, slow_full)
    ),
  ]


def _ratio_criteria(config, labels, arrays, drifts) -> _Criteria:
  ratios = sorted(labels[1:], key=float, reverse=True)
  means = [float(arrays[f"cosine/{label}"][-1].mean()) for label in ratios]
  worst = max(float(value.max()) for value in drifts.values())
  return [
    *_healthy("optimal", arrays, "optimal"),
    ("a slower predictor aligns the columns more, at each ratio", bool(np.all(np.diff(means) > 0))),
    (f"ratio {ratios[0]}: mean |cosine| below 0.01", means[0] < 0.01),
    (f"ratio {ratios[-1]}: mean |cosine| above 0.2", means[-1] > 0.2),
    ("Phi^T Phi - M M^T / ratio moves by less than 0.05 at every ratio", worst < 0.05),
  ]


def _ema_criteria(config, labels, arrays, drifts) -> _Criteria:
  half = len(labels) // 2
  fast, slow = labels[:half], labels[half:]
  reference = float(arrays[f"cosine/{slow[0]}"][-1].mean())
  early = int(np.searchsorted(traced_runs.times(config), 1000))
  speeds = [float(arrays[f"ratio/{label}"][early].mean()) for label in fast]
  return [
    *(check for label in fast for check in _healthy(label, arrays, label)),
    *(
      (
        f"{label}: mean |cosine| is at least 0.8 of that without an average",
        float(arrays[f"cosine/{label}"][-1].mean()) >= 0.8 * reference,
      )
      for label in slow[1:]
    ),
    ("a slower target only slows f: lower after 1,000 steps", bool(np.all(np.diff(speeds) < 0))),
  ]


def _axes(config: Any, columns: int) -> Any:
  figure, axes = plots.subplots(1, columns, size=(11.4 / columns, 3.0))
  for axis in axes[0]:
    axis.set(xscale="log", xlabel="step")
  return figure, axes[0], traced_runs.times(config)[1:]


def _collapse_figures(config, labels, result) -> list[results.Figure]:
  figure, axes, steps = _axes(config, 3)
  panels = {
    "cosine": "|cosine| of the two columns",
    "largest": "largest singular value",
    "smallest": "smallest singular value",
  }
  for axis, (name, words) in zip(axes, panels.items(), strict=True):
    for k, label in enumerate(labels):
      values = result.arrays[f"{name}/{label}"][1:]
      if name == "cosine":
        alive = (result.arrays[f"largest/{label}"][1:] > _ALIVE).all(1)
        values = np.where(alive[:, None], values, np.nan)
      traced_runs.curve(
        axis, steps, np.maximum(values, 1e-9), color=plots.PALETTE[k], linewidth=2,
        linestyle="--" if "slow" in label else "-", label=label,
      )  # fmt: skip
    axis.set_title(words)
  for axis in axes[1:]:
    axis.set(yscale="log", ylim=(1e-4, 5))
  axes[0].set_ylim(-0.03, 1.03)
  plots.legend_below(figure, axes[0])
  return [
    results.Figure(
      "self_predictive_collapse",
      f"Two features on {config.data.num_chains} symmetric chains of {config.data.num_states} "
      "states. Lines are means over the chains, bands reach from the 10th to the 90th percentile. "
      "Only the optimal predictor with a stop-gradient keeps the columns orthogonal and as long as "
      f"they were. The slow predictor takes steps of {config.algorithm.predictor_ratio[0]:g} times "
      "the size of the features'. With the full gradient the features of some chains become 0; the "
      "cosine is drawn up to the first of them.",
      figure,
    )
  ]


def _ratio_figures(config, labels, result) -> list[results.Figure]:
  figure, axes, steps = _axes(config, 3)
  trained = labels[1:]
  shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(trained)))
  for label, shade in zip(trained, shades, strict=True):
    traced_runs.curve(
      axes[0], steps, result.arrays[f"cosine/{label}"][1:], color=shade, linewidth=2,
      label=f"ratio {label}",
    )  # fmt: skip
  traced_runs.curve(
    axes[0], steps, result.arrays["cosine/optimal"][1:], color="0.2", linewidth=2, linestyle="--",
    label="optimal predictor",
  )  # fmt: skip
  ratios = np.array([float(label) for label in trained])
  jitter = np.exp(np.random.default_rng(0).uniform(-0.25, 0.25, config.data.num_chains))
  for axis, names in ((axes[1], ("cosine",)), (axes[2], ("largest", "smallest"))):
    for name, color in zip(names, plots.PALETTE, strict=False):
      ends = np.stack([result.arrays[f"{name}/{label}"][-1] for label in trained])
      axis.plot(ratios[:, None] * jitter, ends, ".", color=color, alpha=0.3, markersize=5)
      axis.plot(ratios, ends.mean(1), "_", color=color, markersize=22, markeredgewidth=2.5)
      axis.plot([], [], "o", color=color, label=f"{name} singular value")
    axis.set_xlabel("ratio of the step sizes")
  grid = np.geomspace(ratios.min(), ratios.max())
  axes[2].plot(
    grid, np.sqrt(1 + 1 / grid), "k:", linewidth=1.5, label=r"$\sqrt{1 + 1 / \mathrm{ratio}}$"
  )
  axes[0].set(title="|cosine| of the two columns", ylim=(-0.03, 1.03))
  axes[1].set(title="|cosine| at the end", ylim=(-0.03, 1.03))
  axes[2].set(title="singular values at the end", yscale="log", yticks=(1, 2, 3, 4))
  axes[2].yaxis.set_major_formatter("{x:g}")
  axes[2].yaxis.set_minor_formatter("")
  axes[2].legend()
  plots.legend_below(figure, axes[0], columns=5)
  return [
    results.Figure(
      "self_predictive_ratio",
      "The ratio is the step size of the predictor over that of the features. The slower the "
      "predictor, the more the columns align. Lines and bars are means over "
      f"{config.data.num_chains} symmetric chains, bands reach from the 10th to the 90th "
      "percentile, points are chains. The dotted line follows from the conserved quantity "
      "Phi^T Phi - M M^T / ratio, for features that find the eigenvalue 1.",
      figure,
    )
  ]


def _ema_figures(config, labels, result) -> list[results.Figure]:
  figure, axes, steps = _axes(config, 2)
  half = len(labels) // 2
  shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, half))
  for axis, name in zip(axes, ("cosine", "ratio"), strict=True):
    for style, kind in (("--", labels[half:]), ("-", labels[:half])):
      for label, shade in zip(kind, shades, strict=True):
        values = np.maximum(result.arrays[f"{name}/{label}"][1:], 1e-7)
        traced_runs.curve(
          axis, steps, values, color=shade, linewidth=1.8, linestyle=style, label=label
        )
  axes[0].set(title="|cosine| of the two columns", yscale="log", ylim=(1e-6, 1.5), xlim=(10, None))
  axes[1].set(title="f / f*", ylim=(0, 1.03), xlim=(10, None))
  plots.legend_below(figure, axes[0])
  return [
    results.Figure(
      "self_predictive_ema",
      "Numbers are the decay of the target's moving average; 0 is a target without an average. An "
      "average does not repair a slow predictor, and an optimal predictor does not need one: it "
      f"only delays the growth of f. Lines are means over {config.data.num_chains} symmetric "
      "chains, bands reach from the 10th to the 90th percentile.",
      figure,
    )
  ]


_CRITERIA = {"collapse": _collapse_criteria, "ratio": _ratio_criteria, "ema": _ema_criteria}
_DRAW = {"collapse": _collapse_figures, "ratio": _ratio_figures, "ema": _ema_figures}
