"""Quantile dynamic programming: the fixed points of quantile TD, and the flow that leads to them.

T theta (x) is the law of R + discount theta(X', J), J uniform on the m quantiles of the next state
X', and F its distribution function. One step of quantile dynamic programming takes its quantiles at
the levels tau_i = (2i - 1) / (2m). Where F is flat at a level, a whole interval are quantiles, and
lambda(x, i) in [0, 1] chooses from it:

  theta(x, i) <- (1 - lambda) inf{y: F(y) >= tau_i} + lambda inf{y: F(y) > tau_i}.

That is a contraction of the largest difference by the discount, with one fixed point theta_lambda.
The fixed points for different lambda differ only if some F is flat at a level.

Quantile TD with small steps follows d theta(x, i) / dt = tau_i - F(theta(x, i)). Where F jumps, the
derivative lies in the interval [tau_i - F(theta), tau_i - F(theta-)]: a differential inclusion. The
distance max |theta - theta_lambda| never increases along the flow, for every lambda.

With rewards in [a, b] the law of the m quantiles at any fixed point is within
(b - a) / (2 m (1 - discount)^2) of the law of the return, in Wasserstein distance of order 1. So is
their mean from the value.

Ties of levels and of atoms are decided up to rounding: use float64 where they matter.

Reference: Rowland et al. 2023, https://arxiv.org/abs/2301.04462, sections 4 to 6.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rl_theory import markov, qtd
from sharding import checks


def quantile_dynamic_programming(
  mrp: markov.MarkovRewardProcess, theta: jax.Array, lam: Any = 0.0
) -> jax.Array:
  """Returns the quantiles after one exact step.

  Finitely many rewards are sorted with their probabilities; for continuous ones the level is found
  by bisection.

  Args:
    mrp: the process.
    theta: `[S, m]` quantiles of each state, in any order.
    lam: lambda, a number in [0, 1] or `[S, m]`.

  Returns:
    `[S, m]`, ascending for each state if `lam` is one number.

  Raises:
    ValueError: if `theta` has another number of states or is not finite, or `lam` lies outside
      [0, 1].

  Example:
    >>> process = markov.MarkovRewardProcess(markov.cycle_transitions(2), [1.0, 0.0], 0.5)
    >>> quantile_dynamic_programming(process, jnp.array([[0.0, 2.0], [4.0, 6.0]]))
    Array([[3., 4.],
           [0., 1.]], dtype=float32)
  """
  return _step(mrp, _check(mrp, theta, lam), _choice(lam))


def fixed_point(
  mrp: markov.MarkovRewardProcess,
  *,
  num_quantiles: int,
  lam: Any = 0.0,
  num_steps: int | None = None,
) -> jax.Array:
  """Returns the fixed point theta_lambda of quantile dynamic programming, `[S, m]`.

  Args:
    mrp: the process.
    num_quantiles: m.
    lam: lambda, a number in [0, 1] or `[S, m]`.
    num_steps: steps at most; by default so many (if the discount is known) that only rounding is
      left. It stops when a step changes nothing more than rounding does.

  Raises:
    ValueError: if `num_quantiles` is less than 1 or `lam` does not fit.

  Example:
    >>> fixed_point(markov.artefact(), num_quantiles=2)[0].round(4)
    Array([17.3, 20. ], dtype=float32)
  """
  checks.count("num_quantiles", num_quantiles)
  start = jnp.repeat(markov.value(mrp)[:, None], num_quantiles, axis=1)
  _check(mrp, start, lam)
  return _fixed_point(mrp, start, _choice(lam), _num_steps(mrp, start, num_steps))


def target_cdf(
  mrp: markov.MarkovRewardProcess, theta: jax.Array, values: jax.Array, *, left: bool = False
) -> jax.Array:
  """Returns F(values) `[S, ...]` of the laws T theta(x), for values `[S, ...]` of each state.

  With `left` it is the limit from below, which leaves out the probability of the value itself.
  """

  def one(state: jax.Array, values: jax.Array) -> jax.Array:
    rewards = values[..., None, None] - mrp.discount * theta
    found = markov.reward_cdf(mrp, rewards, state, left=left)
    return jnp.mean(found, axis=-1) @ mrp.transitions[state]

  # One state after another: memory is that of one, m * S * m.
  return jax.lax.map(lambda pair: one(*pair), (jnp.arange(len(mrp.transitions)), values))


def inclusion(mrp: markov.MarkovRewardProcess, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the ends `[S, m]` of the intervals in which d theta / dt lies.

  Where no law has an atom at theta both ends are the derivative. At a fixed point every interval
  contains 0.

  Example:
    >>> low, high = inclusion(markov.two_states("mixing"), jnp.array([[2.5], [-0.5]]))
    >>> print(low.ravel(), high.ravel())
    [0. 0.] [0. 0.]
  """
  return _inclusion(mrp, _check(mrp, theta, 0))


@jax.jit
def _inclusion(mrp: markov.MarkovRewardProcess, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
  levels = qtd.quantile_levels(theta.shape[1], theta.dtype)
  near = 16 * jnp.finfo(theta.dtype).eps * (1 + jnp.max(jnp.abs(theta)))
  low = levels - target_cdf(mrp, theta, theta + near)
  return low, levels - target_cdf(mrp, theta, theta - near, left=True)


def integrate(
  mrp: markov.MarkovRewardProcess, theta: jax.Array, *, step: Any, num_steps: int
) -> jax.Array:
  """Returns a solution of the differential inclusion, `[num_steps + 1, S, m]`.

  A step is implicit in each component, with the laws T theta held: theta+ solves
  theta+ - theta in step [tau_i - F(theta+), tau_i - F(theta+-)]. So a component stops at a quantile
  of its law and does not jump across it, and max |theta - theta_lambda| does not increase for
  steps of any size. The error is of the order of the step.

  Args:
    mrp: the process; its rewards may be continuous or finite.
    theta: `[S, m]` start.
    step: positive, the time of one step.
    num_steps: number of steps.
  """
  checks.positive("step", step)
  checks.count("num_steps", num_steps)
  return _integrate(mrp, _check(mrp, theta, 0), step, num_steps)


@functools.partial(jax.jit, static_argnames="num_steps")
def _integrate(
  mrp: markov.MarkovRewardProcess, theta: jax.Array, step: Any, num_steps: int
) -> jax.Array:
  levels = qtd.quantile_levels(theta.shape[1], theta.dtype)

  def move(theta: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    def beyond(values: jax.Array) -> jax.Array:
      return values - theta >= step * (levels - target_cdf(mrp, theta, values))

    moved = _bisect(beyond, theta - step, theta + step)
    return moved, moved

  _, path = jax.lax.scan(move, theta, length=num_steps)
  return jnp.concatenate([theta[None], path])


def nearest_fixed_point(mrp: markov.MarkovRewardProcess, theta: jax.Array) -> jax.Array:
  """Returns the fixed point that takes, from each interval of quantiles, what is nearest to theta.

  It is the fixed point phi of the contraction phi -> clip(theta, low(phi), high(phi)), where low
  and high are the quantiles for lambda = 0 and 1. No fixed point is nearer to theta than
  1 / (1 + discount) of this one, in the largest difference.
  """
  theta = _check(mrp, theta, 0)
  return _nearest(mrp, theta, _num_steps(mrp, theta, None))


def lyapunov(mrp: markov.MarkovRewardProcess, theta: jax.Array, *, lam: Any = None) -> jax.Array:
  """Returns max |theta - theta_lambda|, which never increases along the flow.

  Args:
    mrp: the process.
    theta: `[S, m]`.
    lam: lambda, a number or `[S, m]`. With None it is the distance to `nearest_fixed_point`: 0
      exactly on the set of fixed points, and at most 1 + discount times the distance from the set.
      If there is one fixed point, lambda does not matter.
  """
  theta = _check(mrp, theta, 0 if lam is None else lam)
  if lam is None:
    fixed = nearest_fixed_point(mrp, theta)
  else:
    fixed = fixed_point(mrp, num_quantiles=theta.shape[1], lam=lam)
  return jnp.max(jnp.abs(theta - fixed))


def _check(mrp: markov.MarkovRewardProcess, theta: Any, lam: Any) -> jax.Array:
  """Returns `theta` as an array; raises `ValueError` if it or lambda does not fit the process."""
  theta = jnp.asarray(theta, float)
  if theta.ndim != 2 or theta.shape[0] != len(mrp.transitions) or 0 in theta.shape:
    raise ValueError(
      f"theta must have shape [S, m] with S = {len(mrp.transitions)}, got {list(theta.shape)}"
    )
  checks.finite("theta", theta, fetch=True)
  checks.probabilities("lam", lam, fetch=True)
  if jnp.ndim(lam):
    checks.shape("lam", lam, theta.shape, "[S, m]")
  return theta


def _choice(lam: Any) -> Any:
  """Returns lambda as it is computed with: None for a plain 0, which needs half the work."""
  return None if isinstance(lam, int | float) and lam == 0 else jnp.asarray(lam, float)


def _num_steps(mrp: markov.MarkovRewardProcess, theta: jax.Array, num_steps: int | None) -> int:
  if num_steps is None:
    return markov.num_iterations(mrp.discount, float(jnp.finfo(theta.dtype).eps))
  checks.count("num_steps", num_steps)
  return num_steps


@jax.jit
def _step(mrp: markov.MarkovRewardProcess, theta: jax.Array, lam: Any) -> jax.Array:
  low = _quantiles(mrp, theta, upper=False)
  return low if lam is None else (1 - lam) * low + lam * _quantiles(mrp, theta, upper=True)


@functools.partial(jax.jit, static_argnames="num_steps")
def _fixed_point(
  mrp: markov.MarkovRewardProcess, start: jax.Array, lam: Any, num_steps: int
) -> jax.Array:
  return _iterate(mrp, start, lambda theta: _step(mrp, theta, lam), num_steps)


@functools.partial(jax.jit, static_argnames="num_steps")
def _nearest(mrp: markov.MarkovRewardProcess, theta: jax.Array, num_steps: int) -> jax.Array:
  def nearest(phi: jax.Array) -> jax.Array:
    low, high = (_quantiles(mrp, phi, upper=upper) for upper in (False, True))
    return jnp.clip(theta, low, high)

  return _iterate(mrp, theta, nearest, num_steps)


def _iterate(
  mrp: markov.MarkovRewardProcess,
  start: jax.Array,
  operator: Callable[[jax.Array], jax.Array],
  num_steps: int,
) -> jax.Array:
  """Returns what a contraction by the discount ends at."""
  rounding = float(jnp.finfo(start.dtype).eps)

  def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    theta, change, count = carry
    settled = change <= rounding * (1 - mrp.discount) * jnp.max(jnp.abs(theta))
    return (count < num_steps) & ~settled

  def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
    theta, _, count = carry
    moved = operator(theta)
    return moved, jnp.max(jnp.abs(moved - theta)), count + 1

  first = start, jnp.asarray(jnp.inf, start.dtype), jnp.zeros((), jnp.int32)
  return jax.lax.while_loop(unfinished, body, first)[0]


def _quantiles(mrp: markov.MarkovRewardProcess, theta: jax.Array, *, upper: bool) -> jax.Array:
  """Returns inf{y: F(y) >= tau_i} of the laws T theta, or with `upper` inf{y: F(y) > tau_i}."""
  levels = qtd.quantile_levels(theta.shape[1], theta.dtype)
  rewards = markov.reward_atoms(mrp)
  # Sums of n probabilities that should equal a level miss it by rounding, of the order sqrt(n) eps.
  # More slack would move the quantiles of continuous rewards, and skip atoms of little mass. Levels
  # are 1 / m apart, and the last one is 1 / (2 m) below 1.
  num_summands = theta.size * (1 if rewards is None else rewards.values.shape[1])
  rounding = 4 * math.sqrt(num_summands) * float(jnp.finfo(theta.dtype).eps)
  slack = min(rounding, 1 / (64 * theta.shape[1]))
  levels = levels + slack if upper else levels - slack
  if rewards is None:
    totals = jnp.sum(mrp.transitions, axis=1, keepdims=True)  # 1, up to rounding of the input

    def reached(values: jax.Array) -> jax.Array:
      return target_cdf(mrp, theta, values) >= totals * levels

    return _bisect(reached, *_bracket(mrp, theta, reached))

  def one(values: jax.Array, probs: jax.Array, transitions: jax.Array) -> jax.Array:
    targets = values[:, None, None] + mrp.discount * theta
    weights = jnp.broadcast_to(
      probs[:, None, None] * transitions[:, None] / theta.shape[1], targets.shape
    ).ravel()
    # What cannot happen is no quantile.
    targets = jnp.where(weights > 0, targets.ravel(), jnp.inf)
    order = jnp.argsort(targets)
    cumulative = jnp.cumsum(weights[order])
    return targets[order][jnp.searchsorted(cumulative, levels * cumulative[-1])]

  return jax.lax.map(lambda row: one(*row), (rewards.values, rewards.probs, mrp.transitions))


def _bracket(
  mrp: markov.MarkovRewardProcess, theta: jax.Array, reached: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns values `[S, m]` at which no level is reached, and at which all are."""
  centre = jnp.broadcast_to(markov.reward_means(mrp)[:, None], theta.shape)

  def too_narrow(width: jax.Array) -> jax.Array:
    missed = jnp.any(reached(centre - width)) | ~jnp.all(reached(centre + width))
    return missed & jnp.isfinite(width)  # NaN would never be reached

  width = jax.lax.while_loop(too_narrow, lambda width: 2 * width, jnp.ones((), theta.dtype))
  return centre - width, centre + width


def _bisect(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
  """Returns where `holds` begins to hold between `low` (where it does not) and `high`."""

  def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = ends
    middle = (low + high) / 2
    held = holds(middle)
    return jnp.where(held, low, middle), jnp.where(held, middle, high)

  num_bits = jnp.finfo(low.dtype).nmant + 8
  return jax.lax.fori_loop(0, num_bits, halve, (low, high))[1]
