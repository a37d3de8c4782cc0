"""Random bandits times values of a regulariser: what the baselines' tabular runs share.

A `Method` is an algorithm with its data and with where theory says that it ends. All its bandits
and settings are trained by the algorithm's own `update` in one program (`bandits`), and
the criterion that all share is the distance to that end, over every bandit and setting.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits

Checks = list[tuple[str, bool]]


class Bandits(NamedTuple):
  """P random bandits of A arms, float64.

  ref_logps: `[P, A]` from a Dirichlet distribution.  rewards: `[P, A]` standard normal.
  cycles: `[P, A, A]` antisymmetric, standard normal: log-odds that no reward explains.
  counts: `[P, A]` how often each arm is in the data, 1 to A in some order.
  """

  ref_logps: np.ndarray
  rewards: np.ndarray
  cycles: np.ndarray
  counts: np.ndarray

  def preferences(self, cycle: float) -> np.ndarray:
    """Returns P(i beats j) `[P, A, A]`: Bradley-Terry, and a cycle of this strength added."""
    log_odds = self.rewards[:, :, None] - self.rewards[:, None, :] + cycle * self.cycles
    return 1 / (1 + np.exp(-log_odds))


class Method(NamedTuple):
  """An algorithm on P bandits, and its end at each of S settings.

  label: its name in tables.
  algorithm: a module in the one shape.
  config: from a setting to the algorithm's `Config`.
  batch: `(problem, setting, params, key) -> Batch`, at every step; online methods draw from params.
  problems: pytree of arrays `[P, ...]`; `batch` sees one of them.
  start: `[P, ...]` parameters before training.
  exact: `[S, P, ...]` what `read` must say of the trained parameters.
  tolerance: the largest error that the criterion allows; None where theory promises nothing.
  apply_fn: the table as the algorithm's network.
  read: from parameters `[...]` to what is compared.
  """

  label: str
  algorithm: Any
  config: Callable[[Any], Any]
  batch: Callable[[Any, Any, Any, Any], Any]
  problems: Any
  start: np.ndarray
  exact: np.ndarray
  tolerance: float | None
  apply_fn: Callable[..., Any] = bandits.apply_fn
  read: Callable[[Any], Any] = jax.nn.softmax


def random_bandits(config: Any) -> Bandits:
  """Draws `data.num_bandits` bandits of `data.num_arms` arms from the seed alone.

  Raises:
    ValueError: if there are too few bandits for an interval over them, or too few arms for a cycle.
  """
  bandits.check_counts(config, num_bandits=2, num_arms=3)
  rng = np.random.default_rng(config.seed)
  shape = (config.data.num_bandits, config.data.num_arms)
  ref_logps = np.log(rng.dirichlet(np.full(shape[1], 2.0), shape[0]))
  above = np.triu(rng.normal(size=(*shape, shape[1])), 1)
  counts = rng.permuted(np.tile(np.arange(shape[1]) + 1, (shape[0], 1)), axis=1)
  return Bandits(ref_logps, rng.normal(size=shape), above - np.swapaxes(above, 1, 2), counts)


def pair_arms(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns every pair of two arms i < j, repeated counts_i counts_j times.

  Args:
    counts: `[P, A]` ints, the same ones in every row but for their order.

  Returns:
    first and second arms, each `[P, N]`.
  """
  above = np.triu(counts[:, :, None] * counts[:, None, :], 1)
  ids = [np.repeat(np.arange(table.size), table.ravel()) for table in above]
  first, second = np.unravel_index(np.stack(ids), above.shape[1:])
  return first, second


def build(
  config: Any,
  methods: Mapping[str, Method],
  settings: tuple[float, ...],
  *,
  symbol: str,
  optimizer: optax.GradientTransformation,
  findings: Callable[[bandits.Sweep, dict[str, np.ndarray]], tuple[Checks, list[results.Table]]],
  observe: Callable[[bandits.Sweep, Any], dict[str, jax.Array]] = lambda sweep, key: {},
  figures: Callable[[Any], list[results.Figure]] = lambda history: [],
  sample: Callable[[bandits.Sweep], results.Table] | None = None,
) -> training.Experiment:
  """Returns the experiment that trains every method on every bandit at every setting.

  Args:
    config: of `experiments.configs.base.bandit`.
    methods: by the names that metrics have.
    settings: the S values of the regulariser.
    symbol: what the settings are values of, in tables and figures.
    optimizer: for all methods.
    findings: from the sweep and what each method ended at, `[S, P, ...]`, to criteria beside the
      shared one, and tables.
    observe: further metrics, after each scan: of the sweep and a key.
    figures: beside the shared one, from the history.
    sample: a table of the trained models; by default arms drawn on the first bandit.
  """
  num_steps = config.train.inner_steps
  exact = {name: jnp.asarray(method.exact, jnp.float32) for name, method in methods.items()}

  def init(key):
    del key  # every run starts where its method says
    runs = {}
    for name, method in methods.items():
      first = functools.partial(
        method.algorithm.init, optimizer=optimizer, config=method.config(settings[0])
      )
      states = jax.vmap(first)(jnp.asarray(method.start, jnp.float32))
      runs[name] = bandits.broadcast(states, (len(settings),))
    return bandits.Sweep(runs, jnp.zeros((), jnp.int32))

  def scan(method, state, problem, key, setting):
    def step(state, index, key, config):
      del index
      draw_key, key = jax.random.split(key)
      batch = method.batch(problem, setting, state.params, draw_key)
      return method.algorithm.update(
        state, batch, key, apply_fn=method.apply_fn, optimizer=optimizer, config=config
      )

    run = bandits.scan_updates(step, lambda data, key: jnp.arange(num_steps), num_steps)
    return run(state, (), key, method.config(setting))[:2]

  def update(sweep, batch, key):
    del batch
    runs: dict[str, Any] = {}
    metrics: dict[str, jax.Array] = {}
    errors = []
    observe_key, key = jax.random.split(key)
    for name, method in methods.items():
      over_bandits = jax.vmap(functools.partial(scan, method), in_axes=(0, 0, 0, None))
      keys = jax.random.split(key, method.exact.shape[:2])
      runs[name], losses = jax.vmap(over_bandits, in_axes=(0, None, 0, 0))(
        sweep.runs[name], method.problems, keys, jnp.array(settings)
      )
      gaps = jnp.abs(method.read(runs[name].params) - exact[name])
      found = gaps.reshape(len(settings), -1).max(1)
      metrics |= {f"{name}/{s}/error": error for s, error in zip(settings, found, strict=True)}
      if method.tolerance is not None:
        errors.append(found.max())
      metrics.setdefault("loss", losses.mean())  # of the first method
    sweep = bandits.Sweep(runs, sweep.step + 1)
    return sweep, metrics | {"error": jnp.stack(errors).max()} | observe(sweep, observe_key)

  def evaluate(sweep):
    ends = {n: np.asarray(m.read(sweep.runs[n].params), float) for n, m in methods.items()}
    checks, rows = [], []
    for name, method in methods.items():
      errors = np.abs(ends[name] - method.exact).reshape(len(settings), -1).max(1)
      rows.append([method.label, *map(float, errors)])
      if method.tolerance is not None:
        for setting, error in zip(settings, errors, strict=True):
          text = f"{method.label}, {symbol} {setting}: within {method.tolerance} of its exact end"
          checks.append((text, bool(error < method.tolerance)))
    more, tables = findings(sweep, ends)
    checks += more
    columns = ["method", *(f"{symbol} {setting}" for setting in settings)]
    return results.Result(
      metrics={"criteria_passed": statistics.fraction_passed(checks)},
      tables=[
        results.checks_table("Pass criteria", checks),
        results.Table("Largest error over the bandits after training", columns, rows),
        *tables,
      ],
    )

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="error",
    maximise=False,
    evaluate=evaluate,
    sample=sample
    or functools.partial(bandits.sample_table, logits_of=lambda params: params[:, :1]),
    figures=lambda history, result: [
      _error_figure(history, methods, settings, symbol, config),
      *figures(history),
    ],
  )


def _error_figure(history, methods, settings, symbol, config) -> results.Figure:
  figure, axes = plots.subplots(1, len(settings), sharey=True)
  steps = np.array([0, *(record["step"] + 1 for record in history)]) * config.train.inner_steps
  for i, (axis, setting) in enumerate(zip(axes[0], settings, strict=True)):
    for name, method in methods.items():
      start = np.abs(np.asarray(method.read(jnp.asarray(method.start))) - method.exact[i]).max()
      errors = [start, *(record[f"{name}/{setting}/error"] for record in history)]
      axis.semilogy(steps, np.maximum(errors, 1e-8), label=method.label)
    axis.set(title=f"{symbol} = {setting}", xlabel="step")
  axes[0][0].set_ylabel("largest error over the bandits")
  plots.legend_below(figure, axes[0][0])
  caption = "Distance of each method to its own exact end, over all bandits. The floor is 1e-8."
  return results.Figure(f"{config.paper}_bandit_error", caption, figure)
