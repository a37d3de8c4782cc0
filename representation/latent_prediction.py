"""Latent prediction: a recurrent agent predicts embeddings of its observations, forward and back.

The agent reads observations o_t and its own actions. It embeds each observation, e_t, and keeps a
recurrent state b_t. An open-loop model starts from b_t and reads only the actions that follow. It
predicts the embedding of each of the next n observations. The backward head predicts the state b_t
from the embedding of o_{t+n}:

  forward  = mean over t, i = 1..n of |norm(g(h_{t,i})) - norm(sg(e'_{t+i}))|^2,
             h_{t,0} = b_t,  h_{t,i} = dynamics(h_{t,i-1}, a_{t+i-1}),
  backward = mean over t of |norm(q(e_{t+n})) - norm(sg(b'_t))|^2.

The targets e' and b' come from a copy of the agent that follows it slowly. They get no gradient.
The forward loss alone is BYOL-RL. Both together are bidirectional self-predictive learning, whose
two representations are the state b and the embedding e: each is trained to predict the other.

Reference: Tang et al. 2022, https://arxiv.org/abs/2212.03319, the part on deep reinforcement
learning. `self_predictive` has the tabular form and its theory.

| paper | here |
|---|---|
| agent state b_t, embedding of o_t | `Encoded.states`, `Encoded.embeddings` |
| open-loop model, its predictor | `Params.dynamics`, `Params.forward` |
| backward predictor | `Params.backward` |
| target network | `State.target_params` |
| horizon n | `Config.horizon` |

Deviations: an agent adds these losses to its own (`losses`); `update` here learns from a batch of
episodes alone. An episode is read from its first step, so no state is carried between batches. The
predictors are heads of any form; none of them is solved for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from representation import byol, collapse
from sharding import averages, checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["forward_weight", "backward_weight", "target_decay"],
  meta_fields=["horizon", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters. The paper weighs both losses equally; the other defaults are our choice.

  Attributes:
    forward_weight: not negative, of the forward loss.
    backward_weight: not negative, of the backward loss; 0 leaves BYOL-RL.
    target_decay: in [0, 1], how much of the target stays in each step.
    horizon: positive, the number of steps n to look ahead; static.
    num_microbatches: must be 1, because the losses are means over all pairs of steps.
  """

  forward_weight: Any = 1.0
  backward_weight: Any = 1.0
  target_decay: Any = 0.99
  horizon: int = 4
  num_microbatches: int = 1

  def __post_init__(self):
    checks.not_negative("forward_weight", self.forward_weight)
    checks.not_negative("backward_weight", self.backward_weight)
    checks.probabilities("target_decay", self.target_decay)
    checks.count("horizon", self.horizon)
    if self.num_microbatches != 1:
      raise ValueError(
        f"num_microbatches must be 1, got {self.num_microbatches}: the losses are means over all "
        "pairs of steps of a batch"
      )


class Batch(NamedTuple):
  """Episodes from their first step, padded at the end.

  Attributes:
    observations: `[B, T, O]`.
    actions: `[B, T]` int, the action that followed each observation.
    mask: `[B, T]` bool, the real steps.
  """

  observations: jax.Array
  actions: jax.Array
  mask: jax.Array


class Params(NamedTuple):
  """The parameters that are trained by gradients.

  Attributes:
    agent: of the encoder of observations and the recurrent network.
    dynamics: of the open-loop model.
    forward: of the head that predicts embeddings from the open-loop model.
    backward: of the head that predicts states from embeddings.
  """

  agent: Any
  dynamics: Any
  forward: Any
  backward: Any


class Encoded(NamedTuple):
  """What an agent makes of a batch: `embeddings` `[B, T, E]` and `states` `[B, T, H]`.

  A state has read the observations up to its own and the actions before it. An embedding has read
  one observation.
  """

  embeddings: jax.Array
  states: jax.Array


class Networks(NamedTuple):
  """The networks, as hashable functions.

  Attributes:
    agent: `agent(params, observations [B, T, O], actions [B, T]) -> Encoded`.
    dynamics: `dynamics(params, hidden [..., H], actions [...]) -> [..., H]`, one open-loop step.
    forward: `forward(params, hidden [..., H]) -> [..., E]`.
    backward: `backward(params, embeddings [..., E]) -> [..., H]`.
  """

  agent: Callable[..., Any]
  dynamics: Callable[..., Any]
  forward: Callable[..., Any]
  backward: Callable[..., Any]


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of the agent and the heads.
    target_params: of the target, a second agent, in float32 or wider.
    opt_state: of the optimiser.
    step: scalar int32, the number of updates so far.
  """

  params: Params
  target_params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def prediction_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the squared distance of normalised vectors, 2 - 2 cos.

  Args:
    predictions: `[..., D]`.
    targets: `[..., D]`.

  Returns:
    `[...]` in [0, 4]. Only the predictions get gradients. A vector of zeros gives 2.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> prediction_loss(jnp.array([[3.0, 0.0], [1.0, 0.0]]), jnp.array([[5.0, 0.0], [0.0, 2.0]]))
    Array([0., 2.], dtype=float32)
  """
  checks.same_shape(predictions=predictions, targets=targets)
  return byol.byol_loss(predictions, targets)


def losses(
  params: Params,
  online: Encoded,
  target: Encoded,
  actions: jax.Array,
  mask: jax.Array,
  *,
  apply_fn: Networks,
  horizon: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the forward and the backward loss of episodes that are encoded already.

  An agent that has encoded a batch for its own loss adds these to it.

  Args:
    params: of the heads; `params.agent` is not read.
    online: the agent's encoding, which gets gradients.
    target: the target's encoding, which gets none.
    actions: `[B, T]` int.
    mask: `[B, T]` bool.
    apply_fn: the networks.
    horizon: n, below T.

  Returns:
    Two scalars in [0, 4], means over the pairs of real steps; 0 where there is no such pair.

  Raises:
    ValueError: if the shapes do not fit, or the horizon is not below T.
  """
  checks.count("horizon", horizon)
  batch_size, num_steps = checks.same_shape(actions=actions, mask=mask)
  if horizon >= num_steps:
    raise ValueError(
      f"horizon must be below the number of steps T = {num_steps}, got {horizon}: lower it, or "
      "give longer episodes"
    )
  for name, encoded in (("online", online), ("target", target)):
    for part, array in encoded._asdict().items():
      checks.shape(f"{name}.{part}", array, (batch_size, num_steps, array.shape[-1]), "[B, T, D]")
  hidden, total = online.states, jnp.zeros((), online.states.dtype)
  for offset in range(1, horizon + 1):
    hidden = apply_fn.dynamics(params.dynamics, hidden[:, :-1], actions[:, offset - 1 : -1])
    predictions = apply_fn.forward(params.forward, hidden)
    found = prediction_loss(predictions, target.embeddings[:, offset:])
    total += jnp.sum(jnp.where(mask[:, offset:], found, 0))
  num_pairs = sum(jnp.sum(mask[:, offset:]) for offset in range(1, horizon + 1))
  later = mask[:, horizon:]
  predictions = apply_fn.backward(params.backward, online.embeddings[:, horizon:])
  found = prediction_loss(predictions, target.states[:, :-horizon])
  backward = jnp.sum(jnp.where(later, found, 0)) / jnp.maximum(jnp.sum(later), 1)
  return total / jnp.maximum(num_pairs, 1), backward


def init(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  config: Config,
  target_params: Any = None,
) -> State:
  """Returns the state before the first step.

  Args:
    params: of the agent and the heads.
    optimizer: the one that `update` will get.
    target_params: of the target; the default is a copy of the agent's.
  """
  del config
  target_params = averages.start(params.agent if target_params is None else target_params)
  return State(params, target_params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Params, state: State, batch: Batch, key: Any, *, apply_fn: Networks, config: Config
) -> tuple[jax.Array, tuple[Metrics, tuple[()]]]:
  """Returns the weighted sum of the forward and the backward loss.

  Args:
    params: the only argument to differentiate in.
    state: gives the target.
    batch: episodes.
    key: not used.
    apply_fn: the networks.
    config: hyper-parameters.

  Returns:
    The scalar loss, and `(metrics, ())`. The metrics are `loss`, `latent_prediction/forward_loss`,
    `latent_prediction/backward_loss` and those of `collapse.metrics` for the agent's states.
  """
  del key
  encode = functools.partial(apply_fn.agent, observations=batch.observations, actions=batch.actions)
  online, target = encode(params.agent), encode(averages.like(state.target_params, params.agent))
  forward, backward = losses(
    params, online, target, batch.actions, batch.mask, apply_fn=apply_fn, horizon=config.horizon
  )
  value = config.forward_weight * forward + config.backward_weight * backward
  states = jax.lax.stop_gradient(online.states).reshape(-1, online.states.shape[-1])
  return value, (
    {
      "loss": value,
      "latent_prediction/forward_loss": forward,
      "latent_prediction/backward_loss": backward,
      **collapse.metrics(states, mask=batch.mask.reshape(-1), spectrum=True),
    },
    (),
  )


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
  """Returns the state after one gradient step on the episodes, followed by one of the target.

  Args:
    state: not donated.
    batch: episodes.
    key: not used.
    apply_fn: the networks.
    optimizer: an optax transformation. Build it once: a new one compiles the step again.
    config: hyper-parameters.

  Returns:
    The new state, and the metrics of `loss` with `grad_norm`.
  """
  stepped, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  target_params = averages.move(state.target_params, stepped.params.agent, config.target_decay)
  return stepped._replace(target_params=target_params), metrics
