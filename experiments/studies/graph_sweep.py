"""How graph methods depend on a number: each value and seed is a learner, all train together.

Hyper-parameters that are leaves of a method's config are mapped over, so that all their values and
seeds are one program. What changes shapes or networks (negatives, graphs) has a program for
each value, mapped over seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import presets, training
from experiments.papers import bgrl as bgrl_paper
from experiments.papers import grace as grace_paper
from experiments.report import results, statistics
from experiments.tasks import bandits, graph_runs, graph_sweeps, node_classification
from representation import bgrl, collapse
from representation.baselines import grace
from representation.networks import adapters
from sharding import checks

_METHODS = {"bgrl": (bgrl_paper, bgrl), "grace": (grace_paper, grace)}

# Both views have the same probability. A decay without an end to its schedule is constant.
_MAPPED: dict[str, Callable[[Any, Any], Any]] = {
  "feature_mask_prob": lambda config, x: dataclasses.replace(config, feature_mask_probs=(x, x)),
  "edge_drop_prob": lambda config, x: dataclasses.replace(config, edge_drop_probs=(x, x)),
  "target_decay": lambda config, x: dataclasses.replace(config, target_decay=x, num_steps=2**30),
}


class Runs(NamedTuple):
  """State of the loop; leaves of the learners begin with `[values, seeds]`.

  learners: states of the method, by program.
  step: `[]` int32, steps done.
  """

  learners: dict[str, Any]
  step: jax.Array


class _Program(NamedTuple):
  """Learners that differ by numbers alone.

  over: what is varied.
  values: its values.
  experiment: of the method.
  update: the same update, as the partial function whose hyper-parameters are replaced.
  embed: from a state to what is judged.
  judge: of the graph.
  labels: `[N]` of the graph.
  """

  over: str
  values: tuple[float, ...]
  experiment: training.Experiment
  update: Any
  embed: Any
  judge: node_classification.Evaluator
  labels: np.ndarray

  @property
  def graph(self) -> Any:
    return self.experiment.init_args[0]


def build(config: Any) -> training.Experiment:
  """Returns the experiment of one preset."""
  over, values, num_seeds = tuple(config.sweep.over), tuple(config.sweep.at), _num_seeds(config)
  for name, given, least in (("over", over, 1), ("at", values, 2)):
    if len(given) < least or len(set(given)) < len(given):
      raise ValueError(f"config.sweep.{name}={given}: give {least} or more, each once")
  if unknown := set(over) - set(graph_sweeps.AXES):
    raise ValueError(
      f"config.sweep.over={over}: no {unknown.pop()!r}; there are {', '.join(graph_sweeps.AXES)}"
    )
  programs = {}
  for one in over:
    for part in [values] if one in _MAPPED else [(value,) for value in values]:
      programs[one if one in _MAPPED else f"{one}={part[0]:g}"] = _program(config, one, part)
  placed = {name: program.graph for name, program in programs.items()}

  def init(key, placed):
    learners = {}
    for name, program in programs.items():
      start = jax.vmap(program.experiment.init, in_axes=(0, None))
      seeds = start(jax.random.split(key, num_seeds), placed[name])  # the same for every value
      learners[name] = jax.tree.map(
        lambda leaf, n=len(program.values): jnp.broadcast_to(leaf, (n, *leaf.shape)), seeds
      )
    return Runs(learners, jnp.zeros((), jnp.int32))

  def update(runs, placed, key):
    learners, metrics = {}, {}
    for name, program in programs.items():

      def step(learner, value, key, name=name, program=program):
        algorithm = program.update.keywords["config"]
        if program.over in _MAPPED:
          algorithm = _MAPPED[program.over](algorithm, value)
        return program.update(learner, placed[name], key, config=algorithm)

      over_both = jax.vmap(jax.vmap(step, in_axes=(0, None, 0)), in_axes=(0, 0, None))
      learners[name], found = over_both(
        runs.learners[name], jnp.array(program.values), jax.random.split(key, num_seeds)
      )
      for k, value in enumerate(program.values):
        for metric in ("loss", "collapse/mean_cosine"):
          metrics[f"{metric}/{program.over}={value:g}"] = jnp.mean(found[metric][k])
    losses = [value for name, value in metrics.items() if name.startswith("loss/")]
    return Runs(learners, runs.step + 1), {"loss": jnp.mean(jnp.stack(losses)), **metrics}

  return training.Experiment(
    init=init,
    init_args=(placed,),
    update=update,
    batches=lambda: bandits.NoData(placed),
    headline="loss",
    maximise=False,
    evaluate=lambda runs: _evaluate(config, programs, runs),
    figures=lambda history, result: [
      graph_sweeps.accuracy_figure(config, result),
      graph_sweeps.cosine_figure(config, history),
    ],
  )


def _num_seeds(config: Any) -> int:
  num_seeds = config.sweep.num_seeds
  checks.count("config.sweep.num_seeds", num_seeds)
  return num_seeds


def _program(config: Any, over: str, values: tuple[float, ...]) -> _Program:
  method = presets.resolve(config.method)
  if method.paper not in _METHODS:
    raise ValueError(f"config.method={config.method!r}: give a preset of bgrl or grace")
  for name in ("algorithm", "network", "optimizer", "eval"):
    method[name].update(config[name])
  method.data.csbm.update(config.data)
  method.train.num_steps = config.train.num_steps
  if over == "num_negatives":
    method.algorithm.num_negatives = int(values[0])
  elif over == "signal":  # one half of it in the edges, the other in the features
    gamma = config.data.num_nodes / config.data.num_features
    method.data.csbm.edge_signal = math.sqrt(values[0] / 2)
    method.data.csbm.feature_signal = math.sqrt(values[0] / 2 * gamma)
  paper, module = _METHODS[method.paper]
  experiment = paper.build(method)
  update: Any = experiment.update
  networks = update.keywords["apply_fn"]
  if over == "predictor_norm" and values[0]:
    mlp = dataclasses.replace(networks.predictor.module, activation=_batch_normalised)
    networks = networks._replace(predictor=adapters.Predictor(mlp))
    update = functools.partial(update, apply_fn=networks)
  data = graph_runs.load(method)
  judge = node_classification.Evaluator(
    data, num_splits=method.eval.num_splits, split_seed=method.eval.split_seed
  )
  embed = jax.jit(functools.partial(module.embed, apply_fn=networks))
  return _Program(over, values, experiment, update, embed, judge, data.labels)


def _batch_normalised(hidden: jax.Array) -> jax.Array:
  """Normalises over the nodes, then PReLU as it starts."""
  centred = hidden - jnp.mean(hidden, axis=0)
  scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=0) + 1e-5)
  return jnp.where(scaled > 0, scaled, 0.25 * scaled)


def _evaluate(config: Any, programs: dict[str, _Program], runs: Runs) -> results.Result:
  """Judges every learner, and what needs no learner."""
  found: dict[str, dict[str, list]] = {}  # `[values, seeds]` lists of what is varied, by row
  for name, program in programs.items():
    rows = found.setdefault(program.over, {row: [] for row in graph_sweeps.ROWS})
    encoder = program.update.keywords["apply_fn"].encoder
    begin = jax.jit(lambda key, g, e=encoder: e(*e.init(key, g), g, train=True)[0])
    starts = [
      program.judge.score(begin(jax.random.key(config.seed + 1 + i), program.graph)).mean()
      for i in range(_num_seeds(config))
    ]
    fixed = [[score.mean()] * len(starts) for score in program.judge.baselines[""].values()]
    for k in range(len(program.values)):
      states = [
        jax.tree.map(lambda leaf, i=(k, i): leaf[i], runs.learners[name])
        for i in range(len(starts))
      ]
      embeddings = [np.asarray(program.embed(state, program.graph)) for state in states]
      scores = [program.judge.score(one).mean() for one in embeddings]
      directions = [_by_direction(one, program.labels) for one in embeddings]
      cosines = [float(collapse.mean_cosine(one)) for one in embeddings]
      for row, cell in zip(
        graph_sweeps.ROWS, (scores, starts, *fixed, directions, cosines), strict=True
      ):
        rows[row].append(cell)
  arrays = {
    f"{over}/{row}": np.array(cells) for over, rows in found.items() for row, cells in rows.items()
  }
  values = np.array(config.sweep.at, float)
  criteria = [
    check
    for over in found
    for check in graph_sweeps.CRITERIA[over](
      values, {row: arrays[f"{over}/{row}"] for row in graph_sweeps.ROWS}
    )
  ]
  tables = [
    results.Table(
      f"{graph_sweeps.AXES[over]}: means of seeds [least, largest]",
      [over, *graph_sweeps.ROWS],
      [
        [float(value), *(_cell(arrays[f"{over}/{row}"][k]) for row in graph_sweeps.ROWS)]
        for k, value in enumerate(values)
      ],
    )
    for over in found
  ]
  return results.Result(
    metrics={"criteria_passed": statistics.fraction_passed(criteria)} if criteria else {},
    tables=[
      *([results.checks_table("Expected before the run", criteria)] if criteria else []),
      *tables,
    ],
    arrays=arrays,
  )


def _cell(seeds: np.ndarray) -> results.Estimate:
  if np.ptp(seeds) == 0:
    return results.Estimate(float(seeds[0]))
  return results.Estimate(float(seeds.mean()), float(seeds.min()), float(seeds.max()))


def _by_direction(embeddings: np.ndarray, labels: np.ndarray) -> float:
  """Accuracy of two classes told by the sign of the main direction, whichever is called which."""
  rows = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
  left = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[0][:, 0]
  right = np.mean((left > 0) == labels)
  return float(max(right, 1 - right))
