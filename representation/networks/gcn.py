"""Encoders of graphs: GCN, GraphSAGE with mean aggregation, and GAT.

All of them take a `graphs.Graph` without self-loops; layers that need self-loops add them.
Normalisation and activation follow the last layer too. `adapters.Encoder` turns a module into the
pure function that `bgrl` and `baselines.grace` take.

References: Kipf and Welling 2017 (arXiv:1609.02907), Hamilton et al. 2017 (arXiv:1706.02216),
Velickovic et al. 2018 (arXiv:1710.10903). The sizes are those of BGRL (arXiv:2102.06514).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from representation import graphs, message_passing
from representation.networks import mlp


class GCNLayer(nn.Module):
  """A graph convolution, D^-1/2 (A + I) D^-1/2 H W + b.

  A has the edges in use, and D holds their in-degrees plus 1 for the self-loop. In a sample of a
  graph, both are estimates of those of the whole graph (`graphs.edge_weights`,
  `graphs.in_degrees`).

  Attributes:
    width: size of the output.
    standardise: whether the incoming weights of each output get mean 0 and variance 1.
  """

  width: int
  standardise: bool = False

  @nn.compact
  def __call__(self, graph: graphs.Graph, hidden: jax.Array | None = None) -> jax.Array:
    """Returns `[N, width]` from `hidden` `[N, D]`; the default is the features of the graph."""
    width_in = (graph.features if hidden is None else hidden).shape[1]
    glorot = nn.initializers.glorot_uniform()

    # Start standardised, so that a step changes the weights as much as in the authors' code.
    def start(*args):
      return standardise_weights(glorot(*args)) if self.standardise else glorot(*args)

    kernel = self.param("kernel", start, (width_in, self.width))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    if self.standardise:
      kernel = standardise_weights(kernel)
    weights = graphs.edge_weights(graph)
    scale = jax.lax.rsqrt(1 + graphs.in_degrees(graph, weights))[:, None]
    sent = scale * (graphs.linear(graph, kernel) if hidden is None else hidden @ kernel)
    return scale * (message_passing.neighbour_sum(sent, graph.neighbours, weights) + sent) + bias


def standardise_weights(kernel: jax.Array, epsilon: float = 1e-5) -> jax.Array:
  """Returns `[D, W]` with each column at mean 0 and unbiased variance 1.

  The gradient passes through unchanged. The authors' code overwrites the stored weights before each
  pass, so its gradient is that of the standardised weights. Here the stored weights start
  standardised and then stay as the optimiser leaves them.
  """
  fixed = jax.lax.stop_gradient(kernel)
  mean = jnp.mean(fixed, axis=0)
  scale = jax.lax.rsqrt(jnp.var(fixed, axis=0, ddof=1) + epsilon)
  return kernel + ((fixed - mean) * scale - fixed)


class GraphNorm(nn.Module):
  """Normalisation over all nodes and channels of a graph, with a scale and bias for each channel.

  The authors' code calls it LayerNorm. It is (x - mean) / (std + epsilon).
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, graph: graphs.Graph, hidden: jax.Array) -> jax.Array:
    num_nodes, width = hidden.shape
    scale = self.param("scale", nn.initializers.ones, (width,))
    bias = self.param("bias", nn.initializers.zeros, (width,))

    def mean(rows: jax.Array) -> jax.Array:
      """Returns for each node the mean over the nodes and channels of its graph, `[N, 1]`."""
      sums = jnp.where(graph.mask, jnp.mean(rows, axis=1), 0)
      counts = graph.mask.astype(hidden.dtype)
      num_blocks = graph.neighbours.num_blocks
      if num_blocks > 1:  # each block is a graph
        total, count = (jnp.sum(x.reshape(num_blocks, -1), axis=1) for x in (sums, counts))
        means = (total / jnp.maximum(count, 1))[:, None]
        return jnp.broadcast_to(means, (num_blocks, num_nodes // num_blocks)).reshape(-1, 1)
      total, count = (jax.ops.segment_sum(x, graph.graph_ids, num_nodes) for x in (sums, counts))
      return (total / jnp.maximum(count, 1))[graph.graph_ids][:, None]

    centred = hidden - mean(hidden)
    # The gradient of a square root is infinite at 0, which happens where all features are equal.
    std = jnp.sqrt(jnp.maximum(mean(centred**2), 1e-12))
    return centred / (std + self.epsilon) * scale + bias


class GCN(nn.Module):
  """Graph convolution, normalisation and PReLU, once for each width.

  Attributes:
    widths: output sizes of the layers.
    norm: "batch" (batch normalisation over the nodes of `Graph.mask`) or "graph" (`GraphNorm`).
    batch_norm_decay: share of the old running statistics that is kept in a training pass. The
      authors' code keeps 0.01, so the statistics are those of the last view; the paper says 0.99.
    standardise: whether all layers but the first standardise their weights.
  """

  widths: Sequence[int]
  norm: str = "batch"
  batch_norm_decay: float = 0.01
  standardise: bool = False

  @nn.compact
  def __call__(self, graph: graphs.Graph, *, train: bool) -> jax.Array:
    if self.norm not in ("batch", "graph"):
      raise ValueError(f"norm must be 'batch' or 'graph', got {self.norm!r}")
    hidden: Any = None
    for index, width in enumerate(self.widths):
      hidden = GCNLayer(width, standardise=self.standardise and index > 0)(graph, hidden)
      if self.norm == "batch":
        hidden = nn.BatchNorm(momentum=self.batch_norm_decay, use_running_average=not train)(
          hidden, mask=graph.mask[:, None]
        )
      else:
        hidden = GraphNorm()(graph, hidden)
      hidden = mlp.prelu()(hidden)
    return hidden


class MeanPooling(nn.Module):
  """Three GraphSAGE layers with mean aggregation and skip connections from the input, for PPI.

  Attributes:
    width: output size of each layer.
  """

  width: int = 512

  @nn.compact
  def __call__(self, graph: graphs.Graph, *, train: bool) -> jax.Array:
    del train
    mask = graphs.edge_weights(graph)
    count = jnp.maximum(message_passing.degrees(graph.neighbours, mask), 1)[:, None]
    features = graphs.masked_features(graph)

    def layer(hidden: jax.Array) -> jax.Array:
      mean = message_passing.neighbour_sum(hidden, graph.neighbours, mask) / count
      out = nn.Dense(self.width, kernel_init=mlp.UNIFORM)(mean)
      out = out + nn.Dense(self.width, kernel_init=mlp.UNIFORM, use_bias=False)(hidden)
      return mlp.prelu()(GraphNorm()(graph, out))

    def skip() -> jax.Array:
      return nn.Dense(self.width, kernel_init=mlp.UNIFORM, use_bias=False)(features)

    first = layer(features)
    second = layer(first + skip())
    return layer(first + second + skip())


class GATLayer(nn.Module):
  """Attention of each node over its neighbours and itself, with several heads.

  Attributes:
    num_heads: number of heads.
    width: output size of each head.
    average: whether the heads are averaged; otherwise they are concatenated.
  """

  num_heads: int
  width: int
  average: bool = False

  @nn.compact
  def __call__(self, graph: graphs.Graph, hidden: jax.Array) -> jax.Array:
    """Returns `[N, num_heads * width]`, or `[N, width]` if heads are averaged."""
    neighbours = graph.neighbours
    heads, width = self.num_heads, self.width
    sent = nn.Dense(heads * width, use_bias=False, kernel_init=nn.initializers.glorot_uniform())(
      hidden
    ).reshape(-1, heads, width)
    weigh = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=1, out_axis=0)
    of_sender = jnp.sum(sent * self.param("sender", weigh, (heads, width)), axis=-1)
    of_receiver = jnp.sum(sent * self.param("receiver", weigh, (heads, width)), axis=-1)
    edge_logits = nn.leaky_relu(  # [R, K, heads]
      of_sender[neighbours.senders] + of_receiver[neighbours.receivers][:, None], 0.2
    )
    weights = graphs.edge_weights(graph)[..., None]
    edge_logits = jnp.where(weights > 0, edge_logits, -jnp.inf)
    own_logits = nn.leaky_relu(of_sender + of_receiver, 0.2)
    # The largest logit of each receiver, its own included, is subtracted to avoid overflow.
    top = jnp.maximum(
      jax.ops.segment_max(
        jnp.max(edge_logits, axis=1),
        neighbours.receivers,
        neighbours.num_receivers,
        indices_are_sorted=True,
      ),
      own_logits,
    )
    top = jax.lax.stop_gradient(top)
    edge_weights = weights * jnp.exp(edge_logits - top[neighbours.receivers][:, None])
    own_weights = jnp.exp(own_logits - top)
    total = message_passing.degrees(neighbours, edge_weights) + own_weights
    out = message_passing.neighbour_sum(sent, neighbours, edge_weights)
    out = (out + own_weights[..., None] * sent) / total[..., None]
    out = jnp.mean(out, axis=1) if self.average else out.reshape(len(out), -1)
    return out + self.param("bias", nn.initializers.zeros, (out.shape[-1],))


class GAT(nn.Module):
  """Attention layers with skip connections and ELU; the heads of the last layer are averaged.

  Attributes:
    num_heads: number of heads of each layer.
    width: output size of each head.
  """

  num_heads: Sequence[int] = (4, 4, 6)
  width: int = 256

  @nn.compact
  def __call__(self, graph: graphs.Graph, *, train: bool) -> jax.Array:
    del train
    hidden = graphs.masked_features(graph)
    for index, heads in enumerate(self.num_heads):
      out = GATLayer(heads, self.width, average=index == len(self.num_heads) - 1)(graph, hidden)
      hidden = nn.elu(out + nn.Dense(out.shape[-1], kernel_init=mlp.UNIFORM)(hidden))
    return hidden
