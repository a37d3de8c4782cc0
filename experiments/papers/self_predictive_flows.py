"""Self-predictive learning in continuous time: which features it finds on random Markov chains.

The predictor is always the best one for the features, the states are weighted equally, and the
features start orthonormal. Time is measured so that the weight of a state is 1.

`trace` and `bidirectional` follow the trace objective f, the squared Frobenius norm of Phi^T P Phi
(bidirectional: Phi^T P Psi), beside its maximum f*. `values` is in `self_predictive_values`.

Float32 is enough. It moves the lengths of the features by about 1e-4, so we measure their span: f
of an orthonormal basis. The invariants themselves are tested in float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import traced_runs
from representation import chain_spectrum, self_predictive_flow
from rl_theory import transition_matrices
from sharding import checks

TITLES = {
  "symmetric": "symmetric",
  "positive": "symmetric, eigenvalues above 0",
  "doubly stochastic": "doubly stochastic",
  "arbitrary": "arbitrary",
}
DIRECTIONS = {
  "forward": lambda features, transitions: (
    self_predictive_flow.flow(self_predictive_flow.Variables(features), transitions).representation
  ),
  "bidirectional": self_predictive_flow.bidirectional_flow,
}
SLOW = (
  "On a slow chain the k-th singular value is so near to the next that bidirectional learning "
  "needs more time: sigma_k (sigma_k - sigma_(k+1)) times the length of the run is below 5."
)
# Between two measurements, float32 changes f / f* by less than this.
_ROUNDING = 1e-5


def chains(key: jax.Array, family: str, num_chains: int, num_states: int) -> jax.Array:
  """Returns random transitions `[num_chains, num_states, num_states]` of one family of `TITLES`.

  "positive" are the symmetric chains of the same key made lazy: they stay where they are with
  probability 0.6, so that no eigenvalue is negative.
  """
  makers: dict[str, Callable[..., jax.Array]] = {
    "doubly stochastic": transition_matrices.doubly_stochastic_transitions,
    "arbitrary": functools.partial(transition_matrices.dense_transitions, concentration=0.3),
  }
  make = makers.get(family, transition_matrices.symmetric_transitions)
  drawn = jax.vmap(lambda key: make(key, num_states))(jax.random.split(key, num_chains))
  if family == "positive":
    return jax.vmap(lambda one: transition_matrices.lazy(one, 0.6))(drawn)
  return drawn


def orthonormal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns random features `shape` with orthonormal columns."""
  return jnp.linalg.qr(jax.random.normal(key, shape))[0]


def _start(key: jax.Array, family: str, shape: tuple[int, ...]) -> jax.Array:
  """Returns the same features for a family and a width in every preset."""
  key = jax.random.fold_in(key, list(TITLES).index(family))
  return orthonormal(jax.random.fold_in(key, shape[-1]), shape)


def experiment(
  config: Any, *, measure: Callable[..., Any], headline: str, **functions: Any
) -> training.Experiment:
  """Returns the experiment that integrates the flows of all chains and widths.

  The problem is the transitions `[families, chains, S, S]`. Learners are by direction and width:
  features `[families, chains, S, width]`, or a pair of them.

  Args:
    config: of the presets `trace`, `bidirectional` or `values`.
    measure: `measure(features, transitions) -> {name: number}` of one chain and direction.
    headline: one of these names, logged for the first direction and width.
    **functions: other arguments of `traced_runs.experiment`.
  """
  num_states, num_chains = config.data.num_states, config.data.num_chains
  families, directions = tuple(config.data.families), tuple(config.algorithm.directions)
  widths = tuple(config.algorithm.num_features)
  checks.count("config.data.num_chains", num_chains, least=2)
  checks.positive("config.algorithm.step", config.algorithm.step)
  for name, given, known in (
    ("data.families", families, tuple(TITLES)),
    ("algorithm.directions", directions, tuple(DIRECTIONS)),
  ):
    if not given:
      raise ValueError(f"config.{name} is empty: give some of {', '.join(known)}")
    for one in given:
      checks.choice(f"config.{name}", one, known)
  if not widths or min(widths) < 1 or max(widths) > num_states:
    raise ValueError(
      f"config.algorithm.num_features={widths} must be one or more numbers from 1 to "
      f"config.data.num_states={num_states}: more columns than states are dependent"
    )

  def start(key):
    chain_key, *keys = jax.random.split(key, 3)
    transitions = jnp.stack(
      [chains(chain_key, family, num_chains, num_states) for family in families]
    )
    learners: dict[str, Any] = {direction: {} for direction in directions}
    shape = (num_chains, num_states)
    for width in widths:
      pair = self_predictive_flow.Pair(
        *(jnp.stack([_start(key, family, (*shape, width)) for family in families]) for key in keys)
      )
      for direction in directions:  # both start from the same features
        learners[direction][str(width)] = pair.forward if direction == "forward" else pair
    return transitions, learners

  def step(flow, features, transitions):
    return self_predictive_flow.integrate(
      lambda x: flow(x, transitions), features, step=config.algorithm.step, num_steps=1,
      measure=lambda x: (),
    )[0]  # fmt: skip

  def advance(transitions, learners):
    return {
      direction: {
        width: jax.vmap(jax.vmap(functools.partial(step, DIRECTIONS[direction])))(x, transitions)
        for width, x in found.items()
      }
      for direction, found in learners.items()
    }

  def measure_all(transitions, learners):
    return {
      f"{name}/{direction}/{width}": value
      for direction, found in learners.items()
      for width, x in found.items()
      for name, value in jax.vmap(jax.vmap(measure))(x, transitions).items()
    }

  return traced_runs.experiment(
    config,
    start=start,
    advance=advance,
    measure=measure_all,
    headline=f"{headline}/{directions[0]}/{widths[0]}",
    **functions,
  )


def slow_chains(config: Any, transitions: np.ndarray, width: int) -> np.ndarray:
  """Returns whether bidirectional learning is too slow to end near its limit, `[...]` bool.

  Near the top k singular vectors the error falls at the rate sigma_k (sigma_k - sigma_{k+1}). A
  chain is slow if this times the length of the run is below 5, so that exp(-5) of it is left.
  """
  values = np.linalg.svd(transitions, compute_uv=False)
  gaps = values[..., width - 1] - (values[..., width] if width < values.shape[-1] else 0)
  time = config.algorithm.step * config.train.num_steps * config.train.inner_steps
  return values[..., width - 1] * gaps * time < 5


def span(features: jax.Array) -> jax.Array:
  """Returns an orthonormal basis of the columns of `features` `[S, k]`."""
  return jnp.linalg.qr(features)[0]


def build(config: Any) -> training.Experiment:
  """Returns the experiment of the presets `trace` and `bidirectional`."""

  def measure(features, transitions):
    paired = isinstance(features, self_predictive_flow.Pair)
    left, right = features if paired else (features, features)
    gram = left.T @ left
    found = {
      "objective": self_predictive_flow.trace_objective(span(left), transitions, span(right)),
      "drift": jnp.max(jnp.abs(gram - jnp.eye(len(gram)))),
    }
    if not paired:  # of the symmetric part, where P is not symmetric
      inner = span(left).T @ transitions @ span(left)
      found["spectrum"] = jnp.linalg.eigvalsh((inner + inner.T) / 2)
    return found

  return experiment(
    config,
    measure=measure,
    result=lambda transitions, learners, traces: _result(config, transitions, learners, traces),
    figures=lambda result: _figures(config, result),
    headline="objective",
    maximise=True,
  )


def _result(config, transitions, learners, traces) -> results.Result:
  transitions = np.asarray(transitions, float)
  values = np.linalg.svd(transitions, compute_uv=False)  # [families, chains, S]
  families, directions = tuple(config.data.families), tuple(config.algorithm.directions)
  criteria: list[tuple[str, bool]] = []
  rows, arrays = [], {}
  for direction in directions:
    for width in map(str, config.algorithm.num_features):
      best = np.sum(values[..., : int(width)] ** 2, axis=-1)
      slow = slow_chains(config, transitions, int(width))
      ratios = traces[f"objective/{direction}/{width}"] / best  # [times, families, chains]
      arrays[f"ratio/{direction}/{width}"] = np.round(ratios, 6)
      falls = np.diff(ratios, axis=0).min(0, initial=0) < -_ROUNDING  # [families, chains]
      for i, family in enumerate(families):
        rows.append(
          [
            TITLES[family], direction, int(width), traced_runs.spread(ratios[-1, i]),
            float(ratios[-1, i].min()), int((ratios[-1, i] > 0.999).sum()), int(falls[i].sum()),
            int(slow[i].sum()) if direction == "bidirectional" else "",
          ]
        )  # fmt: skip
        about = f"{TITLES[family]}, {direction}, k = {width}"
        if direction == "bidirectional" or family in ("symmetric", "positive"):
          criteria.append(traced_runs.every(f"{about}: f never falls", ~falls[i]))
        if direction == "bidirectional" or family == "positive":
          criteria.append(
            traced_runs.every(f"{about}: f ends above 0.999 f*", ratios[-1, i] > 0.999)
          )
        if direction == "forward" and family in ("doubly stochastic", "arbitrary"):
          criteria.append(
            (f"{about}: f falls at some time on most chains", bool(falls[i].mean() > 0.5))
          )
  drift = max(float(value.max()) for name, value in traces.items() if name.startswith("drift/"))
  criteria.append(("lengths and angles of the features change by less than 1e-2", drift < 1e-2))
  tables = [
    results.checks_table("Pass criteria", criteria),
    results.Table(
      "f / f* at the end: mean over chains [10th, 90th percentile]",
      [
        "chains",
        "learning",
        "k",
        "f / f*",
        "lowest",
        "above 0.999",
        "f falls at some time",
        "slow chains",
      ],
      rows,
      caption=SLOW,
    ),
  ]
  if config.data.name == "trace" and "symmetric" in families:
    where = families.index("symmetric")
    ends = {
      width: stable_ends(transitions[where], np.asarray(x[where], float))
      for width, x in learners["forward"].items()
    }
    for width, (overlaps, _) in ends.items():
      reached = overlaps > 0.99
      criteria.append(traced_runs.every(f"symmetric, k = {width}: ends in a stable set", reached))
    tables.append(_stable_table(ends))
    width = sorted(ends, key=int)[len(ends) // 2]  # the figure shows one chain for each outcome
    arrays["negatives"], shown = np.unique(ends[width][1], return_index=True)
    arrays["spectra"] = np.round(traces[f"spectrum/forward/{width}"][:, where, shown], 6)
    arrays["eigenvalues"] = np.linalg.eigvalsh(transitions[where, shown])
    tables[0] = results.checks_table("Pass criteria", criteria)
  metrics = {"criteria_passed": statistics.fraction_passed(criteria), "drift": drift}
  return results.Result(metrics=metrics, tables=tables, arrays=arrays)


def stable_ends(transitions: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns which of `chain_spectrum.stable_sets` each symmetric chain ended in.

  Args:
    transitions: `[chains, S, S]`, symmetric.
    features: `[chains, S, k]`.

  Returns:
    The share of the features' span that lies in the nearest set, `[chains]` in [0, 1], and how many
    of its eigenvalues are negative, `[chains]`.
  """
  width, nearest = features.shape[-1], []
  for chain, basis in zip(transitions, np.linalg.qr(features)[0], strict=True):
    eigenvalues, vectors = np.linalg.eigh(chain)
    overlaps = np.sum((vectors.T @ basis) ** 2, axis=1)
    ends = chain_spectrum.stable_sets(eigenvalues, width)
    nearest.append(
      max((overlaps[[*end]].sum() / width, int((eigenvalues[[*end]] < 0).sum())) for end in ends)
    )
  shares, negatives = zip(*nearest, strict=True)
  return np.array(shares), np.array(negatives)


def _stable_table(ends: dict[str, tuple[np.ndarray, np.ndarray]]) -> results.Table:
  most = max(int(negatives.max()) for _, negatives in ends.values())
  rows = []
  for width, (overlaps, negatives) in ends.items():
    reached = overlaps > 0.99
    counts = [int((reached & (negatives == p)).sum()) for p in range(most + 1)]
    rows.append([int(width), *counts, int((~reached).sum())])
  return results.Table(
    "Symmetric chains by the stable set in which the features end",
    ["k", *(f"{p} negative" for p in range(most + 1)), "not there yet"],
    rows,
    caption=(
      "A stable set has the largest positive and the most negative eigenvalues; the columns count "
      "the negative ones. A chain is there if 99 % of the span is."
    ),
  )


def _figures(config: Any, result: results.Result) -> list[results.Figure]:
  families, directions = tuple(config.data.families), tuple(config.algorithm.directions)
  widths = tuple(map(str, config.algorithm.num_features))
  clock = config.algorithm.step * traced_runs.times(config)[1:]
  figure, axes = plots.subplots(
    len(directions), len(families), size=(3.0, 2.6), sharex=True, sharey=True
  )
  for row, direction in enumerate(directions):
    for column, family in enumerate(families):
      axis = axes[row][column]
      single = result.arrays[f"ratio/{direction}/{widths[0]}"][1:, column]
      axis.plot(clock, single[:, :8], color=plots.PALETTE[0], alpha=0.35, linewidth=0.7)
      for k, width in enumerate(widths):
        ratios = result.arrays[f"ratio/{direction}/{width}"][1:, column]
        traced_runs.curve(
          axis, clock, ratios, color=plots.PALETTE[k], linewidth=2, label=f"k = {width}"
        )
      axis.axhline(1, color="0.4", linestyle=":", linewidth=1)
      axis.set(xscale="log", ylim=(0, 1.05))
      if row == 0:
        axis.set_title(TITLES[family])
      if row == len(directions) - 1:
        axis.set_xlabel("time")
    words = f"{direction}: " if len(directions) > 1 else ""
    axes[row][0].set_ylabel(f"{words}f / f*")
  plots.legend_below(figure, axes[0][0])
  num_chains = config.data.num_chains
  found = [
    results.Figure(
      f"self_predictive_{config.data.name}",
      f"The trace objective f over its maximum f*. Thick lines are means over {num_chains} chains, "
      "bands reach from the 10th to the 90th percentile. Thin lines are eight single chains at k = "
      f"{widths[0]}.",
      figure,
    )
  ]
  if "spectra" in result.arrays:
    found.append(_spectra(result, clock))
  return found


def _spectra(result: results.Result, clock: np.ndarray) -> results.Figure:
  """Draws the eigenvalues of Phi^T P Phi over time, for chains that end in different sets."""
  negatives, spectra = result.arrays["negatives"], result.arrays["spectra"]
  width = spectra.shape[-1]
  figure, axes = plots.subplots(1, len(negatives), size=(3.0, 2.9), sharey=True)
  for k, axis in enumerate(axes[0]):
    axis.grid(False)
    for value in result.arrays["eigenvalues"][k]:
      axis.axhline(value, color="0.82", linewidth=0.8)
    for line, color in zip(spectra[1:, k].T[::-1], _colors(width), strict=True):
      axis.plot(clock, line, color=color, linewidth=2)
    axis.set(xscale="log", xlabel="time", title=f"ends with {negatives[k]} negative of {width}")
  axes[0][0].set_ylabel("eigenvalue")
  return results.Figure(
    "self_predictive_spectra",
    f"Thick lines are the eigenvalues of Phi^T P Phi for k = {width}, on one symmetric chain in "
    "each panel. Grey lines are all eigenvalues of P. The features end at the largest positive and "
    "the most negative eigenvalues. How many are negative depends on where the features started.",
    figure,
  )


def _colors(number: int) -> list[str]:
  return [plots.PALETTE[k % len(plots.PALETTE)] for k in range(number)]
