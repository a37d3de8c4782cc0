"""QR-DQN (arXiv:1710.10044) beside DQN of the same hidden layers, in games of one player.

QR-DQN runs with the config's kappa and with the pinball loss (kappa = 0), DQN with its errors
clipped at 1, as published, and with the squared error. The whole training is on the device, all
seeds and methods in one program. The processes are arrays, so the greedy policy of every seed is
evaluated exactly, and the learned quantiles are compared with the exact distribution of that
policy's return.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits
from rl_theory import decision_processes, openspiel_mdp, q_learning_epochs, qr_dqn, qtd
from rl_theory.baselines import dqn
from rl_theory.networks import mlp
from sharding import checks

METHODS: dict[str, Any] = {"qr_dqn": qr_dqn, "pinball": qr_dqn, "dqn": dqn, "squared": dqn}
NAMES = {
  "qr_dqn": "QR-DQN",
  "pinball": "QR-DQN, kappa 0",
  "dqn": "DQN",
  "squared": "DQN, squared error",
}
_QUANTILES, _POINTS = ("qr_dqn", "pinball"), ("dqn", "squared")


class Runs(NamedTuple):
  """State of the training loop; dictionaries by method with leaves `[num_seeds, ...]`.

  agents: `q_learning_epochs.State`.
  returns: sums over the steps of the loop of the greedy policy's expected return.
  step: `[]` int32, counts steps of the training loop.
  """

  agents: dict[str, Any]
  returns: dict[str, jax.Array]
  step: jax.Array


class _Task(NamedTuple):
  """The process, the optimal policy's `[S]` values and return, and both methods' networks."""

  process: decision_processes.DecisionProcess
  discount: float
  optimal_values: np.ndarray
  optimal_return: float
  networks: dict[str, Any]


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  num_seeds = config.environment.num_seeds
  checks.count("config.environment.num_seeds", num_seeds)
  checks.count("config.train.inner_steps", config.train.inner_steps)
  checks.count("config.network.num_quantiles", config.network.num_quantiles)
  for width in config.network.widths:
    checks.count("config.network.widths", width)
  checks.positive("config.optimizer.learning_rate", config.optimizer.learning_rate)
  task = _task(config)
  process, play = task.process, q_learning_epochs.Config(**config.play)
  optimizer = optax.adam(config.optimizer.learning_rate)
  kappas = {"qr_dqn": config.algorithm.kappa, "pinball": 0.0, "dqn": 1.0, "squared": 1e6}
  settings = {
    name: algorithm.Config(**{**config.algorithm, "kappa": kappas[name]})
    for name, algorithm in METHODS.items()
  }

  def init(key):
    agents = {}
    for name, algorithm in METHODS.items():

      def one(key, name=name, algorithm=algorithm):
        network_key, play_key = jax.random.split(key)
        params = task.networks[name].init(network_key, process.observations[:1])
        learner = algorithm.init(params, optimizer=optimizer, config=settings[name])
        return q_learning_epochs.init(learner, process, play_key, config=play)

      agents[name] = jax.vmap(one)(jax.random.split(key, num_seeds))
    returns = {name: jnp.zeros(num_seeds) for name in METHODS}
    return Runs(agents, returns, jnp.zeros((), jnp.int32))

  def update(runs, batch, key):
    del batch
    agents, returns = {}, {}
    metrics: dict[str, jax.Array] = {}
    for name, algorithm in METHODS.items():
      epoch = functools.partial(
        q_learning_epochs.epoch,
        algorithm=algorithm, apply_fn=task.networks[name].apply, optimizer=optimizer,
        hyperparameters=settings[name], config=play, num_updates=config.train.inner_steps,
      )  # fmt: skip
      agents[name], seen = jax.vmap(epoch, in_axes=(0, None, 0))(
        runs.agents[name], process, jax.random.split(key, num_seeds)
      )
      found = jax.vmap(lambda agent, name=name: _greedy_return(task, name, agent))(agents[name])
      returns[name] = runs.returns[name] + found
      metrics |= {
        f"return/{name}": jnp.mean(found),
        f"return/{name}_low": jnp.min(found),
        f"return/{name}_high": jnp.max(found),
        f"{name}/loss": jnp.mean(seen["loss"]),
        f"{name}/value": jnp.mean(seen[f"{algorithm.__name__.rpartition('.')[2]}/value"]),
      }
    metrics["loss"] = metrics["qr_dqn/loss"]
    metrics["env_steps"] = agents[name].env_steps[0].astype(jnp.float32)
    return Runs(agents, returns, runs.step + 1), metrics

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="return/qr_dqn",
    evaluate=lambda runs: _result(config, task, runs),
    sample=lambda runs: _value_table(task, runs),
    figures=lambda history, result: [
      _curves(history, task.optimal_return), _distributions(result)
    ],
  )  # fmt: skip


def _task(config: Any) -> _Task:
  process = decision_processes.with_slips(
    openspiel_mdp.compile_process(
      config.environment.game, max_states=config.environment.max_states
    ),
    config.environment.slip,
  )
  discount, widths = float(config.play.discount), tuple(config.network.widths)
  best = decision_processes.optimum(process, discount)
  best_return = process.initial @ decision_processes.policy_values(process, best.policy, 1.0)
  networks: dict[str, Any] = {name: mlp.MLP(process.num_actions, widths) for name in _POINTS}
  for name in _QUANTILES:
    networks[name] = mlp.QuantileMLP(process.num_actions, config.network.num_quantiles, widths)
  return _Task(process, discount, np.asarray(best.values), float(best_return), networks)


def _greedy_policy(task: _Task, name: str, agent: q_learning_epochs.State) -> jax.Array:
  return q_learning_epochs.greedy_policy(
    agent.learner.params, task.process, algorithm=METHODS[name], apply_fn=task.networks[name].apply
  )


def _greedy_return(task: _Task, name: str, agent: q_learning_epochs.State) -> jax.Array:
  """Returns the greedy policy's exact expected return, not discounted."""
  policy = _greedy_policy(task, name, agent)
  return task.process.initial @ decision_processes.policy_values(task.process, policy, 1.0)


# --- results ---


def _result(config: Any, task: _Task, runs: Runs) -> results.Result:
  final, gaps, distances, rows = {}, {}, {}, []
  arrays: dict[str, np.ndarray] = {}
  steps = max(int(runs.step), 1)
  mean_returns = {name: np.asarray(found) / steps for name, found in runs.returns.items()}
  initial = np.asarray(task.process.initial)
  for name in METHODS:
    policies = jax.vmap(functools.partial(_greedy_policy, task, name))(runs.agents[name])
    final[name], values = (
      np.asarray(
        jax.vmap(lambda policy, gamma=gamma: decision_processes.policy_values(
          task.process, policy, gamma
        ))(policies)
      )
      @ initial
      for gamma in (1.0, task.discount)
    )  # fmt: skip
    gaps[name] = initial @ task.optimal_values - values
    distances[name], floors = _distances(task, name, runs.agents[name], policies, arrays)
    rows.append(
      [
        NAMES[name],
        statistics.mean_interval(final[name]),
        statistics.mean_interval(mean_returns[name]),
        # Values down to -100 round by more than `mean_interval` allows below zero.
        statistics.mean_interval(np.maximum(gaps[name], 0), method="log"),
        statistics.mean_interval(distances[name], method="log"),
        statistics.mean_interval(floors, method="log"),
      ]
    )
  bars, ahead = config.eval, {}
  criteria = [
    (
      f"{NAMES[name]}: every seed's final value within {bars.gap:g} of the optimum",
      bool(np.all(gaps[name] <= bars.gap)),
    )
    for name in METHODS
  ]
  for name in _QUANTILES:
    nearer = [np.all(distances[name] < distances[point]) for point in _POINTS]
    criteria += [
      (
        f"{NAMES[name]}: every seed's quantiles within {bars.distance:g} (w1) of the exact returns",
        bool(np.all(distances[name] <= bars.distance)),
      ),
      (f"{NAMES[name]} predicts every seed's returns better (w1) than both DQNs", all(nearer)),
    ]
    for point in _POINTS:
      gain = statistics.mean_interval(mean_returns[name] - mean_returns[point])
      ahead[f"{name}/over_{point}"] = gain
      top = gain.value if gain.high is None else gain.high
      criteria.append(
        (f"{NAMES[name]}: mean return over training not below {NAMES[point]}'s (95 %)", top >= 0)
      )
  metrics: dict[str, Any] = {
    f"return/{name}": statistics.mean_interval(final[name]) for name in METHODS
  }
  metrics |= {
    "criteria_passed": statistics.fraction_passed(criteria),
    "return/optimal": task.optimal_return,
    **{
      f"distance/{name}": statistics.mean_interval(distances[name], method="log")
      for name in METHODS
    },
    **ahead,
    "env_steps": float(np.asarray(runs.agents["dqn"].env_steps)[0]),
  }
  return results.Result(
    metrics=metrics,
    tables=[
      results.checks_table("Pass criteria", criteria),
      results.Table(
        "Greedy policies, mean over seeds with 95 % intervals",
        ["method", "final return", "return, mean over training", "value below the optimum",
         "w1 to the exact returns", "w1 of exact quantiles"],
        rows,
        caption="Returns are exact expectations of the greedy policy, without discount; the "
        f"optimal policy's is {task.optimal_return:.4f}. Values are discounted by "
        f"{task.discount:g}. Distances compare, at the first states, what the network predicts for "
        "the greedy action with the exact discounted return of the greedy policy; DQN predicts "
        "one number. The last column has exact quantiles of that return in place of learned ones.",
      ),
    ],
    arrays=arrays,
  )  # fmt: skip


def _distances(
  task: _Task,
  name: str,
  agents: q_learning_epochs.State,
  policies: jax.Array,
  arrays: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """Returns each seed's w1 between learned and exact returns, mean over the first states.

  Beside it, the distance of the exact quantiles themselves. What the figure draws goes into
  `arrays`: that of the likeliest first state.
  """
  apply_fn, process = task.networks[name].apply, task.process
  learned = jax.vmap(lambda params: apply_fn(params, process.observations))(agents.learner.params)
  learned = np.asarray(learned).reshape(len(policies), *process.legal.shape, -1)
  levels = np.asarray(qtd.quantile_levels(learned.shape[-1]))
  starts, initial = np.flatnonzero(process.initial), np.asarray(process.initial, float)
  found, floors = np.zeros((2, len(policies)))
  for seed, policy in enumerate(np.asarray(policies)):
    for state in starts:
      exact = decision_processes.return_distribution(
        process, policy, task.discount, start=np.arange(process.num_states) == state
      )
      quantiles = np.sort(learned[seed, state, policy[state].argmax()])
      places = np.searchsorted(np.cumsum(exact.probs), levels - 1e-9)
      best = exact.values[np.minimum(places, len(exact.values) - 1)]
      for sums, atoms in ((found, quantiles), (floors, best)):
        sums[seed] += initial[state] * scipy.stats.wasserstein_distance(
          atoms, exact.values, None, exact.probs
        )
      if state == initial.argmax():
        arrays[f"{name}/learned/{seed}"] = quantiles
        arrays[f"{name}/values/{seed}"], arrays[f"{name}/probs/{seed}"] = exact
  return found, floors


def _value_table(task: _Task, runs: Runs) -> results.Table:
  """Returns what seed 0 of both methods predicts at the likeliest first state."""
  state, rows = int(jnp.argmax(task.process.initial)), []
  for name, algorithm in METHODS.items():
    params = jax.tree.map(lambda leaf: leaf[0], runs.agents[name].learner.params)
    learned = task.networks[name].apply(params, task.process.observations[state])
    for action in np.flatnonzero(task.process.legal[state]):
      predicted = np.atleast_1d(learned[action])
      value = float(algorithm.action_values(learned)[action])
      spread = [float(x) for x in np.quantile(predicted, (0.1, 0.5, 0.9))]
      rows.append([NAMES[name], int(action), value, spread])
  columns = ["method", "action", "value", "predicted return: 10 %, 50 %, 90 %"]
  return results.Table("Action values of seed 0 at the first state", columns, rows)


def _curves(history: Any, optimal: float) -> results.Figure:
  figure, axes = plots.subplots(1, 2, size=(4.2, 3.1), sharey=True)
  along = [row["env_steps"] / 1000 for row in history]
  for axis, names in zip(axes[0], (_QUANTILES, _POINTS), strict=True):
    for name in names:
      color = plots.PALETTE[list(METHODS).index(name)]
      axis.plot(along, [row[f"return/{name}"] for row in history], label=NAMES[name], color=color)
      low, high = ([row[f"return/{name}_{end}"] for row in history] for end in ("low", "high"))
      axis.fill_between(along, low, high, color=color, alpha=0.2, linewidth=0)
    axis.axhline(optimal, color="0.4", linestyle=":", label="optimal policy")
    axis.set_xlabel("thousands of moves of each seed")
    axis.legend(loc="best")
  axes[0][0].set_ylabel("return of the greedy policy")
  caption = (
    "The curves show the exact expected return of the greedy policy during training, as a mean "
    "over seeds; bands reach from the worst to the best seed."
  )
  return results.Figure("returns", caption, figure)


def _distributions(result: results.Result) -> results.Figure:
  """Draws learned and exact distributions of the return of QR-DQN's greedy policies."""
  arrays = result.arrays
  num_seeds = sum(name.startswith("qr_dqn/learned/") for name in arrays)
  rows, columns = len(_QUANTILES), min(num_seeds, 3)
  figure, axes = plots.subplots(rows, columns, size=(3.2, 2.5), sharey=True, sharex=True)
  for name, row in zip(_QUANTILES, axes, strict=True):
    for seed, axis in enumerate(row):
      values, probs = arrays[f"{name}/values/{seed}"], arrays[f"{name}/probs/{seed}"]
      learned = arrays[f"{name}/learned/{seed}"]
      margin = 0.05 * max(np.ptp(np.append(values, learned)), 1e-3)
      ends = min(values[0], learned[0]) - margin, max(values[-1], learned[-1]) + margin
      shares = np.arange(1, len(learned) + 1) / len(learned)
      for atoms, sums, label, color in (
        (values, np.cumsum(probs), "exact", "0.45"),
        (learned, shares, "learned", plots.PALETTE[0]),
      ):
        axis.step([ends[0], *atoms, ends[1]], [0, *sums, 1], where="post", label=label, color=color)
      axis.set_title(f"{NAMES[name]}, seed {seed}")
    row[0].set_ylabel("cumulative probability")
  for axis in axes[-1]:
    axis.set_xlabel("discounted return")
  plots.legend_below(figure, axes[0][0])
  caption = (
    "Each panel shows the discounted return of one seed's greedy policy from a first state: exact, "
    "and as its network predicts it."
  )
  return results.Figure("distributions", caption, figure)
