"""Quantile temporal-difference learning (QTD) for policy evaluation.

Problem: the law of the return from each state x, as m quantiles theta(x, 1..m) at the levels
tau_i = (2i - 1) / (2m). On a transition (x, r, x') each of them moves by a quantile regression step
towards the m targets r + discount theta(x', j):

  theta(x, i) <- theta(x, i) + alpha (tau_i - mean_j 1{r + discount theta(x', j) < theta(x, i)}).

Only the signs of the errors matter, so that a step is at most alpha whatever the rewards are, and
rewards need a mean but no variance. The estimate of the value is the mean of theta(x, .), which has
a bias of order 1 / m.

Theorem: with sum_k alpha_k = infinity and alpha_k = o(1 / log k) synchronous QTD converges almost
surely to the fixed points of quantile dynamic programming (`rl_theory.quantile_dynamics`). The
squares of the step sizes need not be summable. If the reward laws have gaps there can be a whole
set of fixed points, in which the iterate may wander.

Reference: Rowland et al. 2023, https://arxiv.org/abs/2301.04462 (JMLR 25, 2024), eq. 7 and
Theorem 11. Its follow-up on the value alone: https://arxiv.org/abs/2305.18388.

| paper | here |
|---|---|
| theta(x, i) | `apply_fn(params, states)[b, i]`; in the table `params[x, i]` |
| tau_i | `quantile_levels` |
| gamma | `Config.discount` |
| alpha_k | the learning rate of `optax.sgd`, a number or `StepSizes` |
| beta_{x, k} (asynchronous) | `Config.step_sizes` at `State.visits`, with `optax.sgd(1.0)` |

The loss is the pinball loss, summed over the transitions of a batch and over quantiles and averaged
over targets, which get no gradient. Its gradient is minus the bracket above, so that
`optax.sgd(alpha)` makes exactly the paper's step. Synchronous: the batch has a transition from each
state (`markov.sample_step`). Asynchronous: it has one transition.

Deviations: none in the update. `random_index` is the paper's variant with one random target.
"""

import dataclasses
import functools
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sharding
from sharding import checks

Metrics = dict[str, jax.Array]
ApplyFn = Callable[[Any, jax.Array], jax.Array]
METHODS = ("auto", "sort", "pairs")
_FEW = 4096  # targets up to which pairs were faster on a CPU: benchmarks/markov.py --scaling


# --- step sizes -----------------------------------------------------------------------------------


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["scale", "power", "log_power"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class StepSizes:
  """alpha_k = scale (k + 1)^(-power) log(k + e)^(-log_power), k = 0, 1, ...: an optax schedule.

  Made by `step_sizes`, which warns if it breaks the theorem's condition.

  Attributes:
    scale: positive; a component moves by at most the sum of the step sizes, so it has the unit of
      the rewards.
    power: not negative.
    log_power: not negative.
  """

  scale: Any
  power: Any = 0.0
  log_power: Any = 0.0

  def __call__(self, count: Any) -> jax.Array:
    count = jnp.asarray(count, float)
    return self.scale * (count + 1) ** -self.power * jnp.log(count + math.e) ** -self.log_power


def step_sizes(
  name: str, *, scale: Any, power: Any = None, asynchronous: bool = False
) -> StepSizes:
  """Returns step sizes by name, and warns if convergence is not guaranteed with them.

  | name | alpha_k | the sum is infinite | o(1 / log k) | squares have a finite sum |
  |---|---|---|---|---|
  | "constant" | scale | yes | no | no |
  | "polynomial" | scale (k + 1)^-power | power <= 1 | power > 0 | power > 1/2 |
  | "logarithmic" | scale log(k + e)^-power | yes | power > 1 | no |

  Synchronous QTD needs the first two. The asynchronous theorem needs the first and the third.

  Args:
    name: see the table.
    scale: positive.
    power: positive; 0.6 for "polynomial" and 2 for "logarithmic" if not given.
    asynchronous: whether one state is updated at a time.

  Raises:
    ValueError: if the name is unknown, or a number is out of range.

  Example:
    >>> step_sizes("polynomial", scale=0.5)(jnp.arange(3)).round(3)
    Array([0.5  , 0.33 , 0.259], dtype=float32)

  Reference: https://arxiv.org/abs/2301.04462, Theorem 11.
  """
  checks.choice("name", name, ("constant", "polynomial", "logarithmic"))
  checks.positive("scale", scale)
  if name == "constant":
    if power is not None:
      raise ValueError(f'power must be None for "constant" step sizes, got {power}')
    power = 0.0
  elif power is None:
    power = 0.6 if name == "polynomial" else 2.0
  else:
    checks.positive("power", power)
  found = StepSizes(scale, 0.0, power) if name == "logarithmic" else StepSizes(scale, power)
  if isinstance(power, numbers.Real):
    for problem in broken_conditions(found, asynchronous=asynchronous):
      warnings.warn(f"{name} step sizes with power {power}: {problem}", stacklevel=2)
  return found


def broken_conditions(steps: StepSizes, *, asynchronous: bool = False) -> list[str]:
  """Returns the conditions of the convergence theorem that step sizes break, in words.

  Args:
    steps: with known numbers.
    asynchronous: whether one state is updated at a time.

  Example:
    >>> broken_conditions(StepSizes(0.1))
    ['alpha_k is not o(1 / log k), so the iterates need not settle']
    >>> broken_conditions(StepSizes(0.1, power=1.5))
    ['the sum of alpha_k is finite, so the iterates may stop short of a fixed point']
  """
  power, log_power = float(steps.power), float(steps.log_power)
  broken = []
  if not (power < 1 or (power == 1 and log_power <= 1)):
    broken.append("the sum of alpha_k is finite, so the iterates may stop short of a fixed point")
  if asynchronous and not (power > 0.5 or (power == 0.5 and log_power > 0.5)):
    broken.append(
      "the sum of alpha_k^2 is infinite, and the theorem for asynchronous updates needs it finite"
    )
  elif not (power > 0 or log_power > 1):
    broken.append("alpha_k is not o(1 / log k), so the iterates need not settle")
  return broken


# --- the algorithm --------------------------------------------------------------------------------


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["discount", "step_sizes"],
  meta_fields=["method", "random_index", "num_microbatches"],
)
@dataclasses.dataclass(frozen=True)
class Config:
  """Hyper-parameters of QTD.

  Attributes:
    discount: in [0, 1).
    step_sizes: None, or `StepSizes` by which the loss of a transition is weighted, at the number of
      visits of its state so far. Then params must be the table `[S, m]`.
    method: "auto", "sort" or "pairs"; see `quantile_td_error`.
    random_index: whether a transition has one random target in place of all m.
    num_microbatches: must be 1, because the loss is a sum over transitions.
  """

  discount: Any = 0.9
  step_sizes: Any = None
  method: str = "auto"
  random_index: bool = False
  num_microbatches: int = 1

  def __post_init__(self):
    check_config(self.discount, self.num_microbatches)
    checks.choice("method", self.method, METHODS)
    if isinstance(self.step_sizes, numbers.Real | str):
      raise ValueError(
        f"step_sizes must be StepSizes or None, got {self.step_sizes!r}: use step_sizes(...)"
      )


def check_config(discount: Any, num_microbatches: int) -> None:
  """Raises `ValueError` unless the discount is in [0, 1) and the number of micro-batches is 1."""
  checks.probabilities("discount", discount)
  if isinstance(discount, int | float | np.floating) and discount >= 1:
    raise ValueError(f"discount must lie in [0, 1), got {discount}")
  if num_microbatches != 1:
    raise ValueError(
      f"num_microbatches must be 1, got {num_microbatches}: the loss is a sum over transitions, "
      "which parts would average"
    )


class Batch(NamedTuple):
  """Transitions.

  Attributes:
    states: `[B]` integers. With several transitions from one state its steps add up.
    rewards: `[B]`.
    next_states: `[B]` integers.
  """

  states: jax.Array
  rewards: jax.Array
  next_states: jax.Array


class State(NamedTuple):
  """Everything that changes in learning.

  Attributes:
    params: the table `[S, m]`, or parameters as `apply_fn` takes them.
    opt_state: state of the optimiser.
    step: scalar int32, number of updates done.
    visits: `[S]` int32, transitions seen from each state, if the config has step sizes; else None.
  """

  params: Any
  opt_state: Any
  step: jax.Array
  visits: Any


def quantile_levels(num_quantiles: int, dtype: Any = float) -> jax.Array:
  """Returns the levels (2i - 1) / (2m), i = 1, ..., m.

  Example:
    >>> quantile_levels(4)
    Array([0.125, 0.375, 0.625, 0.875], dtype=float32)
  """
  checks.count("num_quantiles", num_quantiles)
  return ((2 * jnp.arange(num_quantiles) + 1) / (2 * num_quantiles)).astype(dtype)


def lookup(params: jax.Array, states: jax.Array) -> jax.Array:
  """Returns the rows of the table `params` at `states`: the `apply_fn` of the tabular algorithm."""
  return params[states]


def as_floats(*arrays: Any) -> list[jax.Array]:
  """Returns arrays or lists with one dtype; integers become floats, as a level is no integer."""
  arrays = tuple(map(jnp.asarray, arrays))
  dtype = jnp.result_type(*arrays, 1.0)
  return [array.astype(dtype) for array in arrays]


@checks.array_arguments
def quantile_td_error(
  quantiles: jax.Array, targets: jax.Array, *, method: str = "auto"
) -> jax.Array:
  """Returns tau_i - mean_j 1{target_j < quantile_i}, by which a step of size 1 moves quantile i.

  The comparison is strict: a target that equals the quantile does not count.

  Args:
    quantiles: `[..., m]`, in any order; entry i has the level (2i - 1) / (2m).
    targets: `[..., n]` reward + discount * next quantiles, in any order. Leading axes as in
      `quantiles`. n = 1 with a random next quantile gives the variant with a random index.
    method: "sort" in O((m + n) log n), "pairs" in O(m n), which vectorises better and keeps no
      array of pairs, or "auto": pairs for up to 4096 targets.

  Returns:
    `[..., m]`, between -1 and 1. No gradient passes.

  Raises:
    ValueError: if the leading axes differ, or the method is unknown.

  Example:
    >>> quantile_td_error(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]))
    Array([ 0.25, -0.25], dtype=float32)

  Reference: https://arxiv.org/abs/2301.04462, eq. 7.
  """
  quantiles, targets = as_floats(quantiles, targets)
  _check(quantiles, targets, method)
  below, _ = _below(*jax.lax.stop_gradient((quantiles, targets)), method)
  levels = quantile_levels(quantiles.shape[-1], quantiles.dtype)
  return levels - below.astype(quantiles.dtype) / targets.shape[-1]


@checks.array_arguments
def pinball_loss(quantiles: jax.Array, targets: jax.Array, *, method: str = "auto") -> jax.Array:
  """Returns the pinball loss of each quantile, averaged over targets.

  mean_j (tau_i - 1{u_j < 0}) u_j, u_j = target_j - quantile_i. Its gradient in quantile i is minus
  `quantile_td_error`.

  Args:
    quantiles: `[..., m]`.
    targets: `[..., n]`; they get no gradient.
    method: as in `quantile_td_error`.

  Returns:
    `[..., m]` losses, not negative up to rounding.

  Raises:
    ValueError: if the leading axes differ, or the method is unknown.

  Example:
    >>> pinball_loss(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]))
    Array([0.125, 0.375], dtype=float32)
  """
  quantiles, targets = as_floats(quantiles, jax.lax.stop_gradient(targets))
  _check(quantiles, targets, method)
  levels = quantile_levels(quantiles.shape[-1], quantiles.dtype)
  below, sums = jax.lax.stop_gradient(_below(jax.lax.stop_gradient(quantiles), targets, method))
  share = below.astype(quantiles.dtype) / targets.shape[-1]
  # The mean over targets below the quantile of how far they are below it.
  shortfall = share * quantiles - sums / targets.shape[-1]
  return levels * (jnp.mean(targets, axis=-1, keepdims=True) - quantiles) + shortfall


def init(params: Any, *, optimizer: optax.GradientTransformation, config: Config) -> State:
  """Returns the first state.

  Args:
    params: the table `[S, m]` of quantiles, often zeros, or parameters as `apply_fn` takes them.
    optimizer: `optax.sgd(alpha)` for the paper's step.
    config: hyper-parameters.

  Raises:
    ValueError: if the config has step sizes and `params` is not a table.
  """
  visits = None
  if config.step_sizes is not None:
    if not hasattr(params, "shape"):
      raise ValueError(f"params must be a table [S, m] to count visits, got {type(params)}")
    checks.matrix("params", params)
    visits = jnp.zeros(params.shape[0], jnp.int32)
  return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), visits)


def loss(
  params: Any, state: State, batch: Batch, key: Any, *, apply_fn: ApplyFn, config: Config
) -> tuple[jax.Array, tuple[Metrics, Any]]:
  """Returns the pinball loss, summed over transitions and quantiles, and metrics.

  Args:
    params: differentiated. The targets come from them too, as constants.
    state: its `visits` weight the transitions if the config has step sizes.
    batch: B transitions.
    key: PRNG key, used with `random_index` only.
    apply_fn: `apply_fn(params, states [B]) -> [B, m]`, such as `lookup`.
    config: hyper-parameters.

  Raises:
    ValueError: if the shapes of the batch do not fit, or it is empty.
  """
  quantiles = apply_fn(params, batch.states)
  following = jax.lax.stop_gradient(apply_fn(params, batch.next_states))
  checks.same_shape(states=batch.states, next_states=batch.next_states)
  if config.random_index:
    drawn = jax.random.randint(key, batch.states.shape, 0, following.shape[-1])
    following = jnp.take_along_axis(following, drawn[:, None], axis=-1)
  checks.shape("rewards", batch.rewards, quantiles.shape[:1], "[B]")
  targets = batch.rewards[:, None] + config.discount * following
  losses = jnp.sum(pinball_loss(quantiles, targets, method=config.method), axis=-1)
  if config.step_sizes is not None:
    losses = losses * config.step_sizes(state.visits[batch.states]).astype(losses.dtype)
  total = jnp.sum(losses)
  metrics = {
    "loss": total,
    "qtd/value": jnp.mean(quantiles),
    "qtd/spread": jnp.mean(jnp.std(quantiles, axis=-1)),
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
    batch: one transition from each state (synchronous), or one (asynchronous).

  Returns:
    The new state, and the metrics `loss`, `grad_norm`, `qtd/value` (mean of all quantiles of the
    batch) and `qtd/spread` (their standard deviation within a state, averaged).
  """
  moved, metrics = sharding.gradient_step(
    loss, state, batch, key, apply_fn=apply_fn, optimizer=optimizer, config=config
  )
  if config.step_sizes is not None:
    moved = moved._replace(visits=state.visits.at[batch.states].add(1))
  return moved, metrics


def _check(quantiles: jax.Array, targets: jax.Array, method: str) -> None:
  checks.choice("method", method, METHODS)
  axes = quantiles.ndim, targets.ndim
  if quantiles.shape[:-1] != targets.shape[:-1] or 0 in (*axes, *quantiles.shape, *targets.shape):
    raise ValueError(
      "quantiles [..., m] and targets [..., n] must have the same leading axes and not be empty, "
      f"got {list(quantiles.shape)} and {list(targets.shape)}"
    )


@functools.partial(jax.jit, static_argnames="method")
def _below(quantiles: jax.Array, targets: jax.Array, method: str) -> tuple[jax.Array, jax.Array]:
  """Returns the number and the sum of the targets below each quantile, both `[..., m]`."""
  num_targets = targets.shape[-1]
  if method == "pairs" or (method == "auto" and num_targets <= _FEW):
    # One target after another beside all quantiles: several times faster than a reduction over an
    # array of pairs, which XLA neither keeps in registers nor vectorises well on CPUs.
    def add(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
      target = jax.lax.dynamic_slice_in_dim(targets, index, 1, axis=-1)
      below = target < quantiles
      return carry[0] + below, carry[1] + jnp.where(below, target, 0)

    start = jnp.zeros(quantiles.shape, jnp.int32), jnp.zeros_like(quantiles)
    return jax.lax.fori_loop(0, num_targets, add, start, unroll=min(8, num_targets))
  count = functools.partial(jnp.searchsorted, side="left")
  for _ in quantiles.shape[:-1]:
    count = jax.vmap(count)
  ordered = jnp.sort(targets, axis=-1)
  below = count(ordered, quantiles)
  sums = jnp.cumsum(ordered, axis=-1)
  sums = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums], axis=-1)
  return below, jnp.take_along_axis(sums, below, axis=-1)
