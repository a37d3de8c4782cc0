"""BGRL: node embeddings learned by predicting the embeddings of another view of the same graph.

Two views of a graph are made by dropping edges and masking features at random. An online encoder
and a target encoder read both views. A predictor maps the online embedding of a node in one view to
the target embedding of the same node in the other view:

  loss = 2 - mean_i cos(Z1_i, H2_i) - mean_i cos(Z2_i, H1_i),  Z = predictor(online(view)).

There are no negative examples, so time and memory grow with nodes and edges, not with pairs of
nodes. The target gets no gradient. After each step it becomes decay * target + (1 - decay) *
online, where the decay rises from 0.99 to 1.

Reference: Thakoor et al. 2021, https://arxiv.org/abs/2102.06514.

| paper | here |
|---|---|
| E_theta, p_theta | `Params.encoder`, `Params.predictor` |
| E_phi | `State.target_params` |
| tau | `moving_targets.decay_schedule(step)`, from `Config.target_decay` |
| T_1, T_2: p_f, p_e | `Config.feature_mask_probs`, `Config.edge_drop_probs`, one for each view |
| H, Z | `target_embeddings`, `online_predictions` |

Deviations: the loss of the paper is twice this one; ours is the loss of the authors' code. As in
that code, each encoder keeps its own running statistics of batch normalisation; the target's are
not a moving average of the online encoder's.
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
from sharding import averages, checks

Metrics = dict[str, jax.Array]
Batch = graphs.Graph


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["feature_mask_probs", "edge_drop_probs", "target_decay"],
  meta_fields=["num_steps", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters; the defaults are those of the paper for Amazon Computers.

  Attributes:
    feature_mask_probs: two numbers, the probability of masking a feature column in each view.
    edge_drop_probs: two numbers, the probability of dropping a directed edge in each view.
    target_decay: in [0, 1], tau at the first step.
    num_steps: positive, the step at which tau reaches 1; static.
    num_microbatches: must be 1, because a node is read together with its neighbours.
  """

  feature_mask_probs: Any = (0.2, 0.1)
  edge_drop_probs: Any = (0.5, 0.4)
  target_decay: Any = 0.99
  num_steps: int = 10_000
  num_microbatches: int = 1

  def __post_init__(self):
    graph_augmentations.check(self)
    checks.probabilities("target_decay", self.target_decay)
    checks.count("num_steps", self.num_steps)


class Params(NamedTuple):
  """The parameters that are trained by gradients."""

  encoder: Any
  predictor: Any


class Networks(NamedTuple):
  """The two networks, as hashable functions.

  Attributes:
    encoder: `encoder(params, network_state, graph, *, train) -> ([N, K], network_state)`.
    predictor: `predictor(params, [N, K]) -> [N, K]`.
  """

  encoder: Callable[..., Any]
  predictor: Callable[..., Any]


class NetworkState(NamedTuple):
  """State of the encoders, such as running statistics; `()` for an encoder without any."""

  online: Any = ()
  target: Any = ()


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of the online encoder and the predictor.
    target_params: of the target encoder, in float32 or wider.
    network_state: of both encoders.
    opt_state: of the optimiser.
    step: scalar int32, the number of updates so far.
  """

  params: Params
  target_params: Any
  network_state: NetworkState
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def bgrl_loss(online_predictions: jax.Array, target_embeddings: jax.Array) -> jax.Array:
  """Returns 1 - cos of each node's prediction and target.

  Args:
    online_predictions: `[N, K]`.
    target_embeddings: `[N, K]`.

  Returns:
    `[N]` in [0, 2]. Only the predictions get gradients. A row of zeros has cosine 0.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> bgrl_loss(jnp.array([[3.0, 0.0], [1.0, 0.0]]), jnp.array([[5.0, 0.0], [0.0, 2.0]]))
    Array([0., 1.], dtype=float32)

  Reference: https://arxiv.org/abs/2102.06514, eq. 1 (without its factor 2).
  """
  checks.same_shape(online_predictions=online_predictions, target_embeddings=target_embeddings)
  targets = moving_targets.normalise(jax.lax.stop_gradient(target_embeddings))
  return 1 - jnp.sum(moving_targets.normalise(online_predictions) * targets, axis=-1)


def init(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  target_params: Any = None,
  network_state: NetworkState | None = None,
) -> State:
  """Returns the state before the first step.

  Args:
    params: of the online encoder and the predictor.
    optimizer: the one that `update` will get.
    target_params: of the target encoder. The paper draws them independently; the default is a copy
      of the online encoder's.
    network_state: of both encoders; the default is `()` for each.
  """
  del config
  target_params = averages.start(params.encoder if target_params is None else target_params)
  return State(
    params,
    target_params,
    NetworkState() if network_state is None else network_state,
    optimizer.init(params),
    jnp.zeros((), jnp.int32),
  )


def loss(
  params: Params, state: State, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, NetworkState]]:
  """Returns the loss summed over both directions and averaged over the nodes of `graphs.counted`.

  Args:
    params: the only argument to differentiate in.
    state: gives the target encoder and the network state.
    batch: the graph, or a sample of one (`neighbour_sampling`).
    key: typed PRNG key, for the two views.
    apply_fn: the networks.
    config: hyper-parameters.

  Returns:
    The scalar loss in [0, 4], and `(metrics, network_state)`. The metrics are `loss` and those of
    `collapse.metrics` for the online embeddings of the first view.
  """
  views = graph_augmentations.two_views(
    batch,
    key,
    feature_mask_probs=config.feature_mask_probs,
    edge_drop_probs=config.edge_drop_probs,
  )
  online_state, target_state = state.network_state
  target_params = averages.like(state.target_params, params.encoder)
  predictions, embeddings, targets = [], [], []
  for view in views:
    online, online_state = apply_fn.encoder(params.encoder, online_state, view, train=True)
    target, target_state = apply_fn.encoder(target_params, target_state, view, train=True)
    predictions.append(apply_fn.predictor(params.predictor, online))
    embeddings.append(online)
    targets.append(target)
  losses = bgrl_loss(predictions[0], targets[1]) + bgrl_loss(predictions[1], targets[0])
  counted = graphs.counted(batch)
  value = jnp.sum(jnp.where(counted, losses, 0)) / jnp.sum(counted)
  metrics = {
    "loss": value,
    **collapse.metrics(jax.lax.stop_gradient(embeddings[0]), mask=counted, spectrum=True),
  }
  return value, (metrics, jax.lax.stop_gradient(NetworkState(online_state, target_state)))


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
  """Returns the state after one gradient step on the graph, followed by one step of the target.

  Args:
    state: not donated.
    batch: the graph, or a sample of one (`neighbour_sampling`).
    key: typed PRNG key, for the two views.
    apply_fn: the networks.
    optimizer: an optax transformation. Build it once: a new one compiles the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm` and `bgrl/target_decay`.
  """
  stepped, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  decay = moving_targets.decay_schedule(
    state.step, target_decay=config.target_decay, num_steps=config.num_steps
  )
  target_params = averages.move(state.target_params, stepped.params.encoder, decay)
  metrics["bgrl/target_decay"] = decay
  return stepped._replace(target_params=target_params), metrics


def embed(state: State, batch: Batch, *, apply_fn: Networks) -> jax.Array:
  """Returns the online encoder's embeddings `[N, K]` of an uncorrupted graph, for evaluation."""
  return apply_fn.encoder(state.params.encoder, state.network_state.online, batch, train=False)[0]
