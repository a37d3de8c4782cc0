"""Latent prediction (arXiv:2212.03319) as the auxiliary loss of a recurrent agent.

Agents with no such loss, with the forward loss and with both losses train as one program. They
train in pairs: equal seeds start from equal parameters and draw equal random numbers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.loop import training
from experiments.report import plots, results, statistics
from experiments.tasks import bandits, masked_worlds, memory_agents
from representation import adamw_probes, collapse, latent_prediction
from rl_theory import decision_processes
from sharding import checks

# Whether an agent has the forward and the backward loss.
VARIANTS = {"none": (0.0, 0.0), "forward": (1.0, 0.0), "bidirectional": (1.0, 1.0)}
_PROBE_ROWS = (2000, 500, 1000)  # to train, to validate, to test
_MEASURES = ("effective_rank", "mean_cosine", "spread", "mean_norm")


class Runs(NamedTuple):
  """State of the training loop.

  learners: agents, leaves `[variants, seeds, ...]`.
  returns: `[num_steps, variants, seeds]`, the mean return of each step's episodes; 0 in the future.
  step: `[]` int32, counts steps of the training loop.
  """

  learners: memory_agents.Learner
  returns: jax.Array
  step: jax.Array


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  environment, algorithm = config.environment, config.algorithm
  for name, value in (
    ("environment.num_seeds", environment.num_seeds),
    ("environment.batch_size", environment.batch_size),
    ("network.width", config.network.width),
    ("train.inner_steps", config.train.inner_steps),
    ("eval.num_episodes", config.eval.num_episodes),
  ):
    checks.count(f"config.{name}", value)
  checks.not_negative("config.algorithm.weight", algorithm.weight)
  checks.positive("config.optimizer.learning_rate", config.optimizer.learning_rate)
  world = masked_worlds.make(environment)
  apply_fn = memory_agents.networks(config, world)
  optimizer = optax.adam(config.optimizer.learning_rate)
  num_seeds, num_steps = environment.num_seeds, config.train.num_steps
  weights = algorithm.weight * jnp.array(list(VARIANTS.values()))
  hyperparameters = memory_agents.Config(
    latent=latent_prediction.Config(target_decay=algorithm.target_decay, horizon=algorithm.horizon),
    **{
      name: algorithm[name]
      for name in ("discount", "trace_decay", "value_weight", "entropy_weight")
    },
  )

  def first_learners(key):
    keys = jax.random.split(key, num_seeds)
    return jax.vmap(lambda key: memory_agents.init(key, apply_fn, world, optimizer))(keys)

  def init(key):
    learners = bandits.broadcast(first_learners(key), (len(VARIANTS),))
    returns = jnp.zeros((num_steps, len(VARIANTS), num_seeds))
    return Runs(learners, returns, jnp.zeros((), jnp.int32))

  def train(learner, key, weights):
    forward, backward = weights
    latent = dataclasses.replace(
      hyperparameters.latent, forward_weight=forward, backward_weight=backward
    )

    def body(learner, key):
      return memory_agents.update(
        learner, key, apply_fn=apply_fn, world=world, optimizer=optimizer,
        config=dataclasses.replace(hyperparameters, latent=latent),
        num_episodes=environment.batch_size,
      )  # fmt: skip

    keys = jax.random.split(key, config.train.inner_steps)
    learner, metrics = jax.lax.scan(body, learner, keys)
    return learner, jax.tree.map(jnp.mean, metrics)

  def update(runs, batch, key):
    del batch  # each agent plays its own episodes
    over_seeds = jax.vmap(train, in_axes=(0, 0, None))
    over_variants = jax.vmap(over_seeds, in_axes=(0, None, 0))
    learners, found = over_variants(runs.learners, jax.random.split(key, num_seeds), weights)
    metrics = {"loss": jnp.mean(found["loss"]), "return": jnp.mean(found["return"])}
    for name in ("return", "entropy", "forward_loss", "backward_loss"):
      for variant, values in zip(VARIANTS, jnp.mean(found[name], axis=1), strict=True):
        metrics[f"{name}/{variant}"] = values
    returns = runs.returns.at[runs.step].set(found["return"])
    return Runs(learners, returns, runs.step + 1), metrics

  def evaluate(runs):
    untrained = first_learners(jax.random.key(config.seed)).params
    return _result(config, world, apply_fn, runs, untrained)

  return training.Experiment(
    init=init,
    update=update,
    batches=bandits.NoData,
    headline="return",
    evaluate=evaluate,
    figures=lambda history, result: [_figure(config, world, result)],
  )


def _result(
  config: Any,
  world: masked_worlds.World,
  apply_fn: memory_agents.Networks,
  runs: Runs,
  untrained: memory_agents.Params,
) -> results.Result:
  """Plays each agent's policy, and probes what each agent makes of the same random episodes."""
  num_episodes, num_seeds = config.eval.num_episodes, config.environment.num_seeds
  key = jax.random.key(config.seed + 1)  # not that of training

  def play(params, uniform=False):
    return memory_agents.play(
      params, key, apply_fn=apply_fn, world=world, num_episodes=num_episodes, uniform=uniform
    )

  trained = runs.learners.params
  agents = jax.tree.map(  # [(variants and untrained) seeds, ...]
    lambda leaf, first: jnp.concatenate([leaf, first[None]]).reshape(-1, *leaf.shape[2:]),
    trained,
    untrained,
  )
  watched = jax.jit(lambda params: play(params, uniform=True))(
    jax.tree.map(lambda leaf: leaf[0], agents)
  )
  probed = np.asarray(watched.mask) & world.probed[np.asarray(watched.states)]

  @jax.jit
  def measure(params):
    def one(params):
      encoded = apply_fn.latent.agent(params.latent.agent, watched.observations, watched.actions)
      states = encoded.states.reshape(-1, encoded.states.shape[-1])
      numbers = collapse.metrics(states, mask=watched.mask.reshape(-1), spectrum=True)
      return jnp.mean(jnp.sum(play(params).rewards, axis=1)), states, numbers

    return jax.lax.map(one, params)

  by_variant = (len(VARIANTS) + 1, num_seeds)
  final, states, numbers = measure(agents)
  final = np.asarray(final).reshape(by_variant)[:-1]
  measures = {
    name: np.asarray(numbers[f"collapse/{name}"]).reshape(by_variant) for name in _MEASURES
  }
  splits = _splits(probed)
  accuracies, guesses = {}, {}
  for name, labels in world.labels.items():
    values = labels[np.asarray(watched.states)].ravel()
    num_classes = int(labels.max()) + 1
    found = [
      adamw_probes.evaluate_softmax(
        one, values, *splits, num_classes=num_classes, weight_decays=[0.0], learning_rate=0.1,
        num_steps=300,
      ).score
      for one in states
    ]  # fmt: skip
    accuracies[name] = np.asarray(jnp.stack(found)).reshape(by_variant)
    guesses[name] = float(np.mean(values[splits[2]] == np.bincount(values[splits[0]]).argmax()))
  returns = np.asarray(runs.returns)
  return results.Result(
    metrics={
      f"return/{v}": statistics.interquartile_mean(final[k]) for k, v in enumerate(VARIANTS)
    },
    tables=_tables(returns, final, accuracies, guesses, measures, _references(world)),
    notes=[world.seen],
    arrays={
      "returns": returns,
      "final": final,
      "references": np.array(_references(world)),
      **{f"probe/{name}": values for name, values in accuracies.items()},
    },
  )


def _splits(probed: np.ndarray) -> list[np.ndarray]:
  """Returns rows of steps to train, validate and test a probe; no episode gives rows to two."""
  rng, num_steps = np.random.default_rng(0), probed.shape[1]
  shares = np.array(_PROBE_ROWS) / sum(_PROBE_ROWS)
  ends = np.cumsum(shares * len(probed)).astype(int)
  found = []
  for first, last, most in zip((0, *ends[:-1]), ends, _PROBE_ROWS, strict=True):
    rows = first * num_steps + np.flatnonzero(probed[first:last])
    found.append(np.sort(rng.permutation(rows)[:most]))
  return found


def _references(world: masked_worlds.World) -> tuple[float, float]:
  """Returns the expected returns of an agent that sees everything, and of the uniform policy."""
  process = world.process
  uniform = process.legal / jnp.sum(process.legal, axis=1, keepdims=True)
  best = decision_processes.optimum(process, 1.0).values
  return float(process.initial @ best), float(
    process.initial @ decision_processes.policy_values(process, uniform, 1.0)
  )


def _tables(
  returns: np.ndarray,
  final: np.ndarray,
  accuracies: dict[str, np.ndarray],
  guesses: dict[str, float],
  measures: dict[str, np.ndarray],
  references: tuple[float, float],
) -> list[results.Table]:
  estimate, area, num_seeds = statistics.interquartile_mean, returns.mean(0), final.shape[1]
  numbers = np.stack([values[:-1] for values in measures.values()])
  criteria = [
    (
      "every return and measure is finite",
      bool(np.isfinite(numbers).all() and np.isfinite(final).all()),
    ),
    (
      "no agent's states have collapsed to a point: their spread is above 1 % of their norm",
      bool(np.all(measures["spread"][:-1] > 0.01 * measures["mean_norm"][:-1])),
    ),
  ]
  every = f"Interquartile means of {num_seeds} seeds with 95 % bootstrap intervals."
  rows = []
  for k, variant in enumerate(VARIANTS):
    gain = statistics.mean_interval(area[k] - area[0], method="bootstrap") if k else "-"
    rows.append([variant, estimate(final[k]), estimate(area[k]), gain])
  names = [*VARIANTS, "untrained"]
  return [
    results.checks_table("Pass criteria", criteria),
    results.Table(
      "Return",
      ["auxiliary loss", "at the end", "mean over training", "gain over none (mean of pairs)"],
      rows,
      caption=f"{every} The best return of an agent that sees everything is {references[0]:.3f}, "
      f"and that of the uniform policy {references[1]:.3f}.",
      digits=3,
    ),
    results.Table(
      "What a linear probe reads from the agent's state",
      ["auxiliary loss", *(f"{name} (guess: {guesses[name]:.3f})" for name in accuracies)],
      [[v, *(estimate(a[k]) for a in accuracies.values())] for k, v in enumerate(names)],
      caption=f"Test accuracy. {every} All agents read the same episodes of the uniform policy. A "
      "guess is the most frequent class.",
      digits=3,
    ),
    results.Table(
      "The agent's states on these episodes",
      ["auxiliary loss", *(name.replace("_", " ") for name in measures)],
      [[v, *(estimate(m[k]) for m in measures.values())] for k, v in enumerate(names)],
      caption=every,
      digits=3,
    ),
  ]


def _ends(point: results.Estimate) -> tuple[float, float]:
  """Returns the interval of an estimate; without one, the estimate twice."""
  if point.low is None or point.high is None:
    return point.value, point.value
  return point.low, point.high


def _figure(config: Any, world: masked_worlds.World, result: results.Result) -> results.Figure:
  """Draws the returns in training, and the accuracy of the probes."""
  labels = list(world.labels)
  figure, axes = plots.subplots(1, 1 + len(labels))
  returns = result.arrays["returns"]
  per_step = config.train.inner_steps * config.environment.batch_size
  thousands = per_step * (np.arange(len(returns)) + 1) / 1000
  curve, *others = axes[0]
  for k, variant in enumerate(VARIANTS):
    points = [statistics.interquartile_mean(values) for values in returns[:, k]]
    (line,) = curve.plot(thousands, [point.value for point in points], label=variant)
    ends = np.array([_ends(point) for point in points])
    curve.fill_between(thousands, *ends.T, color=line.get_color(), alpha=0.2, linewidth=0)
  for value, style in zip(result.arrays["references"], ("--", ":"), strict=True):
    curve.axhline(value, color=plots.PALETTE[-1], linestyle=style, linewidth=1)
  curve.set(xlabel="thousand episodes", ylabel="return", title="return in training")
  for axis, name in zip(others, labels, strict=True):
    values = result.arrays[f"probe/{name}"]
    for k, color in enumerate([*plots.PALETTE[: len(VARIANTS)], plots.PALETTE[-1]]):
      point = statistics.interquartile_mean(values[k])
      low, high = _ends(point)
      axis.plot(np.full(len(values[k]), k), values[k], ".", color=color, alpha=0.4)
      axis.errorbar(
        k, point.value, [[point.value - low], [high - point.value]], color=color, marker="o",
        capsize=4,
      )  # fmt: skip
    axis.set_xticks(range(len(values)), [*VARIANTS, "untrained"], rotation=20)
    axis.set(title=f"probe: {name}", ylabel="test accuracy")
  plots.legend_below(figure, curve)
  return results.Figure(
    name="latent_prediction",
    caption=(
      f"{world.seen} Lines and points with bars show interquartile means of "
      f"{returns.shape[2]} seeds with 95 % bootstrap intervals, small points single seeds. The "
      "dashed line is the best return of an agent that sees everything, the dotted line the return "
      "of the uniform policy."
    ),
    figure=figure,
  )
