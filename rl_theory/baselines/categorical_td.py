"""Categorical temporal-difference learning: the law of the return as masses on a fixed grid.

Problem: the law of the return from each state x, as probabilities p(x) on N equally spaced atoms z
between `low` and `high`. On a transition (x, r, x') the atoms of p(x') move to r + discount z_j.
Each mass is split between the two atoms of the grid around it: the projection in the Cramer
distance. What leaves the grid goes to its ends.

  p(x) <- p(x) + alpha (projection of the moved p(x') - p(x)).

If the grid covers all returns, the mean of p follows TD(0) exactly. The projection spreads mass, so
that the fixed point is wrong even in deterministic processes, where quantile TD is exact.

Reference: Bellemare et al. 2017, https://arxiv.org/abs/1707.06887, and Rowland et al. 2018,
https://arxiv.org/abs/1802.08163 (this mixture update).

| paper | here |
|---|---|
| p(x) | `apply_fn(params, states)[b]`, `[N]`; in the table `params[x]` |
| z | `atoms(low, high, N)` |
| gamma | `Config.discount` |
| alpha | the learning rate of `optax.sgd`, at most 1 |

The loss is half the squared distance to the projected target, summed over atoms and transitions,
whose gradient is minus the bracket above, so that `optax.sgd(alpha)` makes exactly that step.

Deviations: the deep algorithm (C51) has logits and a cross entropy in place of the mixture.
"""

import dataclasses
import functools
import numbers
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
  data_fields=["discount", "low", "high"],
  meta_fields=["num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of categorical TD.

  Attributes:
    discount: in [0, 1).
    low: the smallest atom.
    high: the largest atom, above `low`.
    num_microbatches: must be 1, because the loss is a sum over transitions.
  """

  discount: Any = 0.9
  low: Any = -10.0
  high: Any = 10.0
  num_microbatches: int = 1

  def __post_init__(self):
    qtd.check_config(self.discount, self.num_microbatches)
    checks.finite("low", self.low)
    checks.finite("high", self.high)
    if isinstance(self.low, numbers.Real) and isinstance(self.high, numbers.Real):
      if not self.low < self.high:
        raise ValueError(f"high must be above low = {self.low}, got {self.high}")


class State(NamedTuple):
  """Everything that changes in learning.

  Attributes:
    params: the table `[S, N]` of probabilities, or parameters as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
  """

  params: Any
  opt_state: Any
  step: jax.Array


def atoms(low: Any, high: Any, num_atoms: int) -> jax.Array:
  """Returns the grid `[N]` from `low` to `high`."""
  checks.count("num_atoms", num_atoms, least=2)
  return low + (high - low) * jnp.linspace(0, 1, num_atoms)


@checks.array_arguments
def categorical_target(
  next_probs: jax.Array, rewards: jax.Array, *, discount: Any, low: Any, high: Any
) -> jax.Array:
  """Returns the law of reward + discount * next return, projected onto the grid.

  Args:
    next_probs: `[B, N]` probabilities of the next states.
    rewards: `[B]`.
    discount: in [0, 1).
    low: the smallest atom.
    high: the largest atom.

  Returns:
    `[B, N]` probabilities. Their mean is reward + discount * next mean if nothing left the grid.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> categorical_target(jnp.array([[0.0, 0.0, 1.0]]), jnp.zeros(1), discount=0.25, low=0, high=2)
    Array([[0.5, 0.5, 0. ]], dtype=float32)

  Reference: https://arxiv.org/abs/1707.06887, eq. 7.
  """
  next_probs, rewards = jnp.asarray(next_probs), jnp.asarray(rewards)
  checks.matrix("next_probs", next_probs)
  checks.shape("rewards", rewards, next_probs.shape[:1], "[B]")
  num_atoms = next_probs.shape[1]
  targets = rewards[:, None] + discount * atoms(low, high, num_atoms).astype(next_probs.dtype)
  places = jnp.clip((targets - low) * (num_atoms - 1) / (high - low), 0, num_atoms - 1)
  below = jnp.minimum(places.astype(jnp.int32), num_atoms - 2)
  upper = places - below

  def gather(below: jax.Array, lower_mass: jax.Array, upper_mass: jax.Array) -> jax.Array:
    return jnp.zeros_like(lower_mass).at[below].add(lower_mass).at[below + 1].add(upper_mass)

  return jax.vmap(gather)(below, next_probs * (1 - upper), next_probs * upper)


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: the table `[S, N]` of probabilities, or parameters as `apply_fn` takes them.
    optimizer: `optax.sgd(alpha)` for the paper's step.
    config: hyper-parameters.
  """
  del config
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
  params: Any, state: State, batch: Batch, key: Any, *, apply_fn: ApplyFn, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns half the squared distance to the targets, summed, and metrics.

  Args:
    params: differentiated. The targets come from them too, as constants.
    state: not used.
    batch: B transitions.
    key: not used.
    apply_fn: `apply_fn(params, states [B]) -> [B, N]` probabilities, such as `lookup`.
    config: hyper-parameters.
  """
  del state, key
  probs = apply_fn(params, batch.states)
  following = jax.lax.stop_gradient(apply_fn(params, batch.next_states))
  targets = categorical_target(
    following, batch.rewards, discount=config.discount, low=config.low, high=config.high
  )
  total = jnp.sum((targets - probs) ** 2) / 2
  means = probs @ atoms(config.low, config.high, probs.shape[-1]).astype(probs.dtype)
  return total, ({"loss": total, "categorical_td/value": jnp.mean(means)}, ())


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
    batch: B transitions, one from each state or one.

  Returns:
    The new state, and the metrics `loss`, `grad_norm` and `categorical_td/value` (mean of the laws
    of the batch).
  """
  return sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
