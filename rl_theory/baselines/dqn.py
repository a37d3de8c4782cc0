"""DQN: Q-learning with a network, a replay buffer and a target network.

Problem: a Markov decision process with a discount. The network gives one number for each action,
its value. A transition (s, a, r, s') gives the target r + gamma max_a' Q_target(s', a').

  min L(r + gamma max_a' Q_target(s', a') - Q(s, a)),
  L(u) = u^2 / 2 up to |u| = kappa, then linear with the slope kappa

Reference: Mnih et al. 2015, "Human-level control through deep reinforcement learning"; van Hasselt,
Guez and Silver 2016, https://arxiv.org/abs/1509.06461, for `Config.double`.

| paper | here |
|---|---|
| Q(s, a; theta) | `apply_fn(params, observations)[b, a]` |
| theta^- | `State.target_params` |
| errors clipped to [-1, 1] | `Config.kappa` = 1 |
| gamma, 0 where the episode ends | `Batch.discounts` |
| C | `Config.target_period` |

Deviations: illegal actions are never greedy. `Batch`, `State` and `init` are those of `qr_dqn`, so
that both run in the same loop (`q_learning_epochs`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import qr_dqn
from sharding import checks

Metrics = dict[str, jax.Array]
Batch = qr_dqn.Batch
State = qr_dqn.State
init = qr_dqn.init


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["kappa"],
  meta_fields=["target_period", "double", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters.

  Attributes:
    kappa: positive, error up to which the loss is quadratic; larger than all errors for the square.
    target_period: updates between copies of the network into the target network.
    double: whether the learning network picks the next action.
    num_microbatches: number of parts of a batch, to save memory; the result is the same.
  """

  kappa: Any = 1.0
  target_period: int = 10_000
  double: bool = False
  num_microbatches: int = 1

  def __post_init__(self):
    checks.positive("kappa", self.kappa)
    checks.count("target_period", self.target_period)
    checks.count("num_microbatches", self.num_microbatches)


@checks.array_arguments
def huber_loss(values: jax.Array, targets: jax.Array, *, kappa: Any = 1.0) -> jax.Array:
  """Returns the Huber loss of each value, `[...]`.

  Args:
    values: `[...]`.
    targets: `[...]`; no gradient flows into them.
    kappa: positive, error up to which the loss is quadratic.

  Example:
    >>> print(huber_loss(jnp.array([0.0, 0.0]), jnp.array([0.5, -3.0])))
    [0.125 2.5  ]
  """
  checks.positive("kappa", kappa)
  checks.same_shape(values=values, targets=targets)
  errors = jnp.abs(jax.lax.stop_gradient(targets) - values)
  # Not kappa * (errors - inner): its gradient cancels kappa, and a large one leaves only rounding.
  inner = jnp.minimum(errors, kappa)
  return inner * (errors - inner / 2)


def action_values(values: jax.Array) -> jax.Array:
  """Returns its argument: the network gives the action values themselves."""
  return values


def loss(
  params: Any,
  state: Any,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Callable[..., Any],
  config: Config,
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the mean loss of the batch, and `(metrics, ())`.

  Args:
    params: the only input to differentiate.
    state: only its target network is used.
    batch: B transitions.
    key: not used.
    apply_fn: `apply_fn(params, observations [B, ...]) -> [B, A]`.
    config: hyper-parameters.
  """
  del key
  values = apply_fn(params, batch.observations)
  next_values = apply_fn(state.target_params, batch.next_observations)
  judge = apply_fn(params, batch.next_observations) if config.double else next_values
  best = qr_dqn.next_actions(judge, batch.next_legal)
  targets = qr_dqn.bellman_targets(next_values[..., None], best, batch.rewards, batch.discounts)
  taken = jnp.take_along_axis(values, batch.actions[:, None], axis=1)[:, 0]
  value = jnp.mean(huber_loss(taken, targets[:, 0], kappa=config.kappa))
  return value, ({"loss": value, "dqn/value": jnp.mean(taken)}, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one optimisation step.

  Args:
    state: not donated.
    batch: B transitions; `config.num_microbatches` must divide B.
    key: not used.
    apply_fn: the network, `[B, A]` from `[B, ...]`.
    optimizer: any optax transformation; build it once, since a new one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm` and `dqn/value` (mean value of the actions taken).
  """
  state, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  return qr_dqn.copy_to_target_network(state, config.target_period), metrics
