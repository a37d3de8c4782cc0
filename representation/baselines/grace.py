"""GRACE: contrastive learning of node embeddings across two views of a graph.

Two views of a graph are made by dropping edges and masking features at random. One encoder reads
both, and a projector maps the embeddings into the space where they are compared. The two
projections of a node are a positive pair. All other nodes, in both views, are its negatives:

  l(u_i, v_i) = -log(e^{s(u_i, v_i)} / (sum_j e^{s(u_i, v_j)} + sum_{j != i} e^{s(u_i, u_j)})),

with s(a, b) = cos(a, b) / temperature. The loss is the mean over nodes of (l(u_i, v_i) +
l(v_i, u_i)) / 2. It compares all pairs of nodes, so time and memory grow with the square of their
number. With `num_negatives` = k each node has k random negatives, drawn again in every step.

Reference: Zhu et al. 2020, https://arxiv.org/abs/2006.04131. The variant with k negatives is a
baseline of Thakoor et al. 2021, https://arxiv.org/abs/2102.06514.

| paper | here |
|---|---|
| f, g | `Params.encoder`, `Params.projector` |
| tau | `Config.temperature` |
| p_r, p_m | `Config.edge_drop_probs`, `Config.feature_mask_probs`, one for each view |
| u, v | `first_embeddings`, `second_embeddings`, after the projector |

Deviations: the caller chooses the network, so it may use batch normalisation, as BGRL's encoder
does and GRACE's does not. With k negatives the denominator is not scaled up to all negatives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from representation import collapse, graph_augmentations, graphs, moving_targets
from sharding import checks

Metrics = dict[str, jax.Array]
Batch = graphs.Graph


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["feature_mask_probs", "edge_drop_probs", "temperature"],
  meta_fields=["num_negatives", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the views are those of `bgrl` for Amazon Computers.

  Attributes:
    feature_mask_probs: two numbers, the probability of masking a feature column in each view.
    edge_drop_probs: two numbers, the probability of dropping a directed edge in each view.
    temperature: positive, the divisor of the cosines.
    num_negatives: number of negatives of each node in a step; 0 means all other nodes; static.
    num_microbatches: must be 1, because a node is read together with its neighbours.
  """

  feature_mask_probs: Any = (0.2, 0.1)
  edge_drop_probs: Any = (0.5, 0.4)
  temperature: Any = 0.5
  num_negatives: int = 0
  num_microbatches: int = 1

  def __post_init__(self):
    graph_augmentations.check(self)
    checks.positive("temperature", self.temperature, fetch=True)
    checks.count("num_negatives", self.num_negatives, least=0)


class Params(NamedTuple):
  """The parameters that are trained by gradients."""

  encoder: Any
  projector: Any


class Networks(NamedTuple):
  """The two networks, as hashable functions.

  Attributes:
    encoder: `encoder(params, network_state, graph, *, train) -> ([N, K], network_state)`.
    projector: `projector(params, [N, K]) -> [N, K]`.
  """

  encoder: Callable[..., Any]
  projector: Callable[..., Any]


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of the encoder and the projector.
    network_state: of the encoder, such as running statistics; `()` for an encoder without any.
    opt_state: of the optimiser.
    step: scalar int32, the number of updates so far.
  """

  params: Params
  network_state: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def grace_loss(
  first_embeddings: jax.Array,
  second_embeddings: jax.Array,
  *,
  temperature: Any,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Returns the loss of each node, with all other nodes as negatives.

  It stores the cosines of all pairs, `[2N, 2N]`.

  Args:
    first_embeddings: `[N, K]`, projections of the first view.
    second_embeddings: `[N, K]`, projections of the second view.
    temperature: positive.
    mask: `[N]` bool, the nodes in use; the others are not used as negatives. The default is all.

  Returns:
    `[N]`, the mean over both directions; not negative, and 0 for nodes that are not in use. A row
    of zeros has cosine 0.

  Raises:
    ValueError: if shapes do not fit, or a temperature that is not traced is not positive.

  Example:
    >>> grace_loss(jnp.eye(2), 3 * jnp.eye(2), temperature=1.0).round(4)  # log(e + 2) - 1
    Array([0.5514, 0.5514], dtype=float32)

  Reference: https://arxiv.org/abs/2006.04131, eq. 1 and 2.
  """
  views, mask = _prepare(first_embeddings, second_embeddings, mask, temperature)
  rows = views.reshape(-1, views.shape[-1])
  logits = rows @ rows.T / temperature
  # The cosine of a node with itself in the same view is left out.
  counted = jnp.tile(mask, 2) & ~jnp.eye(len(rows), dtype=bool)
  normalisers = jax.nn.logsumexp(logits, axis=1, where=counted).reshape(2, -1)
  positives = jnp.sum(views[0] * views[1], axis=-1) / temperature
  return jnp.where(mask, jnp.mean(normalisers, axis=0) - positives, 0)


def subsampled_grace_loss(
  first_embeddings: jax.Array,
  second_embeddings: jax.Array,
  negatives: jax.Array,
  *,
  temperature: Any,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Returns the loss of each node with k given negatives, in time and memory O(N k).

  With all other nodes as negatives it equals `grace_loss`; with fewer it is smaller.

  Args:
    first_embeddings: `[N, K]`, projections of the first view.
    second_embeddings: `[N, K]`, projections of the second view.
    negatives: `[N, k]` int, for example from `sample_negatives`; used from both views. An entry
      that is the node itself or a node not in use is ignored.
    temperature: positive.
    mask: `[N]` bool, the nodes in use; the default is all.

  Returns:
    `[N]`, as from `grace_loss`.

  Raises:
    ValueError: if shapes do not fit, negatives that are not traced lie outside of [0, N), or a
      temperature that is not traced is not positive.

  Reference: https://arxiv.org/abs/2102.06514, section 4.
  """
  views, mask = _prepare(first_embeddings, second_embeddings, mask, temperature)
  num_nodes = views.shape[1]
  checks.row_numbers("negatives", negatives, num_nodes, ndim=2, fetch=True)
  if negatives.shape[0] != num_nodes:
    raise ValueError(f"negatives must have shape [N, k], N = {num_nodes}, got {negatives.shape}")

  @jax.checkpoint  # the backward pass gathers the negatives again, instead of storing [N, k, K]
  def cosines(column):
    return jnp.einsum("ank,bnk->anb", views, views[:, column])

  logits = jnp.moveaxis(jax.lax.map(cosines, negatives.T), 0, 2)  # [2, N, k, 2]
  positives = jnp.sum(views[0] * views[1], axis=-1) / temperature
  counted = mask[negatives] & (negatives != jnp.arange(num_nodes)[:, None])
  others = jnp.where(counted[..., None], logits / temperature, -jnp.inf).reshape(2, num_nodes, -1)
  own = jnp.broadcast_to(positives[:, None], (2, num_nodes, 1))
  normalisers = jax.nn.logsumexp(jnp.concatenate([own, others], axis=-1), axis=-1)
  return jnp.where(mask, jnp.mean(normalisers, axis=0) - positives, 0)


def _prepare(
  first: jax.Array, second: jax.Array, mask: jax.Array | None, temperature: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns both views with rows of length 1, `[2, N, K]`, and the mask `[N]`."""
  checks.matrix("first_embeddings", first)
  checks.same_shape(first_embeddings=first, second_embeddings=second)
  checks.positive("temperature", temperature, fetch=True)
  mask = jnp.ones(len(first), bool) if mask is None else mask
  checks.row_mask(mask, len(first))
  return moving_targets.normalise(jnp.stack([first, second])), mask


def sample_negatives(key: jax.Array, mask: jax.Array, *, num_negatives: int) -> jax.Array:
  """Returns k nodes for each node, `[N, k]`, drawn without replacement from the others in use.

  Nodes are put into a random order, and the negatives of a node are the k nodes after it. For one
  node this is a uniform draw, but the draws of two nodes are not independent. If there are fewer
  than k other nodes, the rest of a row is the node itself.

  Args:
    key: typed PRNG key.
    mask: `[N]` bool, the nodes in use.
    num_negatives: k.
  """
  order = jax.random.permutation(key, len(mask))
  order = order[jnp.argsort(~mask[order], stable=True)]  # nodes out of use last
  offsets, num_in_use = 1 + jnp.arange(num_negatives), jnp.sum(mask)
  following = order[(jnp.argsort(order)[:, None] + offsets) % num_in_use]
  return jnp.where(offsets < num_in_use, following, jnp.arange(len(mask))[:, None])


def init(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  network_state: Any = (),
) -> State:
  """Returns the state before the first step.

  Args:
    params: of the encoder and the projector.
    optimizer: the one that `update` will get.
    network_state: of the encoder.
  """
  del config
  return State(params, network_state, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Params, state: State, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the loss averaged over the nodes of `graphs.counted`.

  Args:
    params: the only argument to differentiate in.
    state: gives the network state.
    batch: the graph.
    key: typed PRNG key, for the two views and the negatives.
    apply_fn: the networks.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, network_state)`. The metrics are `loss` and those of
    `collapse.metrics` for the embeddings of the first view.
  """
  view_key, negative_key = jax.random.split(key)
  views = graph_augmentations.two_views(
    batch,
    view_key,
    feature_mask_probs=config.feature_mask_probs,
    edge_drop_probs=config.edge_drop_probs,
  )
  network_state = state.network_state
  embeddings, projections = [], []
  for view in views:
    hidden, network_state = apply_fn.encoder(params.encoder, network_state, view, train=True)
    embeddings.append(hidden)
    projections.append(apply_fn.projector(params.projector, hidden))
  first, second = projections
  counted = graphs.counted(batch)
  shared = {"temperature": config.temperature, "mask": counted}
  if config.num_negatives:
    negatives = sample_negatives(negative_key, counted, num_negatives=config.num_negatives)
    losses = subsampled_grace_loss(first, second, negatives, **shared)
  else:
    losses = grace_loss(first, second, **shared)
  value = jnp.sum(losses) / jnp.sum(counted)
  metrics = {
    "loss": value,
    **collapse.metrics(jax.lax.stop_gradient(embeddings[0]), mask=counted, spectrum=True),
  }
  return value, (metrics, jax.lax.stop_gradient(network_state))


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Networks,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one gradient step on the graph.

  Args:
    state: not donated.
    batch: the graph.
    key: typed PRNG key, for the two views and the negatives.
    apply_fn: the networks.
    optimizer: an optax transformation. Build it once: a new one compiles the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm`.
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )


def embed(state: State, batch: Batch, *, apply_fn: Networks) -> jax.Array:
  """Returns the encoder's embeddings `[N, K]` of an uncorrupted graph, for evaluation."""
  return apply_fn.encoder(state.params.encoder, state.network_state, batch, train=False)[0]
