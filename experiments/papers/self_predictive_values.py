"""What self-predictive features are for: value functions of random rewards, regressed on them.

The rewards of the states are independent and normal, so the values are V = R r with R = (I - gamma
P)^-1. The expected error of the best linear fit min_w |V - Phi w|^2 is then known exactly, |(I - Q
Q^T) R|^2 for an orthonormal basis Q of the features: no reward is drawn. Most of a value function
is its mean, so errors are given relative to that of a single constant feature.

Features are judged before and after learning in both directions, beside those of an oracle: the top
eigenvectors and singular vectors of P, and the left singular vectors of R, which no features beat.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import training
from experiments.papers import self_predictive_flows as flows
from experiments.report import plots, results, statistics
from experiments.tasks import traced_runs

ORACLES = ("eigenvectors of P", "singular vectors of P", "best features")


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the preset `values`."""
  discount = config.data.discount
  if not 0 <= discount < 1:
    raise ValueError(f"config.data.discount={discount} must lie in [0, 1)")

  def measure(features, transitions):
    forward = features[0] if isinstance(features, tuple) else features
    resolvent = jnp.linalg.inv(jnp.eye(len(transitions)) - discount * transitions)
    return {"error": regression_error(forward, resolvent)}

  return flows.experiment(
    config,
    measure=measure,
    result=lambda transitions, learners, traces: _result(config, transitions, traces),
    figures=lambda result: _figures(config, result),
    headline="error",
  )


def regression_error(features: Any, resolvent: Any) -> Any:
  """Returns the expected squared error of values on features, relative to a constant feature.

  Args:
    features: `[..., S, k]`, NumPy or JAX.
    resolvent: `[..., S, S]`, (I - gamma P)^-1.

  Returns:
    `[...]`, not negative: 1 is the error of values on their own mean.
  """
  xp = jnp if isinstance(features, jax.Array) else np
  basis = xp.linalg.qr(features)[0]
  rest = resolvent - basis @ (xp.swapaxes(basis, -1, -2) @ resolvent)
  centred = resolvent - resolvent.mean(-2, keepdims=True)
  return xp.sum(rest**2, (-1, -2)) / xp.sum(centred**2, (-1, -2))


def oracle_features(transitions: np.ndarray, resolvent: np.ndarray) -> dict[str, np.ndarray]:
  """Returns features that know P: `[..., S, S]`, of which a width takes the first columns.

  Complex eigenvectors of a pair are replaced by their real and imaginary part. Where a width splits
  a pair, the imaginary part is left out.
  """
  eigenvalues, vectors = np.linalg.eig(transitions)
  # Of a pair, the one with the positive imaginary part comes first; both are equally large.
  order = np.lexsort((-eigenvalues.imag, -np.round(np.abs(eigenvalues), 9)))
  vectors = np.take_along_axis(vectors, order[..., None, :], -1)
  second = np.take_along_axis(eigenvalues, order, -1).imag < 0
  real = np.where(second[..., None, :], vectors.imag, vectors.real)
  found = (real, np.linalg.svd(transitions)[0], np.linalg.svd(resolvent)[0])
  return dict(zip(ORACLES, found, strict=True))


def _result(config: Any, transitions: np.ndarray, traces: Any) -> results.Result:
  transitions = np.asarray(transitions, float)
  resolvent = np.linalg.inv(np.eye(transitions.shape[-1]) - config.data.discount * transitions)
  families, directions = tuple(config.data.families), tuple(config.algorithm.directions)
  oracles = oracle_features(transitions, resolvent)
  criteria: list[tuple[str, bool]] = []
  rows, arrays = [], {}
  for width in map(str, config.algorithm.num_features):
    found = {"before": traces[f"error/{directions[0]}/{width}"][0]}
    found |= {direction: traces[f"error/{direction}/{width}"][-1] for direction in directions}
    found |= {
      name: regression_error(features[..., : int(width)], resolvent)
      for name, features in oracles.items()
    }
    for name, errors in found.items():
      arrays[f"error/{name}/{width}"] = np.round(errors, 7)
    slow = flows.slow_chains(config, transitions, int(width)).sum(-1)
    for i, family in enumerate(families):
      cells = [traced_runs.spread(errors[i]) for errors in found.values()]
      rows.append([flows.TITLES[family], int(width), *cells, int(slow[i])])
      about = f"{flows.TITLES[family]}, k = {width}"
      for direction in directions:
        before, after = found["before"][i], found[direction][i]
        criteria.append(
          (f"{about}, {direction}: the mean error falls", bool(after.mean() < before.mean()))
        )
        arrays[f"trace/{direction}/{width}/{i}"] = np.round(
          traces[f"error/{direction}/{width}"][:, i], 7
        )
      if family == "positive" and "forward" in directions:
        gap = found["forward"][i] / found["best features"][i]
        criteria.append(
          traced_runs.every(f"{about}, forward: within 1 % of the best features", gap < 1.01)
        )
      if "bidirectional" in directions:
        gap = found["bidirectional"][i] / found["singular vectors of P"][i]
        criteria.append(
          traced_runs.every(
            f"{about}, bidirectional: within 1 % of the singular vectors", np.abs(gap - 1) < 0.01
          )
        )
  names = ["before", *directions, *ORACLES]
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(criteria)},
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        "Error of values on the features, relative to a constant feature: mean over chains [10th, "
        "90th percentile]",
        ["chains", "k", *names, "slow chains"],
        rows,
        caption=flows.SLOW,
      ),
    ],
    arrays=arrays,
  )


_STYLES = {
  "before": ("before learning", "0.55", "o", "-"),
  "forward": ("self-predictive", plots.PALETTE[0], "o", "-"),
  "bidirectional": ("bidirectional", plots.PALETTE[1], "s", "-"),
  "eigenvectors of P": ("top eigenvectors of P", plots.PALETTE[2], "x", ":"),
  "singular vectors of P": ("top singular vectors of P", plots.PALETTE[3], "+", ":"),
  "best features": ("best features", "0.1", "_", "--"),
}


def _plain_ticks(axis: Any) -> None:
  axis.set_yticks((0.3, 0.5, 1, 2, 5))
  axis.yaxis.set_major_formatter("{x:g}")
  axis.yaxis.set_minor_formatter("")


def _figures(config: Any, result: results.Result) -> list[results.Figure]:
  families, directions = tuple(config.data.families), tuple(config.algorithm.directions)
  widths = tuple(map(str, config.algorithm.num_features))
  figure, axes = plots.subplots(1, len(families), size=(3.0, 3.3), sharey=True)
  for i, (axis, family) in enumerate(zip(axes[0], families, strict=True)):
    for name in ("before", *directions, *ORACLES):
      label, color, marker, line = _STYLES[name]
      errors = np.stack([result.arrays[f"error/{name}/{width}"][i] for width in widths])
      style = {"color": color, "marker": marker, "linestyle": line, "label": label}
      if name in ORACLES:
        axis.plot(range(len(widths)), errors.mean(1), **style)
      else:
        traced_runs.curve(axis, np.arange(len(widths)), errors, **style)
    axis.axhline(1, color="0.4", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(widths)), widths)
    axis.set(title=flows.TITLES[family], xlabel="number of features k", yscale="log")
    _plain_ticks(axis)
  axes[0][0].set_ylabel("error of values")
  plots.legend_below(figure, axes[0][0], columns=6)
  curves, axes = plots.subplots(1, len(families), size=(3.0, 2.7), sharey=True)
  clock = config.algorithm.step * traced_runs.times(config)[1:]
  for i, (axis, family) in enumerate(zip(axes[0], families, strict=True)):
    for direction in directions:
      label, color, *_ = _STYLES[direction]
      rows = result.arrays[f"trace/{direction}/{widths[0]}/{i}"][1:]
      traced_runs.curve(axis, clock, rows, color=color, linewidth=2, label=label)
    axis.axhline(1, color="0.4", linestyle=":", linewidth=1)
    axis.set(title=flows.TITLES[family], xlabel="time", xscale="log", yscale="log")
    _plain_ticks(axis)
  axes[0][0].set_ylabel(f"error of values, k = {widths[0]}")
  plots.legend_below(curves, axes[0][0])
  about = (
    f"Lines are means over {config.data.num_chains} chains, bands reach from the 10th to the 90th "
    "percentile. The dotted line at 1 is a single constant feature."
  )
  return [
    results.Figure(
      "self_predictive_values",
      f"The error of the best linear fit to the values of random rewards, discount "
      f"{config.data.discount:g}. {about}",
      figure,
    ),
    results.Figure(
      "self_predictive_values_over_time", f"The same error during learning. {about}", curves
    ),
  ]
