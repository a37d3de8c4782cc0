"""QR-DQN: Q-learning that learns N quantiles of the return of each action.

Problem: a Markov decision process with a discount. The network gives theta_1, ..., theta_N for each
action. Their levels are tau_i = (2i - 1) / (2N), and their mean is the action's value. A transition
(s, a, r, s') gives the targets T_j = r + gamma theta_j(s', a*), where a* is greedy for the *mean*
of the target network's quantiles. The largest of each quantile over the actions would be the
quantiles of no action's return.

  min sum_i mean_j rho_{tau_i}(T_j - theta_i(s, a)),
  rho_tau(u) = |tau - 1{u < 0}| L(u) / kappa,   L(u) = u^2 / 2 up to |u| = kappa, then linear

With kappa = 0 it is the pinball loss, whose gradient is the update of quantile TD learning: that of
theta_i is -(tau_i - mean_j 1{T_j < theta_i}). `kappa` may be 0, also as a traced number.

Reference: Dabney, Rowland, Bellemare and Munos 2018, https://arxiv.org/abs/1710.10044, algorithm 1.

| paper | here |
|---|---|
| theta_i(s, a), i = 1..N | `apply_fn(params, observations)[b, a, i]` |
| theta^- | `State.target_params` |
| kappa | `Config.kappa` |
| gamma, 0 where the episode ends | `Batch.discounts` |
| target network refitted every C updates | `Config.target_period` |

Conventions: the loss is a sum over the N learned quantiles and a mean over the M targets, as in
rlax and Stoix. These do not divide by kappa, so their loss is kappa times this one; at kappa = 1
and in the pinball limit they agree. A mean over both axes would be N times smaller.

Deviations: illegal actions are never greedy. `Config.double` picks a* with the learning network
(Double DQN, https://arxiv.org/abs/1509.06461), which the paper does not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sharding
from rl_theory import qtd
from sharding import checks

Metrics = dict[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["kappa"],
  meta_fields=["target_period", "double", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters.

  Attributes:
    kappa: error up to which the loss is quadratic, at least 0; 0 is the pinball loss.
    target_period: updates between copies of the network into the target network.
    double: whether the learning network picks the next action.
    num_microbatches: number of parts of a batch, to save memory; the result is the same.
  """

  kappa: Any = 1.0
  target_period: int = 10_000
  double: bool = False
  num_microbatches: int = 1

  def __post_init__(self):
    checks.not_negative("kappa", self.kappa)
    checks.count("target_period", self.target_period)
    checks.count("num_microbatches", self.num_microbatches)


class Batch(NamedTuple):
  """B transitions.

  Attributes:
    observations: `[B, ...]`.
    actions: `[B]` int.
    rewards: `[B]`.
    next_observations: `[B, ...]`.
    discounts: `[B]`, gamma, or 0 where the episode ended.
    next_legal: `[B, A]` bool, the legal actions at the next observation.
  """

  observations: Any
  actions: Any
  rewards: Any
  next_observations: Any
  discounts: Any
  next_legal: Any


class State(NamedTuple):
  """Everything that changes in training.

  Attributes:
    params: of the network.
    target_params: of the target network.
    opt_state: of the optimiser.
    step: scalar int32, updates done.
  """

  params: Any
  target_params: Any
  opt_state: Any
  step: jax.Array


@checks.array_arguments
def quantile_huber_loss(theta: jax.Array, targets: jax.Array, *, kappa: Any = 1.0) -> jax.Array:
  """Returns the quantile Huber loss: a sum over quantiles, a mean over targets.

  Args:
    theta: `[..., N]` quantiles at the levels (2i - 1) / (2N), in any order of size.
    targets: `[..., M]` samples or quantiles of equal weight; M need not be N. No gradient flows
      into them.
    kappa: error up to which the loss is quadratic; 0 is the pinball loss, whose gradient in
      theta_i is -(tau_i - mean_j 1{targets_j < theta_i}), also where they are equal.

  Returns:
    `[...]`.

  Raises:
    ValueError: if the leading axes differ.

  Example:
    >>> theta, targets = jnp.array([0.0, 3.0]), jnp.array([1.0, 2.0, 5.0])
    >>> print(quantile_huber_loss(theta, targets, kappa=0.0))
    1.4166667
  """
  checks.not_negative("kappa", kappa)
  theta, targets = qtd.as_floats(theta, targets)
  if theta.shape[:-1] != targets.shape[:-1] or 0 in (theta.ndim, targets.ndim):
    raise ValueError(
      f"theta [..., N] and targets [..., M] must agree in their leading axes, got "
      f"{list(theta.shape)} and {list(targets.shape)}"
    )
  checks.not_empty(theta=theta, targets=targets)
  errors = jax.lax.stop_gradient(targets)[..., None, :] - theta[..., :, None]
  weights = qtd.quantile_levels(theta.shape[-1], theta.dtype)[:, None] - (errors < 0)
  # |errors| = |inner| + (what is beyond kappa). With kappa = 0 the quadratic part is exactly 0, and
  # the gradient of the linear part in an error is its weight, also where the error is 0.
  inner = jnp.where(jnp.abs(errors) < kappa, errors, kappa * jnp.sign(errors))
  quadratic = inner**2 / jnp.where(kappa > 0, 2 * kappa, 1)
  losses = weights * (errors - inner) + jnp.abs(weights) * quadratic
  return jnp.sum(jnp.mean(losses, axis=-1), axis=-1)


@checks.array_arguments
def action_values(theta: jax.Array) -> jax.Array:
  """Returns the means `[..., A]` of the quantiles `[..., A, N]`."""
  return jnp.mean(theta, axis=-1)


@checks.array_arguments
def next_actions(values: jax.Array, legal: jax.Array) -> jax.Array:
  """Returns the legal action of the largest value, `[...]` from `[..., A]`."""
  return jnp.argmax(jnp.where(legal, values, -jnp.inf), axis=-1)


@checks.array_arguments
def bellman_targets(
  next_theta: jax.Array, next_actions: jax.Array, rewards: jax.Array, discounts: jax.Array
) -> jax.Array:
  """Returns the targets r + gamma theta_j(s', a*), `[..., N]`.

  Args:
    next_theta: `[..., A, N]` of the target network.
    next_actions: `[...]` int.
    rewards: `[...]`.
    discounts: `[...]`, 0 where the episode ended.
  """
  chosen = jnp.take_along_axis(next_theta, next_actions[..., None, None], axis=-2)[..., 0, :]
  return rewards[..., None] + discounts[..., None] * chosen


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the state before the first update; the target network starts as a copy.

  Args:
    params: of the network.
    optimizer: the one that `update` will get; the paper's is `optax.adam(5e-5, eps=0.01 / 32)`.
    config: not used.
  """
  del config
  return State(
    params=params,
    target_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
  )


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
    apply_fn: `apply_fn(params, observations [B, ...]) -> [B, A, N]`.
    config: hyper-parameters.
  """
  del key
  theta = apply_fn(params, batch.observations)
  next_theta = apply_fn(state.target_params, batch.next_observations)
  judge = apply_fn(params, batch.next_observations) if config.double else next_theta
  best = next_actions(action_values(judge), batch.next_legal)
  targets = bellman_targets(next_theta, best, batch.rewards, batch.discounts)
  taken = jnp.take_along_axis(theta, batch.actions[:, None, None], axis=1)[:, 0]
  value = jnp.mean(quantile_huber_loss(taken, targets, kappa=config.kappa))
  metrics = {
    "qr_dqn/value": jnp.mean(taken),
    "qr_dqn/spread": jnp.mean(jnp.std(taken, axis=-1)),
  }
  return value, ({"loss": value, **metrics}, ())


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
    apply_fn: the network, `[B, A, N]` from `[B, ...]`.
    optimizer: any optax transformation; build it once, since a new one compiles again.
    config: hyper-parameters.

  Returns:
    The new state; metrics `loss`, `grad_norm`, `qr_dqn/value` (mean of the quantiles of the actions
    taken) and `qr_dqn/spread` (their standard deviation).
  """
  state, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  return copy_to_target_network(state, config.target_period), metrics


def copy_to_target_network(state: State, period: int) -> State:
  """Returns the state whose target network is the network itself after every `period` updates."""
  due = state.step % period == 0
  targets = jax.tree.map(
    lambda new, old: jnp.where(due, new, old), state.params, state.target_params
  )
  return state._replace(target_params=targets)
