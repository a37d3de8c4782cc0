"""What methods that learn from one graph share: its data, encoder, optimiser, judge and figures.

A paper adds how its state begins, its update and its embeddings (`build`). A step reads the whole
graph, or with `data.fan_outs` a sample around `data.batch_size` central nodes; what is judged are
embeddings of the whole graph. Of several graphs those with test nodes are not trained on.
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
from experiments.tasks import bandits, node_classification
from representation import collapse, graphs, neighbour_sampling
from representation.networks import adapters, gcn

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
    config: with the sections of `experiments.configs.base.graph`.
    encoder: judged before training as it is after it.
    init: `init(key, graph) -> State`.
    update: `update(state, graph, key) -> (State, Metrics)`.
    embed: `embed(state, graph) -> [N, K]`, what is judged.
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
    example = sharding.shard_batch(first, training.make_mesh(config.sharding.mesh))
  else:
    example = graph if trained_on is data else place(config, trained_on)
    batches = functools.partial(bandits.NoData, example)
  judge = node_classification.Evaluator(
    data,
    num_splits=config.eval.num_splits,
    split_seed=config.eval.split_seed,
    protocol=config.eval.get("protocol", ""),
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
      _traces(history),
      node_classification.embedding_map(result),
    ],
  )


def load(config: Any) -> graph_data.Graph:
  """Returns the data set of a config, generated or from files."""
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
  )


def place(config: Any, data: graph_data.Graph) -> graphs.Graph:
  """Returns the graph on the mesh of the config, nodes and rows of edges split over it."""
  features = data.features
  if hasattr(features, "toarray") and not _is_sparse(features):
    features = features.toarray()
  mesh = training.make_mesh(config.sharding.mesh)
  graph = graphs.make_graph(
    features, data.senders, data.receivers, graph_ids=data.graph_ids, multiple=mesh.size
  )
  return sharding.shard_batch(graph, mesh)


def make_sampler(config: Any, data: graph_data.Graph) -> neighbour_sampling.Sampler | None:
  """Returns what draws the sample of each step, or None where a step reads the whole graph."""
  fan_outs = tuple(config.data.get("fan_outs", ()))
  if not fan_outs:
    return None
  return neighbour_sampling.Sampler(
    data.features,
    data.senders,
    data.receivers,
    fan_outs=fan_outs,
    batch_size=config.data.batch_size,
    num_blocks=training.make_mesh(config.sharding.mesh).size,
  )


# Activations that a step holds at its peak, in widths of a layer a node, as compiled for a CPU.
_COPIES = {"gcn": 12, "mean_pooling": 14, "gat": 9}
_HEAD_COPIES, _EDGE_COPIES = 6, 20


def step_bytes(
  config: Any, num_nodes: int, num_edges: int, num_features: int, num_entries: int | None = None
) -> int:
  """Estimates the memory of one step of BGRL, in bytes, before anything is laid out or compiled.

  Within a quarter of what the compiler plans, for the encoders of this project; what is compared is
  sizes that differ by more.

  Args:
    config: of the run.
    num_nodes: of what a step reads.
    num_edges: directed.
    num_features: columns.
    num_entries: features that are stored; None for all.
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

  Where it fits several times, malloc keeps what steps free.
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
      f"lower data.batch_size={sampler.batch_size} or data.fan_outs={sampler.fan_outs}, which make "
      f"{size} nodes a step, or use more devices (sharding.mesh.data)"
    )
  needed = max(step, whole)
  if needed > free:
    raise ValueError(
      f"{data.name}: {len(data.labels)} nodes, {len(data.senders)} edges and {num_features} "
      f"features need about {needed / memory.GIBIBYTE:.3g} GiB a step, and "
      f"{free / memory.GIBIBYTE:.3g} GiB are free: {remedy}"
    )
  if 4 * needed < free:
    memory.keep_freed(all_of_it=True)


def _is_sparse(features: Any) -> bool:
  """Whether features stay sparse: a dense product is faster from about a twentieth."""
  return hasattr(features, "toarray") and features.nnz <= np.prod(features.shape) / 20


def _stored(features: Any) -> int:
  """Bytes of the features on the device."""
  return 25 * features.nnz if _is_sparse(features) else 4 * int(np.prod(features.shape))


def make_encoder(config: Any) -> adapters.Encoder:
  """Returns the encoder of a config; its embeddings are as wide as the last of `network.widths`."""
  section = config.network
  if section.encoder not in ENCODERS:
    listed = ", ".join(map(repr, ENCODERS))
    raise ValueError(f"config.network.encoder={section.encoder!r}: give one of {listed}")
  widths = tuple(section.widths)
  if section.encoder == "gcn":
    return adapters.Encoder(
      gcn.GCN(widths, section.norm, section.batch_norm_decay, section.standardise_weights)
    )
  if section.encoder == "mean_pooling":
    return adapters.Encoder(gcn.MeanPooling(widths[-1]))
  return adapters.Encoder(gcn.GAT(width=widths[-1]))


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """Returns AdamW with a linear warm-up from 0 and a cosine to 0."""
  section, num_steps = config.optimizer, config.train.num_steps
  warmup = min(section.warmup_steps, num_steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, section.learning_rate, warmup, num_steps)
  return optax.adamw(schedule, weight_decay=section.weight_decay)


def _traces(history: Any) -> results.Figure:
  """Draws what collapse would show in."""
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
  return results.Figure("collapse", caption, figure)
