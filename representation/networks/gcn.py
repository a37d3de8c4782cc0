"""Encoders of graphs (GCN, mean-pooling GraphSAGE, GAT) and the head of BGRL and GRACE.

All take a `graphs.Graph` whose edges have no loops; the layers that need one add it. Encoders
normalise and activate after the last layer too. `Encoder` and `Predictor` wrap a module into the
pure functions that `bgrl` and `baselines.grace` take.

References: Kipf and Welling 2017 (arXiv:1609.02907), Hamilton et al. 2017 (arXiv:1706.02216),
Velickovic et al. 2018 (arXiv:1710.10903), with the sizes of https://arxiv.org/abs/2102.06514.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from representation import graphs, message_passing

# What PyTorch gives linear layers, and the authors' predictor with them.
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _prelu() -> nn.Module:
  return nn.PReLU(negative_slope_init=0.25)


class GCNLayer(nn.Module):
  """D^-1/2 (A + I) D^-1/2 H W + b, with the in-degrees D of the edges in use and the loop.

  In a sample of a graph A is scaled to it and D are degrees in the whole graph (`in_degrees`).

  Attributes:
    width: of what comes out.
    standardise: whether each output's incoming weights are brought to mean 0 and variance 1.
  """

  width: int
  standardise: bool = False

  @nn.compact
  def __call__(self, graph: graphs.Graph, hidden: jax.Array | None = None) -> jax.Array:
    """Returns `[N, width]` from `hidden` `[N, D]`, by default the graph's features."""
    width_in = (graph.features if hidden is None else hidden).shape[1]
    glorot = nn.initializers.glorot_uniform()

    def start(*args):  # standardised, so that a step changes the weights as much as the authors'
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
  """Returns `[D, W]` with each column of mean 0 and (unbiased) variance 1; no gradient through it.

  The authors' code overwrites the weights before each pass, so the gradient is that of the
  overwritten ones; here they start standardised and are kept as the optimiser leaves them.
  """
  fixed = jax.lax.stop_gradient(kernel)
  mean = jnp.mean(fixed, axis=0)
  scale = jax.lax.rsqrt(jnp.var(fixed, axis=0, ddof=1) + epsilon)
  return kernel + ((fixed - mean) * scale - fixed)


class GraphNorm(nn.Module):
  """Layer normalisation over all nodes and channels of each graph, then a scale for each channel.

  This is what the authors' code calls LayerNorm. (x - mean) / (std + eps).
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, graph: graphs.Graph, hidden: jax.Array) -> jax.Array:
    num_nodes, width = hidden.shape
    scale = self.param("scale", nn.initializers.ones, (width,))
    bias = self.param("bias", nn.initializers.zeros, (width,))

    def mean(rows: jax.Array) -> jax.Array:  # over the nodes and channels of each node's graph
      sums = jnp.where(graph.mask, jnp.mean(rows, axis=1), 0)
      counts = graph.mask.astype(hidden.dtype)
      num_blocks = graph.neighbours.num_blocks
      if num_blocks > 1:  # each a graph of its own
        total, count = (jnp.sum(x.reshape(num_blocks, -1), axis=1) for x in (sums, counts))
        means = (total / jnp.maximum(count, 1))[:, None]
        return jnp.broadcast_to(means, (num_blocks, num_nodes // num_blocks)).reshape(-1, 1)
      total, count = (jax.ops.segment_sum(x, graph.graph_ids, num_nodes) for x in (sums, counts))
      return (total / jnp.maximum(count, 1))[graph.graph_ids][:, None]

    centred = hidden - mean(hidden)
    # The square root of an exact 0 (a graph of equal features) would have no gradient.
    std = jnp.sqrt(jnp.maximum(mean(centred**2), 1e-12))
    return centred / (std + self.epsilon) * scale + bias


class GCN(nn.Module):
  """[GCN, norm, PReLU] for each width.

  Attributes:
    widths: of the layers.
    norm: "batch" (over the nodes in use) or "graph" (`GraphNorm`).
    batch_norm_decay: share of the old running statistics that a training pass keeps. The authors'
      code keeps 0.01, so that they are those of the last corrupted graph; the paper speaks of 0.99.
    standardise: whether all but the first layer standardise their weights.
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
      hidden = _prelu()(hidden)
    return hidden


class MeanPooling(nn.Module):
  """Three GraphSAGE layers of mean aggregation with skips from the input: the encoder of PPI.

  Attributes:
    width: of every layer.
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
      out = nn.Dense(self.width, kernel_init=_UNIFORM)(mean)
      out = out + nn.Dense(self.width, kernel_init=_UNIFORM, use_bias=False)(hidden)
      return _prelu()(GraphNorm()(graph, out))

    def skip() -> jax.Array:
      return nn.Dense(self.width, kernel_init=_UNIFORM, use_bias=False)(features)

    first = layer(features)
    second = layer(first + skip())
    return layer(first + second + skip())


class GATLayer(nn.Module):
  """Attention over a node's neighbours and itself, for each head.

  Attributes:
    num_heads: heads.
    width: of each head.
    average: whether heads are averaged, not concatenated.
  """

  num_heads: int
  width: int
  average: bool = False

  @nn.compact
  def __call__(self, graph: graphs.Graph, hidden: jax.Array) -> jax.Array:
    """Returns `[N, num_heads * width]`, or `[N, width]` where heads are averaged."""
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
    # The largest logit of each receiver, its own among them, so that nothing overflows.
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
  """Three attention layers with skips and ELU, the last of averaged heads.

  Attributes:
    num_heads: of each layer.
    width: of each head.
  """

  num_heads: Sequence[int] = (4, 4, 6)
  width: int = 256

  @nn.compact
  def __call__(self, graph: graphs.Graph, *, train: bool) -> jax.Array:
    del train
    hidden = graphs.masked_features(graph)
    for index, heads in enumerate(self.num_heads):
      out = GATLayer(heads, self.width, average=index == len(self.num_heads) - 1)(graph, hidden)
      hidden = nn.elu(out + nn.Dense(out.shape[-1], kernel_init=_UNIFORM)(hidden))
    return hidden


class MLP(nn.Module):
  """Linear, PReLU, linear, without normalisation: with BatchNorm in it BGRL can collapse.

  Attributes:
    hidden: width inside.
    width: of what comes out.
    activation: in place of PReLU, such as `jax.nn.elu` for the projector of GRACE.
  """

  hidden: int
  width: int
  activation: Callable[[jax.Array], jax.Array] | None = None

  @nn.compact
  def __call__(self, embeddings: jax.Array) -> jax.Array:
    def linear(rows: jax.Array, width: int) -> jax.Array:
      def bias(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) / rows.shape[-1] ** 0.5

      return nn.Dense(width, kernel_init=_UNIFORM, bias_init=bias)(rows)

    hidden = (self.activation or _prelu())(linear(embeddings, self.hidden))
    return linear(hidden, self.width)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A module as `encoder(params, network_state, graph, *, train) -> (embeddings, network_state)`.

  Attributes:
    module: of this file, or any that takes `(graph, *, train)`; it hashes, so this does.
  """

  module: nn.Module

  def __call__(
    self, params: Any, network_state: Any, graph: graphs.Graph, *, train: bool
  ) -> tuple[Any, Any]:
    variables = {"params": params, **dict(network_state)}  # `()` or `{}` where there is none
    if not (train and network_state):
      return self.module.apply(variables, graph, train=train), network_state
    out, new_state = self.module.apply(variables, graph, train=True, mutable=list(network_state))
    return out, new_state

  def init(self, key: jax.Array, graph: graphs.Graph) -> tuple[Any, Any]:
    """Returns parameters and network state."""
    variables = self.module.init(key, graph, train=False)
    return variables.pop("params"), variables


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A module as `predictor(params, embeddings) -> predictions`."""

  module: nn.Module

  def __call__(self, params: Any, embeddings: jax.Array) -> Any:
    return self.module.apply({"params": params}, embeddings)

  def init(self, key: jax.Array, embeddings: Any) -> Any:
    """Returns parameters."""
    return self.module.init(key, embeddings)["params"]
