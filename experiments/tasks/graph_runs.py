"""Code shared by methods that learn from one graph: data, encoder, optimiser, evaluation, figures.

A paper adds its initial state, its update and its embeddings (`build`). A step reads the whole
graph, or, with `data.fan_outs`, a sample around `data.batch_size` central nodes. The evaluation
always embeds the whole graph. Where the data set has several graphs, those with test nodes are left
out of training.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import sharding
from experiments.data import batching, csbm
from experiments.data import graphs as graph_data
from experiments.loop import memory, training
from experiments.report import plots, results
from experiments.tasks import bandits, node_classification, optimizers
from representation import collapse, graphs, neighbour_sampling
from representation.networks import adapters, gcn
from sharding import checks

ENCODERS = ("gcn", "mean_pooling", "gat")


def build(
  config: Any,
  *,
  encoder: adapters.Encoder,
  init: Callable[..., Any],
  update: Callable[..., Any],
  embed: Callable[..., jax.Array],
) -> training.Experiment:
  """Returns the experiment of one method on the graph of a config.

  Args:
    config: has the sections of `experiments.configs.base.graph`.
    encoder: also evaluated untrained, as a baseline.
    init: `init(key, graph) -> State`.
    update: `update(state, graph, key) -> (State, Metrics)`.
    embed: `embed(state, graph) -> [N, K]`, the embeddings that are evaluated.
  """
  data = load(config)
  trained_on = graph_data.without_test_graphs(data)
  sampler = make_sampler(config, trained_on)
  check_memory(config, data, trained_on, sampler)
  memory.reset_peak()
  graph = place(config, data)
  batches: Callable[..., Any]
  if sampler is not None:
    rows = np.arange(trained_on.labels.shape[0])
    batches = functools.partial(
      batching.batches, rows, batch_size=sampler.batch_size, seed=config.seed, make=sampler
    )
    first = sampler(rows[: sampler.batch_size], np.random.default_rng(0))
    mesh = training.make_mesh(config.sharding.mesh)
    example = sharding.shard_batch(first, mesh, whole=True)
  else:
    example = graph if trained_on is data else place(config, trained_on)
    batches = functools.partial(bandits.NoData, example)
  evaluator = node_classification.Evaluator(
    data,
    num_splits=config.eval.num_splits,
    split_seed=config.eval.split_seed,
    protocol=config.eval.get("protocol", ""),
  )
  embed = jax.jit(embed)

  @jax.jit
  def untrained(graph):
    # Batch statistics, because the running ones are still at their initial values.
    params, state = encoder.init(jax.random.key(config.seed + 1), graph)
    return encoder(params, state, graph, train=True)[0]

  def evaluate(state):
    size = len(data.labels)
    embeddings = embed(state, graph)[:size]
    return evaluator.result(
      np.asarray(embeddings),
      np.asarray(untrained(graph))[:size],
      lambda: {
        "effective_rank": float(collapse.effective_rank(embeddings)),
        "mean_cosine": float(collapse.mean_cosine(embeddings)),
        **({"peak_memory_gib": used / memory.GIBIBYTE} if (used := memory.peak()) else {}),
      },
    )

  return training.Experiment(
    init=init,
    init_args=(example,),
    update=update,
    batches=batches,
    headline="loss",
    maximise=False,
    evaluate=evaluate,
    figures=lambda history, result: [
      _collapse_figure(history),
      node_classification.embedding_map(result),
    ],
  )


def load(config: Any) -> graph_data.Graph:
  """Generates the data set of a config or reads it from files."""
  section = config.data
  if section.name == "csbm":
    return csbm.sample(**section.csbm)
  if section.name == "csbm_several":
    return csbm.sample_several(**section.csbm)
  return graph_data.load(
    section.name,
    directory=section.directory,
    edges=section.edges,
    binarise=section.binarise,
    features=section.features,
  )


def place(config: Any, data: graph_data.Graph) -> graphs.Graph:
  """Places the graph on the mesh of the config, with nodes and edges split over the devices."""
  features = data.features
  if hasattr(features, "toarray") and not _is_sparse(features):
    features = features.toarray()
  mesh = training.make_mesh(config.sharding.mesh)
  graph = graphs.make_graph(
    features,
    data.senders,
    data.receivers,
    graph_ids=data.graph_ids,
    multiple=sharding.num_shards(mesh),
  )
  return sharding.shard_batch(graph, mesh, whole=True)


def make_sampler(config: Any, data: graph_data.Graph) -> neighbour_sampling.Sampler | None:
  """Returns the sampler of a step's nodes, or None where a step reads the whole graph."""
  fan_outs = tuple(config.data.get("fan_outs", ()))
  if not fan_outs:
    return None
  return neighbour_sampling.Sampler(
    data.features,
    data.senders,
    data.receivers,
    fan_outs=fan_outs,
    batch_size=config.data.batch_size,
    num_blocks=sharding.num_shards(training.make_mesh(config.sharding.mesh)),
  )


# Activations that a step holds at its peak, per node and in layer widths, as compiled for a CPU.
_COPIES = {"gcn": 12, "mean_pooling": 14, "gat": 9}
_HEAD_COPIES, _EDGE_COPIES = 6, 20


def step_bytes(
  config: Any, num_nodes: int, num_edges: int, num_features: int, num_entries: int | None = None
) -> int:
  """Estimates the memory of one step of BGRL, in bytes, before anything is laid out or compiled.

  For the encoders of this project it is within a quarter of what the compiler plans. That is close
  enough to tell a graph that fits from one that does not.

  Args:
    config: config of the run.
    num_nodes: number of nodes that a step reads.
    num_edges: number of directed edges that a step reads.
    num_features: number of columns of the features.
    num_entries: number of stored entries of sparse features; None where they are dense.
  """
  section = config.network
  widths, per_edge = list(section.widths), 21  # bytes of an edge in both layouts
  if section.encoder == "mean_pooling":
    widths = widths[-1:] * 3
  elif section.encoder == "gat":
    heads = gcn.GAT.num_heads
    widths = [count * widths[-1] for count in heads]
    per_edge += 4 * _EDGE_COPIES * sum(heads)
  head = section.predictor_width + section.widths[-1]
  floats = _COPIES[section.encoder] * sum(widths) + _HEAD_COPIES * head
  entries = num_nodes * num_features * 4 if num_entries is None else num_entries * (per_edge + 4)
  parameters = 8 * 4 * num_features * widths[0]  # two encoders, moments, gradients
  return 4 * floats * num_nodes + per_edge * num_edges + entries + parameters


def check_memory(
  config: Any,
  data: graph_data.Graph,
  trained_on: graph_data.Graph,
  sampler: neighbour_sampling.Sampler | None,
) -> None:
  """Raises `ValueError` if a step, or embedding the whole graph, will not fit into memory.

  Where there is room for several steps, malloc is told to keep the memory that a step frees.
  """
  free = memory.available(training.make_mesh(config.sharding.mesh).devices.flat)
  if free is None:
    return
  num_features = data.features.shape[1]
  whole = _stored(data.features) + 21 * len(data.senders)
  whole += 4 * 4 * len(data.labels) * max(config.network.widths)  # activations, without gradients
  if sampler is None:
    shape = len(trained_on.labels), len(trained_on.senders)
    entries = trained_on.features.nnz if _is_sparse(trained_on.features) else None
    step = step_bytes(config, *shape, num_features, entries)
    remedy = (
      "sample neighbours, as the preset bgrl:ogbn_arxiv does with data.fan_outs and "
      "data.batch_size, narrow network.widths, or spread nodes over more devices "
      "(sharding.mesh.data)"
    )
  else:
    size = sampler.num_nodes * sampler.num_blocks
    step = step_bytes(config, size, size, num_features)
    remedy = (
      f"lower data.batch_size={sampler.batch_size} or data.fan_outs={sampler.fan_outs}, which give "
      f"{size} nodes per step, or use more devices (sharding.mesh.data)"
    )
  needed = max(step, whole)
  if needed > free:
    raise ValueError(
      f"{data.name}: {len(data.labels)} nodes, {len(data.senders)} edges and {num_features} "
      f"features need about {needed / memory.GIBIBYTE:.3g} GiB per step, and "
      f"{free / memory.GIBIBYTE:.3g} GiB are free: {remedy}"
    )
  if 4 * needed < free:
    memory.keep_freed(all_of_it=True)


def _is_sparse(features: Any) -> bool:
  """Whether features stay sparse: above a density of about 1/20 a dense product is faster."""
  return hasattr(features, "toarray") and features.nnz <= np.prod(features.shape) / 20


def _stored(features: Any) -> int:
  """Returns the bytes that the features take on the device."""
  return 25 * features.nnz if _is_sparse(features) else 4 * int(np.prod(features.shape))


def make_encoder(config: Any) -> adapters.Encoder:
  """Returns the encoder of a config. Its embeddings have the width `network.widths[-1]`."""
  section = config.network
  checks.choice("config.network.encoder", section.encoder, ENCODERS)
  widths = tuple(section.widths)
  if section.encoder == "gcn":
    return adapters.Encoder(
      gcn.GCN(widths, section.norm, section.batch_norm_decay, section.standardise_weights)
    )
  if section.encoder == "mean_pooling":
    return adapters.Encoder(gcn.MeanPooling(widths[-1]))
  return adapters.Encoder(gcn.GAT(width=widths[-1]))


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """Returns AdamW with a linear warm-up and a cosine decay to 0."""
  section, num_steps = config.optimizer, config.train.num_steps
  warmup = min(section.warmup_steps, num_steps - 1)
  return optimizers.adamw(section, optimizers.schedule(section, num_steps, warmup_steps=warmup))


def _collapse_figure(history: Any) -> results.Figure:
  """Draws the three traces in which a collapse would show."""
  figure, axes = plots.subplots(1, 3)
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
    axis.plot(steps, [row[name] for row in history], label=label)
    axis.set(xlabel="step", ylabel=label)
    axis.set_ylim(bottom=0)
  norms = [row["collapse/mean_norm"] for row in history]
  axes[0][1].plot(steps, norms, linestyle=":", color="0.5", label="mean length of embeddings")
  axes[0][1].legend(fontsize=8)
  caption = (
    "The panels show whether embeddings collapse. After a collapse the spread is much smaller "
    "than the mean length, the mean cosine is near 1, and the loss of BGRL is near 0."
  )
  return results.Figure("collapse", caption, figure)
