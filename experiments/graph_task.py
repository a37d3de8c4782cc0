"""What methods that learn from one graph share: its data, encoder, optimiser, judge and figures.

A paper adds how its state begins, its update and its embeddings (`build`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import sharding
from experiments import bandit, node_classification, report, training
from experiments.data import csbm
from experiments.data import graphs as graph_data
from representation import collapse, graphs
from representation.networks import gcn

ENCODERS = ("gcn", "mean_pooling", "gat")


def build(
  config: Any,
  *,
  encoder: gcn.Encoder,
  init: Callable[..., Any],
  update: Callable[..., Any],
  embed: Callable[..., jax.Array],
) -> training.Experiment:
  """Returns the experiment of one method on the graph of a config.

  Args:
    config: with the sections of `experiments.configs.base.graph`.
    encoder: judged before training as it is after it.
    init: `init(key, graph) -> State`.
    update: `update(state, graph, key) -> (State, Metrics)`.
    embed: `embed(state, graph) -> [N, K]`, what is judged.
  """
  data = load(config)
  graph = place(config, data)
  judge = node_classification.Judge(
    data, num_splits=config.eval.num_splits, split_seed=config.eval.split_seed
  )
  embed = jax.jit(embed)

  @jax.jit
  def untrained(graph):
    # With the statistics of the graph: its running ones are those of nothing yet.
    params, state = encoder.init(jax.random.key(config.seed + 1), graph)
    return encoder(params, state, graph, train=True)[0]

  def evaluate(state):
    size = len(data.labels)
    embeddings = embed(state, graph)[:size]
    return judge.result(
      np.asarray(embeddings),
      np.asarray(untrained(graph))[:size],
      lambda: {
        "effective_rank": float(collapse.effective_rank(embeddings)),
        "mean_cosine": float(collapse.mean_cosine(embeddings)),
      },
    )

  return training.Experiment(
    init=init,
    init_args=(graph,),
    update=update,
    batches=functools.partial(bandit.NoData, graph),
    headline="loss",
    maximise=False,
    evaluate=evaluate,
    figures=lambda history, result: [
      _traces(history),
      node_classification.embedding_map(result),
    ],
  )


def load(config: Any) -> graph_data.Graph:
  """Returns the data set of a config, generated or from files."""
  section = config.data
  if section.name == "csbm":
    return csbm.sample(**section.csbm)
  return graph_data.load(
    section.name,
    directory=section.directory,
    edges=section.edges,
    binarise=section.binarise,
  )


def place(config: Any, data: graph_data.Graph) -> graphs.Graph:
  """Returns the graph on the mesh of the config, nodes and rows of edges split over it."""
  features = data.features
  if hasattr(features, "toarray") and features.nnz > features.shape[0] * features.shape[1] / 20:
    features = features.toarray()  # a dense product is faster from about there
  mesh = training.make_mesh(config.sharding.mesh)
  graph = graphs.make_graph(
    features, data.senders, data.receivers, graph_ids=data.graph_ids, multiple=mesh.size
  )
  return sharding.shard_batch(graph, mesh)


def make_encoder(config: Any) -> gcn.Encoder:
  """Returns the encoder of a config; its embeddings are as wide as the last of `network.widths`."""
  section = config.network
  if section.encoder not in ENCODERS:
    listed = ", ".join(map(repr, ENCODERS))
    raise ValueError(f"config.network.encoder={section.encoder!r}: give one of {listed}")
  widths = tuple(section.widths)
  if section.encoder == "gcn":
    return gcn.Encoder(
      gcn.GCN(widths, section.norm, section.batch_norm_decay, section.standardise_weights)
    )
  if section.encoder == "mean_pooling":
    return gcn.Encoder(gcn.MeanPooling(widths[-1]))
  return gcn.Encoder(gcn.GAT(width=widths[-1]))


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """Returns AdamW with a linear warm-up from 0 and a cosine to 0."""
  section, num_steps = config.optimizer, config.train.num_steps
  warmup = min(section.warmup_steps, num_steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, section.learning_rate, warmup, num_steps)
  return optax.adamw(schedule, weight_decay=section.weight_decay)


def _traces(history: Any) -> report.Figure:
  """Draws what collapse would show in."""
  figure, axes = report.subplots(1, 3)
  steps = [row["step"] for row in history]
  for axis, (name, label) in zip(
    axes[0],
    (
      ("loss", "loss"),
      ("collapse/spread", "spread of embeddings"),
      ("collapse/mean_cosine", "mean cosine, not centred"),
    ),
    strict=True,
  ):
    axis.plot(steps, [row[name] for row in history])
    axis.set(xlabel="step", ylabel=label)
    axis.set_ylim(bottom=0)
  norms = [row["collapse/mean_norm"] for row in history]
  axes[0][1].plot(steps, norms, linestyle=":", color="0.5", label="mean length")
  axes[0][1].legend(fontsize=8)
  caption = (
    "The loss stays above 0, the spread of the order of the length: no collapse. After a collapse "
    "the mean cosine is near 1."
  )
  return report.Figure("collapse", caption, figure)
