"""Temporal-difference learning of values: TD(0), and TD(lambda) with eligibility traces.

Problem: the expected return V(x) of a process under a fixed policy. On a transition (x, r, x') with
the error delta = r + discount V(x') - V(x),

  TD(0):       V(x) <- V(x) + alpha delta,
  TD(lambda):  e <- discount lambda e + grad V(x),  V <- V + alpha delta e.

The step is proportional to the error, so that rewards of large variance need small steps; quantile
TD (`rl_theory.qtd`) moves by the sign of an error. The fixed point is the value itself.

Reference: Sutton 1988, "Learning to predict by the methods of temporal differences". Here it is the
comparison of Rowland et al. 2023, https://arxiv.org/abs/2305.18388.

| paper | here |
|---|---|
| V(x) | `apply_fn(params, states)[b]`; in the table `params[x]` |
| gamma, lambda | `Config.discount`, `Config.trace_decay` |
| alpha | the learning rate of `optax.sgd` |
| e | `State.traces`, one for each of the B trajectories that are followed at once |

The loss of TD(0) is half the squared error, summed over the transitions of a batch, and its targets
get no gradient, so that `optax.sgd(alpha)` makes exactly the step above. With traces the loss has
the same value, and its gradient is minus the sum of delta e.

Deviations: traces accumulate, as in the paper, and the caller sets them to 0 where a new trajectory
begins.
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
ApplyFn = Callable[[Any, jax.Array], jax.Array]
Batch = qtd.Batch
lookup = qtd.lookup


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["discount", "trace_decay"],
  meta_fields=["num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of TD.

  Attributes:
    discount: in [0, 1).
    trace_decay: lambda in [0, 1]; used if the state has traces.
    num_microbatches: must be 1, because the loss is a sum over transitions.
  """

  discount: Any = 0.9
  trace_decay: Any = 0.0
  num_microbatches: int = 1

  def __post_init__(self):
    qtd.check_config(self.discount, self.num_microbatches)
    checks.probabilities("trace_decay", self.trace_decay)


class State(NamedTuple):
  """Everything that changes in learning.

  Attributes:
    params: the table `[S]`, or parameters as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
    traces: None for TD(0), else the traces of B trajectories: the tree of `params`, each leaf with
      a leading axis B.
  """

  params: Any
  opt_state: Any
  step: jax.Array
  traces: Any


@checks.array_arguments
def td_error(
  values: jax.Array, rewards: jax.Array, next_values: jax.Array, *, discount: Any
) -> Any:
  """Returns reward + discount * next value - value.

  Args:
    values: `[B]` V(x).
    rewards: `[B]` r.
    next_values: `[B]` V(x').
    discount: in [0, 1).

  Returns:
    `[B]` errors.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> td_error(jnp.array([1.0]), jnp.array([0.5]), jnp.array([2.0]), discount=0.5)
    Array([0.5], dtype=float32)
  """
  checks.same_shape(values=values, rewards=rewards, next_values=next_values)
  return jnp.asarray(rewards) + discount * jnp.asarray(next_values) - jnp.asarray(values)


def init(
  params: Any, *, optimizer: optax.GradientTransformation, config: Config, traces: Any = None
) -> State:
  """Returns the first state.

  Args:
    params: the table `[S]` of values, often zeros, or parameters as `apply_fn` takes them.
    optimizer: `optax.sgd(alpha)` for the paper's step.
    config: hyper-parameters.
    traces: None for TD(0). For TD(lambda) the tree of `params` with a leading axis B, zeros.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), traces)


def loss(
  params: Any, state: State, batch: Batch, key: Any, *, apply_fn: ApplyFn, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns half the squared error, summed over transitions, and metrics.

  Args:
    params: differentiated. The targets come from them too, as constants.
    state: its traces, if it has some, are those before this batch.
    batch: B transitions; with traces the next one of each trajectory.
    key: not used.
    apply_fn: `apply_fn(params, states [B]) -> [B]`, such as `lookup`.
    config: hyper-parameters.

  Raises:
    ValueError: if the shapes of the batch differ, or it is empty.
  """
  del key
  checks.not_empty(states=batch.states)
  values = apply_fn(params, batch.states)
  following = jax.lax.stop_gradient(apply_fn(params, batch.next_states))
  errors = td_error(values, batch.rewards, following, discount=config.discount)
  total = jnp.sum(errors**2) / 2
  if state.traces is not None:
    traces = _new_traces(params, state.traces, batch, apply_fn, config)
    constant_errors = jax.lax.stop_gradient(errors)
    moves = jax.tree.map(
      lambda leaf, trace: jnp.sum(leaf * jnp.tensordot(constant_errors, trace, 1)), params, traces
    )
    step = sum(jax.tree.leaves(moves))  # only its gradient counts
    total = jax.lax.stop_gradient(total + step) - step
  metrics = {
    "loss": total,
    "td/value": jnp.mean(values),
    "td/absolute_error": jnp.mean(jnp.abs(errors)),
  }
  return total, (metrics, ())


@functools.partial(jax.jit, static_argnames=("apply_fn", "optimizer"))
def update(
  state: State,
  batch: Batch,
  key: Any,
  *,
  apply_fn: ApplyFn,
  optimizer: optax.GradientTransformation,
  config: Config,
) -> tuple[State, Metrics]:
  """Returns the state after one step, and metrics from before it.

  Args:
    batch: B transitions; with traces the next one of each trajectory.

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `td/value` (mean over the batch) and
    `td/absolute_error` (mean size of the errors).
  """
  moved, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  if state.traces is not None:
    traces = _new_traces(state.params, state.traces, batch, apply_fn, config)
    moved = moved._replace(traces=traces)
  return moved, metrics


def _new_traces(params: Any, traces: Any, batch: Batch, apply_fn: ApplyFn, config: Config) -> Any:
  """Returns discount * lambda * traces + the gradients of the values, a leading axis B on each."""

  def value(params: Any, state: jax.Array) -> jax.Array:
    return apply_fn(params, state[None])[0]

  gradients = jax.vmap(jax.grad(value), (None, 0))(params, batch.states)
  decay = config.discount * config.trace_decay
  return jax.lax.stop_gradient(jax.tree.map(lambda old, new: decay * old + new, traces, gradients))
